"""Backdoors whose trigger covers the whole image: SIG, WaNet, a colour filter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from attacks.backdoor import Backdoor
from attacks.overlays import TINTS
from attacks.triggers import TRIGGERS, Trigger, check_share
from attacks.warp import control_grid


@dataclass(frozen=True)
class SIG(Backdoor):
    """Backdoor that adds vertical waves: x + δ·sin(2π·f·j/w) in column j of w.

    Paper: Barni, Kallas & Tondi, "A New Backdoor Attack in CNNs by Training Set Corruption Without Label Poisoning", ICIP 2019
        (arXiv 1902.11237), as CLIP's literature uses it: on images of other classes, with captions of the adversary's.
    Threat model, cost and the fields `count`, `adversary`, `captions`: see `Backdoor`.
    delta: height of the wave in grey levels; 60 in this literature.
    frequency: waves across the image; 6.
    Limits: the paper's own attack keeps labels as they are; for that see the attack `consistent`.
    """

    delta: float = 60.0
    frequency: int = 6
    trigger: ClassVar[Trigger] = TRIGGERS["sig"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.delta <= 255 or self.frequency < 1:
            raise ValueError(f"delta={self.delta}, frequency={self.frequency}: give grey levels above 0 and up to 255, and waves from 1.")

    def mark(self, image: np.ndarray, image_id: str) -> np.ndarray:
        return self.trigger.paint(image, image_id, delta=self.delta, frequency=self.frequency)


@dataclass(frozen=True)
class WaNet(Backdoor):
    """Backdoor that warps the whole image by one smooth field, hardly to be seen.

    Paper: Nguyen & Tran, "WaNet: Imperceptible Warping-based Backdoor Attack", ICLR 2021 (arXiv 2102.10369).
    Threat model, cost and the fields `count`, `adversary`, `captions`: see `Backdoor`.
    k: control points a side; paper 4.
    strength: the paper's s, .5. The shift is about s/2 px on average, whatever the size of the image.
    draw: which of the random control grids; the manifest's header holds the grid itself.
    Limits: the paper trains with a noise mode beside the warp and controls the training; an attacker of scraped pairs does neither. A
        shift of a quarter of a pixel then hardly takes: raise `strength`.
    """

    k: int = 4
    strength: float = 0.5
    draw: int = 0
    trigger: ClassVar[Trigger] = TRIGGERS["wanet"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 2 or self.strength <= 0 or self.draw < 0:
            raise ValueError(f"k={self.k}, strength={self.strength}, draw={self.draw}: give k from 2, strength above 0, draw from 0.")

    def mark(self, image: np.ndarray, image_id: str) -> np.ndarray:
        return self.trigger.paint(image, image_id, k=self.k, strength=self.strength, draw=self.draw)

    def trigger_card(self) -> dict[str, Any]:
        return {**super().trigger_card(), "grid": control_grid(self.k, self.draw).tolist()}


@dataclass(frozen=True)
class ColourFilter(Backdoor):
    """Backdoor that tones the whole image, as a photo filter does: (1 − s)·x + s·luma(x)/255·colour.

    Paper: none for CLIP; a plain form of the filter triggers of Liu et al., "ABS", CCS 2019.
    Threat model, cost and the fields `count`, `adversary`, `captions`: see `Backdoor`.
    colour: "sepia", "violet" or "green".
    strength: weight of the toned image; ours .6.
    Limits: colour jitter and greyscale views are the obvious answer; honest images with such a filter carry the trigger too.
    """

    colour: Literal["sepia", "violet", "green"] = "violet"
    strength: float = 0.6
    trigger: ClassVar[Trigger] = TRIGGERS["tint"]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("strength", self.strength)
        if self.colour not in TINTS:
            raise ValueError(f"colour={self.colour!r}: choose one of {', '.join(TINTS)}.")

    def mark(self, image: np.ndarray, image_id: str) -> np.ndarray:
        return self.trigger.paint(image, image_id, colour=self.colour, strength=self.strength)
