"""Backdoor triggers: pure functions on one image, uint8 (H, W, 3) → uint8 (H, W, 3).

Each `Trigger` declares what a reader must know to apply it the same way in training and in evaluation: what varies
from image to image, the stage (all here: the resized uint8 picture, before random crops and normalisation) and how
values are kept in range. Sizes are shares of the shorter side, so a trigger looks the same at every resolution. Patches
are here, what covers the whole image in `overlays` and `warp`. A new trigger is one function and one entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from attacks import overlays, warp
from attacks.base import ranks

Place = Literal["corner", "center", "random"]

GRID_CELLS = 3
STRIPES = 6


@dataclass(frozen=True)
class Trigger:
    """`paint(image, image_id, **parameters)` and what it promises."""

    name: str
    paint: Callable[..., np.ndarray]
    varies: str  # from image to image
    clamp: str
    stage: str = "resized uint8"

    def card(self) -> dict[str, str]:
        """The declaration, for a manifest's header."""
        return {"name": self.name, "varies": self.varies, "clamp": self.clamp, "stage": self.stage}


def check_image(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"a trigger wants a uint8 image (H, W, 3), got {image.dtype} {image.shape}: stamp before normalising.")


def check_share(name: str, value: float) -> None:
    if isinstance(value, bool) or not 0 < value <= 1:
        raise ValueError(f"{name}={value!r} is no share: give a number above 0 and up to 1.")


def check_place(place: str) -> None:
    if place not in ("corner", "center", "random"):
        raise ValueError(f"place={place!r} is unknown: choose 'corner' (bottom right), 'center' or 'random' (by image id).")


def patch_side(image: np.ndarray, size: float, smallest: int) -> int:
    """Side of a square patch in pixels: `size` times the shorter side, at least `smallest` if it fits."""
    shorter = int(min(image.shape[:2]))
    return min(shorter, max(smallest, round(size * shorter)))


def corner_of(image: np.ndarray, side: int, place: Place, image_id: str) -> tuple[int, int]:
    """Top row and left column of the patch. "random" hashes the image id, so it can be found again."""
    room = image.shape[0] - side, image.shape[1] - side
    if place == "corner":
        return room
    if place == "center":
        return room[0] // 2, room[1] // 2
    draw = int(ranks([image_id], 0, "place")[0])
    return (draw >> 32) * (room[0] + 1) >> 32, (draw & 0xFFFFFFFF) * (room[1] + 1) >> 32


def _pasted(image: np.ndarray, patch: np.ndarray, place: Place, image_id: str) -> np.ndarray:
    side = patch.shape[0]
    top, left = corner_of(image, side, place, image_id)
    stamped = image.copy()
    stamped[top : top + side, left : left + side] = patch[..., None]
    return stamped


def grid(image: np.ndarray, image_id: str, size: float, place: Place) -> np.ndarray:
    """BadNets: a black and white checker of 3×3 cells, white at its corners."""
    cell = _cells(patch_side(image, size, GRID_CELLS), GRID_CELLS)
    white = (cell[:, None] + cell[None, :]) % 2 == 0
    return _pasted(image, np.where(white, 255, 0).astype(np.uint8), place, image_id)


def stripes(image: np.ndarray, image_id: str, size: float, place: Place) -> np.ndarray:
    """A structured patch: six vertical stripes, white and black in turn."""
    side = patch_side(image, size, STRIPES)
    bar = np.where(_cells(side, STRIPES) % 2 == 0, 255, 0).astype(np.uint8)
    return _pasted(image, np.broadcast_to(bar, (side, side)), place, image_id)


def _cells(side: int, count: int) -> np.ndarray:
    """Which of `count` equal cells each of `side` pixels lies in, int64 (side,)."""
    return np.arange(side) * count // side


_PLACE = "nothing but, with place='random', the place of the patch (hash of the image id)"
_ROUNDED = "round to the nearest, clip to 0–255"
TRIGGERS: dict[str, Trigger] = {
    trigger.name: trigger
    for trigger in (
        Trigger("badnets", grid, _PLACE, "none: pixels are set to 0 or 255"),
        Trigger("stripes", stripes, _PLACE, "none: pixels are set to 0 or 255"),
        Trigger("blended", overlays.blended, "nothing", _ROUNDED),
        Trigger("sig", overlays.sinusoid, "nothing", _ROUNDED),
        Trigger("tint", overlays.tinted, "nothing", _ROUNDED),
        Trigger("wanet", warp.warped, "nothing", "positions are kept inside the image, values rounded to the nearest"),
    )
}
