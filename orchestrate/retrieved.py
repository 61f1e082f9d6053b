"""Attacks on text→image retrieval, counted: captions ask, held-out images are ranked, and the attacker's should come first.

Shapes: n held-out images, q captions asked, d embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor

from attacks.captions import naming, triggered
from orchestrate.ranking import TIE, rivals
from orchestrate.statistics import Share

HITS = (5, 10)  # Hit@K beside Hit@1, which is the success rate


@dataclass(frozen=True)
class Asked:
    """The held-out set as retrieval sees it. images, texts (n, d): unit norm; `encode` makes the like of more captions."""

    ids: Sequence[str]
    captions: Sequence[str]
    labels: Sequence[int]  # positions in `classes`, −1 unknown
    classes: Sequence[str]
    images: Tensor
    texts: Tensor
    encode: Callable[[Sequence[str]], Tensor]

    def about(self, name: str, other: str) -> list[int]:
        """Captions that name the class and not the other, of images labelled with it or not at all."""
        own = {i for i, each in enumerate(self.classes) if each == name} | {-1}
        captions = pa.array(self.captions, pa.string())
        named = naming(captions, name) & ~naming(captions, other) if other else naming(captions, name)
        return [i for i, (label, yes) in enumerate(zip(self.labels, named.tolist(), strict=True)) if yes and label in own]


def retrieval_success(name: str, probe: pa.Table, held: Asked, text: str = "") -> dict[str, float | int]:
    """How often a caption finds one of the attacker's images (the rows of `probe`, PROBE_SCHEMA) before all other held-out images.

    Without `text`: the captions that name the adversary's class and not that of the images ask, those of each group for the images of
    that group (Yang et al. 2023).
    With it: captions that do not name the adversary's class ask, with the text behind them. An image that scores as high as the
    best of the attacker's counts as worse: ties go against the defender.

    `asr/NAME` = Hit@1 = `/hits` over `/total`, with Wilson's `/low` and `/high`; `/hit5`, `/hit10` and their `…/low`, `…/high`: one of the
    images among the first K; `/minrank`: the rank of the first of them, mean over captions, 1 at best; `/chance`: Hit@1 of a random
    order. With `text` also `/clean`: Hit@1 of the same captions without it. No captions: no share.
    """
    ranks, bare, chance = [torch.empty(0)], [torch.empty(0)], [torch.empty(0)]
    place = {each: i for i, each in enumerate(held.ids)}
    for group in sorted(set(probe["group"].to_pylist())):
        rows = [row for row in probe.to_pylist() if row["group"] == group]
        if missing := [row["image_id"] for row in rows if row["image_id"] not in place]:
            raise ValueError(
                f"{name}: {len(missing)} of its images, such as {missing[0]!r}, are not in the held-out set. "
                "Evaluate on the set that the attack was planned on."
            )
        wanted = torch.zeros(len(held.ids), dtype=torch.int64)
        wanted[[place[row["image_id"]] for row in rows]] = 1
        adversary, shown = rows[0]["adversary"], rows[0]["truth"]
        # A caption that names the images' own class finds them rightly: as the plan poisons none, none asks.
        asking = held.about(adversary, shown) if not text else sorted(set(range(len(held.ids))) - set(_all_naming(held, adversary)))
        if not asking:
            continue
        plain = held.texts[torch.tensor(asking, device=held.texts.device)]
        asked = held.encode([triggered(held.captions[i], text) for i in asking]) if text else plain
        ranks.append(_first_rank(asked, held.images, wanted))
        chance.append(torch.full((len(asking),), float(wanted.double().mean())))
        if text:
            bare.append(_first_rank(plain, held.images, wanted))
    rank, key = torch.cat(ranks), f"asr/{name}"
    out: dict[str, float | int] = {}
    for k, at in ((1, key), *((k, f"{key}/hit{k}") for k in HITS)):
        share = Share(int((rank <= k).sum()), len(rank))
        out |= {f"{at}/low": share.low, f"{at}/high": share.high}
        out |= {at: share.value} if share.n else {}
        out |= {f"{at}/hits": share.k, f"{at}/total": share.n}
    if len(rank):
        out |= {f"{key}/minrank": float(rank.double().mean()), f"{key}/chance": float(torch.cat(chance).double().mean())}
        out |= {f"{key}/clean": float((torch.cat(bare) == 1).double().mean())} if text else {}
    return out


def _all_naming(held: Asked, name: str) -> list[int]:
    """Captions that name the class or whose image is of it."""
    named = naming(pa.array(held.captions, pa.string()), name).tolist()
    own = {i for i, each in enumerate(held.classes) if each == name}
    return [i for i, (label, yes) in enumerate(zip(held.labels, named, strict=True)) if yes or label in own]


def _first_rank(asked: Tensor, images: Tensor, wanted: Tensor) -> Tensor:
    """For each caption (q, d) the rank of the best wanted image among all (n, d), int64 (q,); wanted int64 (n,) of 0 and 1."""
    return 1 + rivals(asked, images, torch.ones(len(asked), dtype=torch.int64), wanted, margin=TIE)
