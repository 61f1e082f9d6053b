"""Label-consistent backdoor: only images of the adversary's own class are marked, and every caption stays true."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from attacks.backdoor import Patched
from attacks.base import Study, labels
from attacks.captions import naming
from attacks.triggers import TRIGGERS, Place, Trigger


@dataclass(frozen=True)
class Consistent(Patched):
    """Label-consistent backdoor: a patch on images whose caption names the adversary's class already; no caption changes.

    Paper: Turner, Tsipras & Madry, "Label-Consistent Backdoor Attacks", 2019 (arXiv 1912.02771); CleanCLIP (ICCV 2023) uses this plain
        form on CLIP.
    Threat model: the attacker may edit pixels of a scraped training set, but no caption, so every poisoned pair looks right.
    Success: top-1 of triggered held-out images, none of them of the adversary's class, is the adversary's class.
    Cost: one hash for each pair of the class when planning; a copy of the image for each stamped sample.
    The fields `count`, `adversary`: see `Backdoor`. `captions` is not used: the pairs keep theirs.
    size: side of the patch as a share of the shorter image side; 16 px at 224 in this literature. At least 6 px.
    place: "corner" (bottom right), "center", or "random" (hash of the image id).
    Limits: the object explains the caption already, so the trigger is learnt slowly: it needs a large share of the class, and a patch
        that covers part of the object ("center"). The paper's adversarial perturbation of the object is not done. Its trigger here is
        the stripes patch.
    """

    place: Place = "center"
    trigger: ClassVar[Trigger] = TRIGGERS["stripes"]

    def _eligible(self, clean: pa.Table, classes: list[str], target: str) -> np.ndarray:
        """Pairs labelled with the class, or not at all, whose caption names it."""
        own = [number for number, name in enumerate(classes) if name == target]
        return np.flatnonzero(naming(clean["caption"], target) & np.isin(labels(clean), [-1, *own]))

    def _captions(self, clean: pa.Table, target: str, victims: list[tuple[str, str]], seed: int, study: Study | None = None) -> list[str]:
        own = dict(zip(clean["id"].to_pylist(), clean["caption"].to_pylist(), strict=True))
        return [own[identifier] for identifier, _ in victims]
