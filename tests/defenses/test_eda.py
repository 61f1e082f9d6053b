"""EDA: total on any text, repeatable by key, and no stronger than asked."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from defenses import text
from defenses.text import augment_captions, load_synonyms

CAPTION = "A big dog runs near the old house, by a red car in the snow."
WORDS = CAPTION.split()


def edits(caption: str, n: int = 400, strength: float = 0.1, **options) -> list[str]:
    return augment_captions([caption] * n, np.arange(n, dtype=np.uint64), strength, **options)


@given(st.lists(st.text(max_size=40), max_size=6), st.floats(0, 1), st.integers(0, 2**64 - 7))
@example(["", "   ", "123 !!", "dog", "Dog", "(dog)", "dog dog", "...", "ﬀ ẞ İ"], 1.0, 2**64 - 9)
@settings(max_examples=300, deadline=None)
def test_any_caption_comes_back_usable(captions, strength, key):
    keys = np.arange(len(captions), dtype=np.uint64) + np.uint64(key)
    out = augment_captions(captions, keys, strength)
    assert len(out) == len(captions)
    for before, after in zip(captions, out, strict=True):
        assert bool(after.strip()) == bool(before.strip())


def test_an_edit_depends_on_caption_and_key_alone():
    captions = [CAPTION, "two cats", "a tree on a hill", "123"] * 5
    keys = np.random.default_rng(0).integers(0, 2**64, 20, dtype=np.uint64)
    whole = augment_captions(captions, keys)
    assert whole == augment_captions(captions[:7], keys[:7]) + augment_captions(captions[7:], keys[7:])
    assert whole[::-1] == augment_captions(captions[::-1], keys[::-1])
    assert len(set(edits(CAPTION))) > 50  # another key, another edit


def test_all_four_operations_come_about_equally_often():
    longer = shorter = permuted = replaced = 0
    for out in edits(CAPTION, 2000, strength=0.25):
        words = out.split()
        longer += len(words) > len(WORDS)
        shorter += len(words) < len(WORDS)
        permuted += out != CAPTION and Counter(words) == Counter(WORDS)
        replaced += len(words) == len(WORDS) and Counter(words) != Counter(WORDS)
    assert all(400 < count < 600 for count in (longer, shorter, permuted, replaced))


@pytest.mark.parametrize("strength", [0.01, 0.1, 0.3, 1.0])
def test_no_more_words_change_than_asked(strength):
    allowed = max(1, int(strength * len(WORDS)))
    for out in edits(CAPTION, 300, strength):
        words = out.split()
        if len(words) > len(WORDS):
            assert len(words) == len(WORDS) + allowed
            assert not Counter(WORDS) - Counter(words)  # nothing lost
        elif len(words) == len(WORDS):
            moved = sum(a != b for a, b in zip(words, WORDS, strict=True))
            assert moved <= (2 if Counter(words) == Counter(WORDS) else 1) * allowed
        else:
            assert not Counter(words) - Counter(WORDS)  # nothing new


def test_deletion_drops_the_share_asked_for():
    rng = random.Random(0)
    left = [len(text._delete(["w"] * 20, [], rng, 0.3, {})) for _ in range(500)]
    assert abs(np.mean(left) / 20 - 0.7) < 0.02
    assert text._delete(["a", "b"], [], rng, 1.0, {}) in (["a"], ["b"])


def test_a_replacement_keeps_case_and_punctuation():
    seen = {out for out in edits("(Dog),", 100)}
    assert {"(Hound),", "(Canine),"} <= seen  # replaced
    assert {"hound (Dog),", "(Dog), hound"} <= seen  # inserted
    assert len(seen) == 6


def test_captions_that_nothing_can_change_come_back_as_they_are():
    for caption in ("", "  ", "xyzzy", "42", "日本語"):
        assert set(edits(caption, 20)) == {caption}


def test_strength_zero_is_the_identity():
    assert edits(" two  spaces ", 3, strength=0) == [" two  spaces "] * 3


def test_the_built_in_table_is_sound():
    table = load_synonyms()
    assert len(table) >= 300
    for word, others in table.items():
        assert word == word.lower().strip() and word.strip(text.PUNCTUATION)
        assert others and word not in others and len(set(others)) == len(others)
        assert all(word in table[other] for other in others)  # groups: each stands in for each


def test_a_table_can_be_given_by_path(tmp_path):
    path = tmp_path / "table.txt"
    path.write_text("# ours\nxyzzy, plugh , Plover  # a group\n\nalone\n", encoding="utf-8")
    assert load_synonyms(str(path)) == {
        "xyzzy": ("plugh", "plover"),
        "plugh": ("xyzzy", "plover"),
        "plover": ("xyzzy", "plugh"),
    }
    assert {"plugh", "plover"} <= set(edits("xyzzy", 50, synonyms=str(path)))


def test_bad_inputs_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no synonyms"):
        load_synonyms(str(tmp_path / "empty.txt"))
    with pytest.raises(ValueError, match="eda"):
        edits(CAPTION, 1, strength=1.5)
    with pytest.raises(ValueError, match="keys"):
        augment_captions([CAPTION], np.arange(2, dtype=np.uint64))
