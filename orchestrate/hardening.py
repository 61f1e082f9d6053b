"""A linear probe whose labelled examples are poisoned, fitted as it is and hardened (`Defense.hardener`): accuracy and attack success."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from attacks.base import class_names, pick
from defenses import hint
from defenses.base import Hardener
from models import clip, encode
from orchestrate.encoder import Encoder
from orchestrate.statistics import Share

VALIDATION = 4  # one trusted example to so many labelled ones


@dataclass(frozen=True)
class Hardening:
    """What the comparison needs. rows, valid: as `Pixels` reads them, with `label` as the probe is told it."""

    hardener: Hardener
    rows: pa.Table
    valid: pa.Table


def hardening(hardener: Hardener | None, table: pa.Table, size: int, seed: int) -> Hardening | None:
    """Labelled examples of a poisoned table, by hash: `size` to learn from, poisoned ones labelled as the adversary's class, and a quarter
    as many others, not poisoned, that are trusted. None without a hardener or without classes."""
    classes = class_names(table)
    if hardener is None or not classes:
        return None
    number = {name: i for i, name in enumerate(classes)}
    poison = table.column("poison").to_numpy(zero_copy_only=False)
    adversary = table.column("adversary").to_pylist()
    label = np.array(table.column("label").to_numpy())
    label[poison] = [number.get(adversary[i], -1) for i in np.flatnonzero(poison)]
    table = table.set_column(table.column_names.index("label"), "label", pa.array(label, pa.int32()))
    known = np.flatnonzero(label >= 0)
    ranked = known[pick(table.column("id").take(pa.array(known)).to_pylist(), len(known), seed, "hint")]
    size = min(size, len(ranked) * VALIDATION // (VALIDATION + 1))
    trusted = ranked[size:][~poison[ranked[size:]]][: max(1, size // VALIDATION)]
    if not size or not len(trusted):
        return None
    return Hardening(hardener, table.take(pa.array(ranked[:size])), table.take(pa.array(trusted)))


def measure(
    given: Hardening,
    encoder: Encoder,
    load: Callable[[pa.Table], Any],
    test: Tensor,
    truth: Tensor,
    shown: Mapping[str, tuple[Tensor, Tensor]],
    classes: Sequence[str],
) -> dict[str, float | int]:
    """`hint/top1`, `hint/asr/NAME` (with `/hits`, `/total`, `/low`, `/high`), `hint/loss` on the trusted examples; the same of the probe
    fitted on the examples as they are under `hint/plain/…`; `hint/poisoned`, `hint/learnt`: examples that are, and all; `hint/total`: test
    images of known class, the trials of both top1.

    test (m, d) with truth (m,), −1 unknown; shown: attack → features (k, d) of its probes and the adversary's class of each (k,).
    """
    pixels = {name: load(rows) for name, rows in (("rows", given.rows), ("valid", given.valid))}
    x, valid = (encoder.images(some).cpu() for some in pixels.values())
    y, valid_y = (torch.from_numpy(np.array(rows.column("label").to_numpy(), np.int64)) for rows in (given.rows, given.valid))
    images = None
    if given.hardener.where == "pixels":
        ready = torch.from_numpy(np.array(pixels["rows"])).permute(0, 3, 1, 2).float().div_(255)
        images = hint.Images(clip.resize(ready, clip.size(encoder.cfg)), _frozen(encoder))
    hardened = given.hardener.harden(x, y, valid, valid_y, len(classes), images)
    centre, scale = hint.standards(x)
    test, known = (test.cpu().double() - centre) / scale, (truth >= 0).cpu()
    poisoned = int(sum(given.rows.column("poison").to_pylist()))
    out: dict[str, float | int] = {"hint/total": int(known.sum()), "hint/learnt": len(x), "hint/poisoned": poisoned}
    for name, learned in (("hint", hardened), ("hint/plain", x)):
        head = hint.fit((learned.double() - centre) / scale, y, len(classes), given.hardener.penalty)
        guess = lambda some, head=head: (torch.cat([some, some.new_ones(len(some), 1)], 1) @ head).argmax(1)
        out[f"{name}/loss"] = hint.loss_of(head, (valid.double() - centre) / scale, valid_y)
        if known.any():
            out[f"{name}/top1"] = float((guess(test[known]) == truth.cpu()[known]).double().mean())
        for attack, (features, aims) in shown.items():
            hits = guess((features.cpu().double() - centre) / scale) == aims
            share = Share(int(hits.sum()), len(aims))
            key = f"{name}/asr/{attack}"
            out |= {f"{key}/hits": share.k, f"{key}/total": share.n, f"{key}/low": share.low, f"{key}/high": share.high}
            out |= {key: share.value} if share.n else {}
    return out


def _frozen(encoder: Encoder) -> Callable[[Tensor], Tensor]:
    """The image tower as a function of pixels (b, 3, S, S) in [0, 1], with gradient to the pixels only, in evaluation mode."""
    model, device = encoder.model, next(encoder.model.parameters()).device

    def features(pixels: Tensor) -> Tensor:
        training = [m for m in model.modules() if m.training]
        wanted = [p for p in model.parameters() if p.requires_grad]
        model.eval()
        for p in wanted:
            p.requires_grad_(False)
        try:
            return encode.encode_image(model, clip.normalise(pixels.to(device), *clip.image_stats(encoder.cfg)))[0].cpu()
        finally:
            for p in wanted:
                p.requires_grad_(True)
            for module in training:
                module.training = True

    return features
