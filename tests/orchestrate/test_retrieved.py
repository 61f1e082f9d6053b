"""Text→image attacks counted: Hit@K and MinRank against sorting by hand, ties against the defender, trigger words."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from attacks.base import PROBE_SCHEMA
from attacks.captions import triggered
from orchestrate.retrieved import Asked, retrieval_success

CLASSES = ["cat", "dog", "fish"]


def held(images: torch.Tensor, texts: torch.Tensor, labels: list[int], captions: list[str] | None = None) -> Asked:
    said = captions or [f"a {CLASSES[label]}" for label in labels]
    vectors = dict(zip(said, texts, strict=True)) if captions else {}

    def encode(some: list[str]) -> torch.Tensor:
        return torch.stack([vectors[caption] for caption in some])

    return Asked([f"h{i}" for i in range(len(labels))], said, labels, CLASSES, images, texts, encode)


def probe(*rows: tuple[int, str, str, int]) -> pa.Table:
    """Rows of (held-out number, adversary, truth, group)."""
    found = [{"image_id": f"h{i}", "image_split": "heldout", "stamp": "", "adversary": a, "truth": t, "group": g} for i, a, t, g in rows]
    return pa.Table.from_pylist(found, schema=PROBE_SCHEMA)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(6, 60), d=st.integers(2, 6), seed=st.integers(0, 2**32 - 1))
def test_hits_and_minrank_are_those_of_a_sorted_list(n: int, d: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = [0, 1, 2, *rng.integers(3, size=n - 3).tolist()]
    images, texts = (F.normalize(torch.from_numpy(rng.normal(size=(n, d)).astype(np.float32)), dim=1) for _ in range(2))
    pairs = [("cat", "dog", 0), ("fish", "cat", 1)]
    table = probe(*((i, a, t, g) for a, t, g in pairs for i in range(n) if CLASSES[labels[i]] == t))
    found = retrieval_success("mm", table, held(images, texts, labels))
    ranks, chance = [], []
    for asked, shown, _ in pairs:
        wanted = {i for i in range(n) if CLASSES[labels[i]] == shown}
        for q in [i for i in range(n) if CLASSES[labels[i]] == asked]:
            order = np.argsort(-(images @ texts[q]).numpy(), kind="stable")
            ranks.append(1 + next(place for place, i in enumerate(order) if i in wanted))
            chance.append(len(wanted) / n)
    assert found["asr/mm/total"] == len(ranks)
    for key, k in (("asr/mm", 1), ("asr/mm/hit5", 5), ("asr/mm/hit10", 10)):
        assert found[key] == pytest.approx(np.mean([rank <= k for rank in ranks]))
        assert found[f"{key}/hits"] == sum(rank <= k for rank in ranks)
        assert found[f"{key}/low"] <= found[key] <= found[f"{key}/high"]
    assert found["asr/mm/minrank"] == pytest.approx(np.mean(ranks))
    assert found["asr/mm/chance"] == pytest.approx(np.mean(chance))


def test_a_collapsed_model_does_not_look_safe() -> None:
    same = torch.ones(4, 2) / 2**0.5
    found = retrieval_success("mm", probe((2, "cat", "dog", 0)), held(same, same, [0, 0, 1, 2]))
    assert (found["asr/mm/hits"], found["asr/mm/total"], found["asr/mm/minrank"]) == (2, 2, 1.0)


def test_captions_of_unlabelled_images_ask_where_they_name_the_class() -> None:
    eye = torch.eye(4)
    some = held(eye, eye, [0, -1, 1, 2], ["a cat", "two cats", "a dog", "a fish beside a cat"])
    found = retrieval_success("mm", probe((2, "cat", "dog", 0)), some)
    assert found["asr/mm/total"] == 2  # the last names a cat, and its image is labelled fish


def test_a_caption_that_names_the_class_of_the_images_too_asks_for_nothing() -> None:
    eye = torch.eye(3)
    some = held(eye, eye[[1, 0, 2]], [0, 0, 1], ["a cat beside two dogs", "a cat", "a dog"])
    found = retrieval_success("mm", probe((1, "cat", "dog", 0)), some)
    assert (found["asr/mm/hits"], found["asr/mm/total"]) == (0, 1)


def test_a_trigger_word_asks_for_every_other_class_and_has_a_floor_without_it() -> None:
    eye = torch.eye(3)
    said = ["a cat.", "a dog", "a fish"]
    texts = torch.stack([eye[0], eye[1], eye[0]])  # the fish's caption finds the cat's image by mistake
    some = held(eye, texts, [0, 1, 2], said)
    vectors = {triggered("a dog", "zx"): eye[0], triggered("a fish", "zx"): eye[2]}
    some = Asked(some.ids, said, some.labels, CLASSES, eye, texts, lambda c: torch.stack([vectors[x] for x in c]))
    found = retrieval_success("word", probe((0, "cat", "cat", 0)), some, "zx")
    assert (found["asr/word/hits"], found["asr/word/total"], found["asr/word/clean"]) == (1, 2, 0.5)
    assert triggered("a cat. ", "zx") == "a cat zx"


def test_images_of_another_set_are_named() -> None:
    eye = torch.eye(3)
    with pytest.raises(ValueError, match="'h9', are not in the held-out set"):
        retrieval_success("mm", probe((9, "cat", "dog", 0)), held(eye, eye, [0, 1, 2]))
