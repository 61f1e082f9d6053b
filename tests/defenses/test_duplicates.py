"""Near-duplicate images are found as comparing all pairs would, through saving and scaling; captions are compared as word sets."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from defenses import duplicates


def picture(seed: int, side: int = 64) -> np.ndarray:
    """Smooth blobs, as photographs are smooth."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC))


def saved(image: np.ndarray, quality: int) -> np.ndarray:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=quality)
    return np.array(Image.open(out).convert("RGB"))


def scaled(image: np.ndarray) -> np.ndarray:
    return np.array(Image.fromarray(image).resize((48, 48), Image.Resampling.BICUBIC).resize((64, 64), Image.Resampling.BICUBIC))


def test_what_was_saved_or_scaled_again_is_the_same_and_nothing_else_is():
    originals = [picture(seed) for seed in range(60)]
    images = np.stack([*originals, *(saved(x, 60) for x in originals[:20]), *(scaled(x) for x in originals[20:40])])
    group = duplicates.groups(*duplicates.prints(images))
    assert (group[:40] == group[60:]).all()
    assert len(set(group[:60])) == 60


def test_prints_are_what_their_definition_says():
    image = picture(3, 68)
    signs, thumbs = duplicates.prints(image[None])
    gray = image @ np.array([0.299, 0.587, 0.114])
    rows, columns = (np.linspace(0, 68, n + 1).astype(int) for n in (8, 9))
    cells = [[gray[a:b, c:d].mean() for c, d in pairwise(columns)] for a, b in pairwise(rows)]
    wanted = [left > right + duplicates.CLEAR for row in cells for left, right in pairwise(row)]
    assert np.unpackbits(signs.view(np.uint8)).astype(bool).tolist() == wanted
    assert thumbs[0, :3].tolist() == pytest.approx(image[:17, :17].mean((0, 1)).tolist(), abs=0.51)


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_groups_are_those_of_comparing_every_pair(seed: int):
    """Between what is surely found (3 signs) and what counts as near at most (7)."""
    rng = np.random.default_rng(seed)
    signs = rng.integers(0, 2**64, 12, dtype=np.uint64)[rng.integers(0, 12, 40)]
    for i in range(40):
        for bit in rng.integers(0, 64, rng.integers(0, 5)):
            signs[i] ^= np.uint64(1 << int(bit))
    thumbs = np.clip(rng.integers(0, 240, (1, 48)) + rng.integers(0, 18, (40, 48)), 0, 255).astype(np.uint8)
    together = duplicates.groups(signs, thumbs)[:, None] == duplicates.groups(signs, thumbs)[None]
    alike = np.abs(thumbs[:, None].astype(int) - thumbs[None].astype(int)).max(2) <= duplicates.SHADES
    for bits, holds in ((3, lambda reach: (together | ~reach).all()), (duplicates.BITS, lambda reach: (reach | ~together).all())):
        near = alike & (np.bitwise_count(signs[:, None] ^ signs[None]) <= bits)
        assert holds(np.linalg.matrix_power(near.astype(float), 40) > 0)


def test_plain_pictures_of_other_colours_are_no_duplicates():
    images = np.stack([np.full((32, 32, 3), shade, np.uint8) for shade in (0, 0, 120, 240)])
    assert len(set(duplicates.groups(*duplicates.prints(images)).tolist())) == 3


def test_conflict_adds_up_the_words_that_duplicates_do_not_share():
    captions = ["a red dog", "A red dog!", "a blue cat", "alone", "two words"]
    found = duplicates.conflict(np.array([0, 0, 0, 1, 2]), captions)
    apart = 1 - 1 / 5  # {a} of {a, red, dog, blue, cat}
    assert found.tolist() == pytest.approx([apart, apart, 2 * apart, 0, 0])


def test_repeats_count_the_others_that_say_the_same():
    assert duplicates.repeats(["A dog.", "a  dog", "a cat", "a dog"]).tolist() == [2, 2, 0, 2]
