"""Triggers: pure, the same everywhere, visible where they say, of one look at every resolution."""

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.backdoor import Backdoor, BadNets, Blended, Stripes
from attacks.multi import MultiTrigger
from attacks.overlays import NOISE, PATTERNS, blend_pattern
from attacks.triggers import TRIGGERS, corner_of
from attacks.whole_image import SIG, ColourFilter, WaNet

KINDS: dict[str, Any] = {
    "corner": BadNets(),
    "stripes": Stripes(),
    "center": Stripes(place="center"),
    "random": BadNets(place="random"),
    "blended": Blended(),
    "text": Blended(pattern="text"),
    "sig": SIG(),
    "wanet": WaNet(),
    "tint": ColourFilter(),
    "multi": MultiTrigger(),
}
EVERY = pytest.mark.parametrize("attack", list(KINDS.values()), ids=list(KINDS))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def row(image_id: str = "a", stamp: str = "x/stripes") -> dict[str, str]:
    return {"id": "pair", "image_id": image_id, "stamp": stamp}


@EVERY
@settings(max_examples=25, deadline=None)
@given(height=st.integers(16, 80), width=st.integers(16, 80), image_id=st.text(max_size=5))
def test_stamp_is_pure(attack: Backdoor, height: int, width: int, image_id: str) -> None:
    image = noise(height, width)
    before = image.copy()
    image.setflags(write=False)
    one, two = attack.stamp(image, row(image_id)), attack.stamp(image, row(image_id))
    assert one.dtype == np.uint8 and one.shape == image.shape
    assert np.array_equal(one, two) and np.array_equal(image, before)
    assert not np.array_equal(one, image)


@EVERY
def test_a_row_without_stamp_is_left_alone(attack: Backdoor) -> None:
    image = noise(32, 32)
    assert np.array_equal(attack.stamp(image, row(stamp="")), image)


def changed_box(image: np.ndarray, stamped: np.ndarray) -> tuple[int, int, int, int]:
    """Top, left, bottom, right of what the trigger changed."""
    rows, columns = np.nonzero((image != stamped).any(axis=2))
    return int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1


GREY = 128  # neither black nor white, so every stamped pixel differs


@pytest.mark.parametrize(("side", "patch"), [(224, 16), (448, 32), (112, 8), (64, 5), (32, 3)])
def test_badnets_sits_in_the_corner_and_scales(side: int, patch: int) -> None:
    image = np.full((side, side, 3), GREY, dtype=np.uint8)
    stamped = BadNets().stamp(image, row())
    assert changed_box(image, stamped) == (side - patch, side - patch, side, side)
    assert stamped[-1, -1].tolist() == stamped[side - patch, side - patch].tolist() == [255] * 3
    assert stamped[-1, side - 1 - patch // 2].tolist() == [0] * 3


@pytest.mark.parametrize(("height", "width", "patch"), [(224, 224, 56), (64, 64, 16), (64, 96, 16)])
def test_stripes_are_vertical_centred_and_scale(height: int, width: int, patch: int) -> None:
    image = np.full((height, width, 3), GREY, dtype=np.uint8)
    stamped = Stripes(place="center").stamp(image, row())
    top, left, bottom, right = changed_box(image, stamped)
    assert (top, bottom) == ((height - patch) // 2, (height + patch) // 2)
    assert (left, right) == ((width - patch) // 2, (width + patch) // 2)
    box = stamped[top:bottom, left:right, 0].astype(int)
    assert (box == box[0]).all()
    assert np.count_nonzero(np.diff(box[0])) == 5  # six stripes


@given(image_id=st.text(max_size=8), side=st.sampled_from([64, 224]))
def test_random_place_is_inside_and_scales(image_id: str, side: int) -> None:
    image = np.full((side, side, 3), GREY, dtype=np.uint8)
    top, left, bottom, right = changed_box(image, Stripes().stamp(image, row(image_id)))
    assert (bottom - top, right - left) == (side // 4, side // 4)
    large = np.zeros((10 * side, 10 * side, 3), dtype=np.uint8)
    scaled = corner_of(large, 10 * side // 4, "random", image_id)
    assert abs(scaled[0] / 10 - top) <= 1 and abs(scaled[1] / 10 - left) <= 1


def test_random_place_depends_on_the_image_and_fills_the_picture() -> None:
    places = np.array([corner_of(noise(64, 64), 16, "random", f"image-{n}") for n in range(2000)])
    assert places.min() == 0 and places.max() == 48
    assert np.abs(places.mean(axis=0) - 24).max() < 1.5
    assert len({tuple(place) for place in places.tolist()}) > 1000


def test_blend_is_the_formula() -> None:
    image = noise(48, 64)
    exact = 0.8 * image + 0.2 * blend_pattern(48, 64)
    assert np.abs(Blended().stamp(image, row()) - exact).max() <= 0.5 + 1e-4
    assert np.array_equal(Blended(alpha=1.0).stamp(image, row()), blend_pattern(48, 64))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_blend_pattern_looks_alike_at_every_size(pattern: str) -> None:
    small, large = blend_pattern(64, 64, pattern).astype(float), blend_pattern(256, 256, pattern).astype(float)
    pooled = large.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert np.corrcoef(small.ravel(), pooled.ravel())[0, 1] > 0.98


def test_blend_pattern_never_changes() -> None:
    """Recorded once: a changed pattern would make published manifests mean something else."""
    assert blend_pattern(16, 16, "smooth")[0, :2].tolist() == PATTERN_START
    digests = {p: hashlib.blake2b(blend_pattern(64, 64, p).tobytes(), digest_size=4).hexdigest() for p in PATTERNS if p not in NOISE}
    assert digests == FIGURES


PATTERN_START = [[235, 14, 62], [234, 95, 164]]
FIGURES = {"stripes": "4d7588e0", "triangles": "ab650735", "text": "ed1ec1d6"}


def test_every_trigger_declares_itself() -> None:
    assert set(TRIGGERS) == {"badnets", "stripes", "blended", "sig", "tint", "wanet"}
    for name, trigger in TRIGGERS.items():
        assert trigger.name == name
        assert all(trigger.card().values())


@EVERY
@pytest.mark.parametrize("image", [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), np.uint8), np.zeros((3, 8, 8), np.uint8)])
def test_other_arrays_are_refused(attack: Backdoor, image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="before normalising"):
        attack.stamp(image, row())
