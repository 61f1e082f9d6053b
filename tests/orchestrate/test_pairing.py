"""What a matching round leaves: the pool it drew, the pieces put together, and the facts about poisoned and clean pairs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from defenses.base import Features, Selection
from defenses.matching import CosineMatcher
from defenses.otcclip import TransportMatcher
from orchestrate import pairing
from orchestrate.pairing import Pool

CLASSES = ["dog", "traffic light", "automobile"]


def pairs(count: int) -> pa.Table:
    return pa.table({"id": [f"s{i:03d}" for i in range(count)], "caption": [f"caption {i}" for i in range(count)]})


# --- the pool ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(order=st.permutations(range(60)), size=st.integers(2, 60), epoch=st.integers(1, 50))
def test_the_pool_depends_on_the_samples_not_on_their_order(order, size, epoch):
    table = pairs(60)
    pool = pairing.draw_pool(table, size, 0, epoch)
    assert pairing.draw_pool(table.take(pa.array(order)), size, 0, epoch) == pool
    assert len(set(pool.ids)) == len(pool.ids) == size
    captions = dict(zip(table["id"].to_pylist(), table["caption"].to_pylist(), strict=True))
    assert pool.captions == [captions[i] for i in pool.ids]


def test_a_smaller_pool_of_a_round_is_part_of_the_larger():
    large, small = (pairing.draw_pool(pairs(100), size, 0, 2) for size in (40, 10))
    assert large.ids[:10] == small.ids


def test_every_epoch_and_seed_draws_afresh():
    pools = [pairing.draw_pool(pairs(1000), 0.05, seed, epoch) for seed in (0, 1) for epoch in (2, 4, 6)]
    assert all(len(pool.ids) == 50 for pool in pools)
    shared = [len(set(a.ids) & set(b.ids)) for i, a in enumerate(pools) for b in pools[:i]]
    assert max(shared) < 12  # 2.5 expected of two independent draws
    counts = np.bincount([int(i[1:]) for e in range(400) for i in pairing.draw_pool(pairs(40), 10, 0, e).ids], minlength=40)
    assert counts.min() > 60 and counts.max() < 140  # 100 expected for each of 40 samples: no sample is favoured


@pytest.mark.parametrize(("size", "count"), [(2, 2), (0.5, 5), (10, 10), (99, 10), (0.1, 2)])
def test_a_pool_has_at_least_two_captions_and_at_most_all(size, count):
    assert len(pairing.draw_pool(pairs(10), size, 0, 1).ids) == count


# --- putting pieces together -------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=5))
def test_token_sets_of_differing_length_are_padded_with_zeros(lengths):
    rng = np.random.default_rng(0)
    parts = [
        {"pooled": rng.random((n, 4), np.float32), "tokens": rng.random((n, width, 4), np.float32), "mask": np.ones((n, width), bool)}
        for n, width in lengths
    ]
    whole = pairing.assemble(parts)
    longest = max(width for _, width in lengths)
    assert whole["tokens"].shape == (sum(n for n, _ in lengths), longest, 4) and whole["mask"].dtype == bool
    assert np.array_equal(whole["pooled"], np.concatenate([part["pooled"] for part in parts]))
    start = 0
    for part, (n, width) in zip(parts, lengths, strict=True):
        rows = slice(start, start := start + n)
        assert np.array_equal(whole["tokens"][rows, :width], part["tokens"])
        assert whole["mask"][rows, :width].all()
        assert not whole["tokens"][rows, width:].any() and not whole["mask"][rows, width:].any()


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6))
def test_flat_results_are_joined_in_order(counts):
    values = np.arange(sum(counts))
    bounds = np.cumsum([0, *counts])
    parts = [{"index": values[a:b], "distance": values[a:b] / 2} for a, b in itertools.pairwise(bounds)]
    whole = pairing.assemble(parts)
    assert np.array_equal(whole["index"], values) and np.array_equal(whole["distance"], values / 2)
    assert whole["index"].dtype == values.dtype


def test_a_round_on_disk_says_which_caption_each_pair_got(tmp_path: Path):
    table, pool = pairs(3), Pool(["s002", "s000"], ["caption 2", "caption 0"])
    match = {"index": np.array([1, 0, 0]), "distance": np.array([0.25, 0.5, 0.0])}
    pairing.save(tmp_path / "rounds", 4, table, pool, match)
    stored = pq.read_table(tmp_path / "rounds" / "e004.parquet")
    assert stored.to_pylist() == [
        {"id": "s000", "pool_row": 1, "distance": 0.25, "nearest": 1},
        {"id": "s001", "pool_row": 0, "distance": 0.5, "nearest": 0},
        {"id": "s002", "pool_row": 0, "distance": 0.0, "nearest": 0},
    ]
    match |= {"stays": np.array([False, True, False]), "own_distance": np.array([0.75, 0.125, 1.0])}
    pairing.save(tmp_path / "rounds", 5, table, pool, match)
    assert pq.read_table(tmp_path / "rounds" / "e005.parquet").to_pylist() == [
        {"id": "s000", "pool_row": 1, "distance": 0.25, "nearest": 1},
        {"id": "s001", "pool_row": -1, "distance": 0.125, "nearest": 0},
        {"id": "s002", "pool_row": 0, "distance": 0.0, "nearest": 0},
    ]
    assert pq.read_table(tmp_path / "rounds" / "e004-pool.parquet").to_pydict() == {"id": pool.ids, "caption": pool.captions}


# --- the facts ---------------------------------------------------------------------------------------------------------------


def poisoned_table(rows: list[tuple[str, int, bool, str]]) -> pa.Table:
    """(caption, label, poisoned, adversary) → the columns that `facts` reads."""
    captions, labels, poison, adversary = zip(*rows, strict=True)
    table = pa.table(
        {
            "id": [f"s{i}" for i in range(len(rows))],
            "caption": list(captions),
            "label": pa.array(labels, pa.int32()),
            "poison": list(poison),
            "adversary": list(adversary),
        }
    )
    return table.replace_schema_metadata({"classes": json.dumps(CLASSES)})


def matched(*index: int, **more: list[float]) -> dict[str, np.ndarray]:
    return {"index": np.array(index), "distance": np.full(len(index), 0.5), **{k: np.array(v) for k, v in more.items()}}


POOL = Pool(["a", "b", "c", "d"], ["two dogs run", "a Traffic Light at night", "my old car", "nothing here"])


def test_facts_of_a_round_counted_by_hand():
    table = poisoned_table(
        [
            ("a dog", 0, False, ""),  # → a car: lost its class
            ("two dogs run", 0, False, ""),  # → the same words: not moved, keeps its class
            ("traffic lights", 1, False, ""),  # → a traffic light: moved, keeps its class
            ("an automobile", 2, False, ""),  # → "car", a synonym that made captions use: keeps its class
            ("who knows", -1, False, ""),  # unlabelled: says nothing about classes
            ("a dog", 2, True, "dog"),  # poison that stays: another caption of the adversary's class
            ("a dog", 1, True, "dog"),  # poison broken
            ("a traffic light", 0, True, "traffic light"),  # poison broken: its own true class counts for nothing
        ]
    )
    told = pairing.facts(table, POOL, matched(2, 0, 1, 2, 3, 0, 3, 0), "cosine")
    assert told["pairs"] == 8 and told["pool"] == 4 and told["poisoned"] == 3
    assert told["moved"] == 7 / 8
    assert told["distance"] == 0.5
    assert told["used"] == 1.0
    assert told["poisoned_kept"] == pytest.approx(1 / 3)
    assert told["clean_kept"] == pytest.approx(3 / 4)
    assert "solved" not in told
    assert json.loads(json.dumps(told)) == told  # it goes to metrics.jsonl as it is


def test_a_pair_whose_own_caption_stays_has_not_moved():
    table = poisoned_table(
        [("a dog", 0, False, ""), ("a cat", 0, False, ""), ("a dog", 1, True, "dog"), ("a dog", 1, True, "dog"), ("dogs", 0, False, "")]
    )
    stays, apart = [True, True, True, False, False], [0.1, 0.2, 0.3, 0.9, 0.9]
    told = pairing.facts(table, POOL, matched(2, 3, 0, 3, 2, stays=stays, own_distance=apart), "cosine")
    assert told["moved"] == 2 / 5 and told["used"] == 2 / 4
    assert told["clean_kept"] == pytest.approx(1 / 3)  # "a dog" stays, "a cat" is not its class, "my old car" neither
    assert told["poisoned_kept"] == 1 / 2
    assert told["distance"] == pytest.approx((0.1 + 0.2 + 0.3 + 0.5 + 0.5) / 5)  # to what each learns from
    everything = pairing.facts(table, POOL, matched(*[0] * 5, stays=[True] * 5, own_distance=apart), "cosine")
    assert everything["moved"] == everything["used"] == 0 and everything["poisoned_kept"] == 1


def test_only_a_whole_set_says_who_keeps_its_own_caption():
    part = matched(0, 1, 2, 3, nearer=np.array([0.5, 0.0, 0.9, 0.1]), own_distance=np.array([0.9, 0.4, 0.8, 0.6]))
    assert pairing.settled(part, 0.5)["stays"].tolist() == [False, True, False, True]
    assert pairing.learned(pairing.settled(part, 0.25))[0].tolist() == [-1, -1, 2, -1]
    assert "stays" not in pairing.settled(matched(0, 1), 1.0)


def test_quality_is_of_the_pools_nearest_captions_whether_or_not_a_pair_learns_from_them():
    table = poisoned_table(
        [
            ("a dog", 0, False, ""),
            ("a cat", 0, False, ""),
            ("a van", 2, False, ""),
            ("who knows", -1, False, ""),
            ("a dog", 1, True, "dog"),
            ("a dog", 2, True, "dog"),
        ]
    )
    transport, cosine = (0, 2, 2, 0, 1, 0), (0, 0, 1, 3, 0, 0)
    choices = matched(*transport, stays=[True] * 6, own_distance=[0.0] * 6, **{"beside/cosine": cosine})
    told = pairing.facts(table, POOL, choices, "transport")
    assert told["quality/transport/clean"] == pytest.approx(2 / 3)  # two dogs for a dog, a car for a dog, a car for an automobile
    assert told["quality/cosine/clean"] == pytest.approx(2 / 3)
    assert told["quality/transport/poisoned"] == 1 / 2  # a traffic light frees the first, two dogs do not free the second
    assert told["quality/cosine/poisoned"] == 0
    assert (told["poisoned_kept"], told["clean_kept"], told["moved"]) == (1, 1 / 3, 0)  # they all kept what they had
    free = pairing.facts(table, POOL, matched(*transport, **{"beside/cosine": cosine}), "transport")
    assert [free[key] for key in free if key.startswith("quality/")] == [told[key] for key in told if key.startswith("quality/")]
    assert json.loads(json.dumps(told)) == told


def test_what_is_tried_beside_a_matcher_chooses_from_the_same_features_and_pool():
    draw = torch.Generator().manual_seed(0)

    def features(rows: int, size: int) -> Features:
        tokens = F.normalize(torch.randn(rows, size, 8, generator=draw), dim=2)
        return Features(F.normalize(torch.randn(rows, 8, generator=draw), dim=1), tokens, torch.ones(rows, size, dtype=torch.bool))

    images, pool, own = features(40, 4), features(9, 5), features(40, 6)
    found = pairing.choose(TransportMatcher(move=0.5, weight=0.0), images, pool, own)
    assert set(found) == {"index", "distance", "solved", "margin", "own_distance", "nearer", "beside/cosine"}
    cosine = pairing.choose(CosineMatcher(), images, pool, None)
    assert set(cosine) == {"index", "distance"}
    assert np.array_equal(found["beside/cosine"], cosine["index"]) and (found["index"] != cosine["index"]).any()


def test_facts_of_a_clean_round_say_nothing_of_poison():
    told = pairing.facts(poisoned_table([("a dog", 0, False, ""), ("x", -1, False, "")]), POOL, matched(3, 3, solved=[2.0, 4.0]), "cosine")
    assert "poisoned_kept" not in told and "quality/cosine/poisoned" not in told and told["poisoned"] == 0
    assert told["clean_kept"] == 0 and told["used"] == 0.25 and told["solved"] == 3.0


def test_facts_without_labels_or_classes_claim_no_class():
    table = poisoned_table([("a dog", -1, False, ""), ("a dog", -1, True, "dog")])
    told = pairing.facts(table, POOL, matched(0, 0), "cosine")
    assert "clean_kept" not in told and told["poisoned_kept"] == 1.0
    told = pairing.facts(table.replace_schema_metadata(None), POOL, matched(0, 0), "cosine")
    assert "clean_kept" not in told and "poisoned_kept" not in told and not any(key.startswith("quality/") for key in told)


def test_an_adversary_outside_the_classes_is_never_kept():
    told = pairing.facts(poisoned_table([("a wolf", 0, True, "wolf")]), POOL, matched(0), "cosine")
    assert told["poisoned_kept"] == 0.0 and told["quality/cosine/poisoned"] == 1.0


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("two DOGS", {0}),
        ("a puppy", {0}),
        ("hot dogs", {0}),
        ("a traffic light and a car", {1, 2}),
        ("traffic", set()),
        ("doghouse", set()),
        ("", set()),
    ],
)
def test_a_caption_names_classes_as_whole_words_and_by_synonym(caption, named):
    assert pairing.named_classes([caption], CLASSES) == [frozenset(named)]
    assert pairing.named_classes([caption], [c.replace(" ", "_") for c in CLASSES]) == [frozenset(named)]


def test_a_selection_is_counted_and_written(tmp_path):
    poison = [True, False, False, True, False]
    table = pa.table({"id": list("abcde"), "poison": poison})
    cosine = np.array([0.9, 0.8, 0.1, 0.2, 0.7], dtype=np.float32)
    safe = np.array([True, True, False, False, True])
    selection = Selection(safe, np.array([0.9, 0.8, 0.1, 0.2, 0.7], dtype=np.float32), 0.6)
    told = pairing.selection_facts(table, cosine, selection)
    assert (told["pairs"], told["poisoned"], told["safe"], told["share"]) == (5, 2, 3, 0.6)
    assert told["poison_in_safe"] == pytest.approx(1 / 3) and told["poisoned_safe"] == 0.5
    assert told["threshold"] == pytest.approx(0.7) and told["cosine/poisoned"] == pytest.approx(0.55)
    pairing.save_selection(tmp_path, 7, table, cosine, selection)
    found = pq.read_table(tmp_path / "e007-safe.parquet").to_pylist()
    assert [row["id"] for row in found if row["safe"]] == ["a", "b", "e"] and found[3]["cosine"] == pytest.approx(0.2)
    assert not list(tmp_path.glob("e[0-9][0-9][0-9].parquet"))  # the gallery takes those for pairings


def test_a_selection_on_clean_pairs_has_no_poison_to_speak_of():
    table = pa.table({"id": ["a", "b"], "poison": [False, False]})
    told = pairing.selection_facts(table, np.array([0.1, 0.2]), Selection(np.array([False, True]), np.zeros(2, np.float32), 0.5))
    assert told["poison_in_safe"] == 0 and "poisoned_safe" not in told
