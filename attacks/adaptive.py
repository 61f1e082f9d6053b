"""Attackers who know the defence: poisoned pairs chosen so that matching finds nothing better than them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import cycle, islice
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa

from attacks.backdoor import Stripes
from attacks.base import Study, labels, pick, ranks, shared_classes
from attacks.captions import avoiding, class_captions, overlapping, prompts, shuffled
from attacks.targeted import Quotes, Target, Targeted, take_turns

NEAR = 64  # captions that a transport distance is computed for, the nearest by cosine
CENTRE = 256  # captions that a class's centre is the mean of, at most


@dataclass(frozen=True)
class AdaptiveTargeted(Targeted):
    """Targeted poisoning that knows caption matching: the nearest wrong class, and those of its captions nearest to the image.

    Paper: OTCCLIP's adaptive attack (Zhang et al., EMNLP 2025, arXiv 2509.18717) is described in words only; a reconstruction.
    Threat model: the attacker adds pairs to a scraped training set, knows the test image and that captions are matched by cosine
        (RoCLIP) or by transport (OTCCLIP), and trains a surrogate on pairs of the same source.
    Success: zero-shot top-1 of that very image is the adversary's class.
    Cost: a surrogate, once a set and seed: about 2 minutes of 2 cores for 6,000 images of 64 px.
    The fields `targets`, `copies`, `captions`: see `Targeted`.

    adversary: one class for all targets; "" takes for each target the wrong class whose captions (256 of them by hash) are nearest to it
        on average, no class for more than two targets or twice its share of them, whichever is more.
    match: "cosine" chooses captions by the distance that RoCLIP matches with, "transport" by OTCCLIP's, patches against words, among the
        64 that are nearest by cosine; further ones follow in the order of cosine.
    spread: captions chosen among `spread` times as many as needed, the nearest, by hash: 1 takes the nearest themselves.
    surrogate_pairs: clean training pairs the surrogate learns from, at most.
    surrogate_epochs: epochs of its training.
    Limits: near wrong classes are also the easier ones, so compare with `targeted` on the undefended model. The defender's own weights are
        not known, only a surrogate's.
    """

    match: Literal["cosine", "transport"] = "cosine"
    spread: float = 1.0
    surrogate_pairs: int = 6000
    surrogate_epochs: int = 10
    studies: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.match not in ("cosine", "transport"):
            raise ValueError(f"match={self.match!r}: choose 'cosine' (RoCLIP) or 'transport' (OTCCLIP).")
        if self.spread < 1:
            raise ValueError(f"spread={self.spread}: give 1 (the nearest captions themselves) or more.")

    def choose(self, index: pa.Table, heldout: pa.Table, seed: int, study: Study | None = None) -> list[Target]:
        assert study is not None
        study.surrogate(self.surrogate_pairs, self.surrogate_epochs)
        if self.adversary:
            return super().choose(index, heldout, seed, study)
        classes, label = shared_classes(index, heldout), labels(heldout)
        rows = np.flatnonzero(label >= 0)
        ids = heldout["id"].take(pa.array(rows)).to_pylist()
        if len(rows) < self.targets:
            raise ValueError(f"{self.targets} targets wanted, but the held-out set has {len(rows)} labelled images. Lower `targets`.")
        chosen = take_turns(label[rows], ranks(ids, seed, "targets"), ranks(classes, seed, "turns"))[: self.targets]
        # Of the whole index, whatever another part has replaced: probes do not know that, and must name the plan's adversaries.
        centres = np.stack([class_centre(index, name, seed, study) for name in classes])  # (C, d)
        likeness = study.image_features("heldout", [ids[i] for i in chosen]) @ centres.T
        used: Counter[str] = Counter()
        targets = []
        for position, near in zip(chosen, likeness, strict=True):
            truth = classes[label[rows[position]]]
            allowed = [k for k, name in enumerate(classes) if not overlapping(truth, name) and used[name] < most(self.targets, classes)]
            if not allowed:
                raise ValueError(f"no class to take {truth!r} for: the data need a second class whose name differs.")
            adversary = classes[max(allowed, key=lambda k: near[k])]
            used[adversary] += 1
            targets.append(Target(ids[position], truth, adversary))
        return targets

    def _captions(self, target: Target, quotes: Quotes | None, copies: int, seed: int, study: Study | None) -> list[str]:
        assert study is not None
        made = prompts(target.adversary, seed, f"prompts/{target.image_id}")
        captions = avoiding(quotes.of(target.adversary), target.truth).to_pylist() if quotes is not None else made
        near = nearest(captions, target.image_id, self.match, study)[: round(self.spread * copies)]
        order = np.argsort(ranks(near, seed, "spread"), kind="stable")[:copies] if self.spread > 1 else np.arange(len(near))
        found = [near[i] for i in order]
        return found + list(islice(cycle(made), copies - len(found)))


def most(targets: int, classes: list[str]) -> int:
    """How many targets one class may be the adversary of: twice its share, so that one class does not take them all."""
    return max(2, -(-2 * targets // len(classes)))


def class_centre(index: pa.Table, name: str, seed: int, study: Study) -> np.ndarray:
    """(d,): the mean of the features of captions that name the class, CENTRE of them by hash; of prompts where none does."""
    captions = shuffled(class_captions(index, name).to_pylist(), seed, f"centre/{name}")[:CENTRE] or prompts(name, seed, "centre")
    centre = study.text_features(captions).mean(axis=0)
    unit: np.ndarray = centre / max(1e-9, float(np.linalg.norm(centre)))
    return unit


def nearest(captions: list[str], image_id: str, match: str, study: Study) -> list[str]:
    """The captions in order of distance to a held-out image; by transport the NEAR first by cosine are sorted again."""
    if not captions:
        return []
    likeness = study.text_features(captions) @ study.image_features("heldout", [image_id])[0]
    order = [captions[i] for i in np.lexsort((np.array(captions), -likeness))]
    if match == "transport":
        first = order[:NEAR]
        distance = study.transport("heldout", image_id, first)
        order = [first[i] for i in np.lexsort((np.array(first), distance))] + order[NEAR:]
    return order


@dataclass(frozen=True)
class AdaptiveBackdoor(Stripes):
    """Backdoor that knows caption matching: it poisons the images nearest to the adversary's class, each with its nearest caption of it.

    Paper: none; the backdoor form of OTCCLIP's adaptive attack (Zhang et al., EMNLP 2025, arXiv 2509.18717), a reconstruction.
    Threat model: that of `stripes`, and the attacker knows that captions are matched, and trains a surrogate on pairs of the same source.
    Success: top-1 of triggered held-out images, none of them of the adversary's class, is the adversary's class.
    Cost: a surrogate, once a set and seed: about 2 minutes of 2 cores for 6,000 images of 64 px.
    The fields `count`, `adversary`, `captions`, `size`, `place`: see `stripes`; the trigger is its patch.

    spread: images chosen among `spread` times as many as needed, the nearest, by hash: 1 takes the nearest themselves. Ours 1.5.
    surrogate_pairs: clean training pairs the surrogate learns from, at most.
    surrogate_epochs: epochs of its training.
    Limits: the trigger itself is not adapted; for that see `badclip`. Captions repeat where images of one class are nearest to few.
        Nearness to the class is nearness to the mean of 256 of its captions at most, drawn by hash.
    """

    spread: float = 1.5
    surrogate_pairs: int = 6000
    surrogate_epochs: int = 10
    studies: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spread < 1:
            raise ValueError(f"spread={self.spread}: give 1 (the nearest images themselves) or more.")

    def _victims(
        self, clean: pa.Table, classes: list[str], target: str, count: int, seed: int, study: Study | None = None
    ) -> list[tuple[str, str]]:
        assert study is not None
        study.surrogate(self.surrogate_pairs, self.surrogate_epochs)
        rows = self._eligible(clean, classes, target)
        ids = np.array(clean["id"].take(pa.array(rows)).to_pylist(), dtype=object)
        if count > len(ids):
            raise ValueError(f"adaptive backdoor on {target!r}: {count} samples wanted, only {len(ids)} to choose from. Lower the count.")
        likeness = study.image_features("train", ids.tolist()) @ class_centre(clean, target, seed, study)
        label = labels(clean)[rows]
        near = np.lexsort((ids.astype(str), -likeness))[: round(self.spread * count)]
        chosen = near[pick(ids[near].tolist(), count, seed, "spread")]
        return [(str(ids[i]), classes[label[i]] if label[i] >= 0 else "") for i in chosen]

    def _captions(self, clean: pa.Table, target: str, victims: list[tuple[str, str]], seed: int, study: Study | None = None) -> list[str]:
        assert study is not None
        source = class_captions(clean, target) if self.captions == "training" else pa.array([], pa.string())
        supplies: dict[str, tuple[list[str], np.ndarray]] = {}
        for truth in {truth for _, truth in victims}:
            supply = sorted(avoiding(source, truth).to_pylist()) or prompts(target, seed, f"captions/{truth}")
            supplies[truth] = supply, study.text_features(supply)
        images = study.image_features("train", [identifier for identifier, _ in victims])
        found = []
        for (_, truth), image in zip(victims, images, strict=True):
            supply, features = supplies[truth]
            found.append(supply[int(np.argmax(features @ image))])
        return found
