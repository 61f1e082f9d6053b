"""A planted trigger and a planted word are found, and nothing is where nothing was planted."""

from __future__ import annotations

import math

import numpy as np
import pytest

from orchestrate import audit_cause


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 24, 24, 3), dtype=np.uint8)


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.astype(float).mean(0), (x.astype(float) ** 2).mean(0)


def test_the_box_holds_the_patch_and_no_more():
    everything = images(600)
    some = everything[:30].copy()
    some[:, 18:22, 17:23] = (255, 0, 255)
    found = audit_cause.trigger(some, *moments(everything))
    assert found is not None and found.box == (18, 17, 22, 23)
    assert found.share == pytest.approx(4 * 6 / 24**2)
    assert found.mean[20, 20].tolist() == [255, 0, 255]


def test_without_a_trigger_no_box_is_drawn():
    everything = images(600)
    found = audit_cause.trigger(everything[:30], *moments(everything))
    assert found is not None and found.box is None and found.share == 0


def test_few_images_show_themselves_and_no_trigger():
    assert audit_cause.trigger(images(7), *moments(images(100))) is None


def test_the_planted_word_comes_first_and_common_words_do_not_come():
    captions = [f"a photo of a {'dog' if i % 2 else 'cat'}" for i in range(400)]
    for i in range(0, 40, 2):
        captions[i] = "a photo of a banana"
    found = audit_cause.words(captions, np.arange(0, 40, 2))
    assert [word.text for word in found] == ["banana"]
    assert (found[0].here, found[0].of, found[0].everywhere, found[0].pairs) == (20, 20, 20, 400)
    assert audit_cause.words(captions, np.arange(100, 140)) == []


def test_captions_share_a_word_of_those_that_fit_least():
    captions = ["a cat asleep"] * 60 + ["a dog"] * 20 + ["a dog outside"] * 20
    misfit = np.zeros(100)
    misfit[78:83] = 1  # 5 % of the pairs, dogs all
    found = audit_cause.shared(captions, misfit)
    assert (found[:60] == 0).all() and (found[60:] > 1.5).all()
    # all five hold "dog", as 40 of 100 do: (5 - 5 * .4) / sqrt(5 * .4 * .6 + 1); three of them "outside", as 20 do
    assert found[60] == pytest.approx(3 / math.sqrt(2.2))
    assert found[80] == pytest.approx(max(3 / math.sqrt(2.2), (3 - 1) / math.sqrt(5 * 0.2 * 0.8 + 1)))
