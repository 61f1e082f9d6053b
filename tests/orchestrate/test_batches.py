"""The batches of an epoch: their order, who takes which part, the keys, and what a pairing puts in place of a caption."""

from __future__ import annotations

import threading

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrate import batches

WINDOWS = st.none() | st.tuples(st.integers(1, 90), st.integers(1, 30))


@given(rows=st.integers(1, 400), seed=st.integers(0, 2**40), epoch=st.integers(1, 99), window=WINDOWS)
def test_the_order_is_a_permutation_that_seed_and_epoch_fix(rows, seed, epoch, window):
    found = batches.order(rows, seed, epoch, window)
    assert np.array_equal(np.sort(found), np.arange(rows))
    assert np.array_equal(found, batches.order(rows, seed, epoch, window))


@pytest.mark.parametrize("window", [None, (64, 16)])
def test_another_epoch_or_seed_is_another_order(window):
    orders = [batches.order(500, seed, epoch, window) for seed in (0, 1, 2) for epoch in (1, 2, 3)]
    assert len({order.tobytes() for order in orders}) == 9
    assert all((order != np.arange(500)).mean() > 0.9 for order in orders)


@given(rows=st.integers(1, 500), chunk=st.integers(1, 40), chunks=st.integers(1, 6), epoch=st.integers(1, 9))
def test_a_window_touches_few_parts_of_a_file_and_each_part_once(rows, chunk, chunks, epoch):
    """What is read together lies together: a window of n chunks holds rows of n + 2 chunks at most, and no chunk is visited twice."""
    size = chunk * chunks
    part = batches.order(rows, 0, epoch, (size, chunk)) // chunk
    windows = [set(part[i : i + size]) for i in range(0, rows, size)]
    assert max(map(len, windows)) <= chunks + 2
    seen: dict[int, list[int]] = {}
    for number, chunks_here in enumerate(windows):
        for one in chunks_here:
            seen.setdefault(one, []).append(number)
    assert all(numbers[-1] - numbers[0] == len(numbers) - 1 <= 1 for numbers in seen.values())


def test_a_window_is_shuffled_inside():
    found = batches.order(4096, 0, 1, (1024, 128))
    assert (np.abs(np.diff(found)) == 1).mean() < 0.01


@given(st.permutations([f"s{i}" for i in range(40)]))
def test_a_samples_key_depends_on_its_id_and_the_seed_alone(ids):
    keys = dict(zip(ids, batches.sample_keys(pa.table({"id": ids}), 3).tolist(), strict=True))
    part = ids[7:19]
    assert batches.sample_keys(pa.table({"id": part}), 3).tolist() == [keys[i] for i in part]
    assert not set(batches.sample_keys(pa.table({"id": ids}), 4).tolist()) & set(keys.values())


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=50, unique=True), st.integers(1, 10_000), st.randoms())
def test_an_epochs_keys_are_new_numbers_that_no_other_sample_changes(keys, epoch, random):
    array = np.array(keys, np.uint64)
    found = dict(zip(keys, batches.epoch_keys(array, epoch).tolist(), strict=True))
    assert len(set(found.values())) == len(keys)
    shuffled = random.sample(keys, len(keys))
    assert batches.epoch_keys(np.array(shuffled, np.uint64), epoch).tolist() == [found[k] for k in shuffled]


def test_keys_of_different_epochs_have_nothing_in_common():
    keys = batches.sample_keys(pa.table({"id": [f"s{i}" for i in range(2000)]}), 0)
    epochs = np.stack([batches.epoch_keys(keys, epoch) for epoch in range(1, 9)])
    assert len(np.unique(epochs)) == epochs.size
    bits = (epochs[:, :, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    agreement = (bits[:-1] == bits[1:]).mean((1, 2))
    assert np.abs(agreement - 0.5).max() < 0.01


@pytest.mark.parametrize("world", range(1, 18))
def test_shares_cover_a_batch_once_and_differ_by_one_at_most(world):
    rows = [list(range(17))[batches.share(17, world, rank)] for rank in range(world)]
    assert [row for part in rows for row in part] == list(range(17))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1


# --- batches ---------------------------------------------------------------------------------------------------------------------

ROWS = st.lists(st.integers(0, 199), min_size=1, max_size=60, unique=True).map(lambda found: np.array(sorted(found)))


@given(rows=ROWS, batch=st.integers(1, 20), epoch=st.integers(1, 50), world=st.integers(1, 5), window=WINDOWS)
def test_workers_together_see_each_row_once_less_a_remainder(rows, batch, epoch, world, window):
    found = batches.drawn(rows, batch, 3, epoch, window)
    assert found.shape == (len(rows) // batch, batch) and len(np.unique(found)) == found.size and set(found.ravel()) <= set(rows)
    parts = [found[:, batches.share(batch, world, rank)] for rank in range(world)]
    assert np.array_equal(np.concatenate(parts, axis=1), found)


def test_the_remainder_is_another_one_each_epoch():
    left = [set(range(10)) - set(batches.drawn(np.arange(10), 4, 0, epoch).ravel()) for epoch in range(1, 21)]
    assert {len(some) for some in left} == {2} and set().union(*left) == set(range(10))


@given(rows=ROWS, batch=st.integers(1, 20), seed=st.integers(0, 9))
def test_safe_pairs_come_last_in_the_order_they_had(rows, batch, seed):
    safe = np.random.default_rng(seed).random(200) < 0.5
    plain, split = batches.drawn(rows, batch, seed, 1).ravel(), batches.drawn(rows, batch, seed, 1, safe=safe).ravel()
    assert split.tolist() == [*plain[~safe[plain]], *plain[safe[plain]]]


def test_a_pair_learns_from_its_own_caption_or_from_the_pools():
    captions, keys = np.array(["own 0", "own 1", "own 2", "own 3"], dtype=object), np.arange(4, dtype=np.uint64) + 10
    rows, pixels = np.array([3, 0, 2]), np.zeros((3, 2, 2, 3), np.uint8)
    plain = batches.examples(rows, pixels, captions, keys, {})
    assert plain.captions == ["own 3", "own 0", "own 2"] and plain.keys.tolist() == [13, 10, 12]
    assert plain.matched is None and plain.safe is None and plain.moved is None

    index, pool = np.array([-1, 0, 1, 0]), {"captions": ["pool 0", "pool 1"], "features": np.array([[0.0], [1.0]])}
    by_caption = batches.examples(rows, pixels, captions, keys, {"index": index, "matched": "caption", **pool})
    assert by_caption.captions == ["pool 0", "own 0", "pool 1"] and by_caption.moved.tolist() == [True, False, True]
    assert by_caption.matched is None
    by_features = batches.examples(rows[[0, 2]], pixels[:2], captions, keys, {"index": index, "matched": "embedding", **pool})
    assert by_features.matched.tolist() == [[0.0], [1.0]]

    chosen = batches.examples(rows, pixels, captions, keys, {"safe": np.array([True, False, False, True])})
    assert chosen.safe.tolist() == [True, True, False] and chosen.captions == plain.captions


def test_what_is_made_ahead_is_the_same_and_its_errors_are_raised():
    made, caller = [], threading.get_ident()

    def items():
        for i in range(5):
            made.append(threading.get_ident())
            yield i
        raise OSError("no more to read")

    found = batches.ahead(items())
    assert [next(found) for _ in range(5)] == [0, 1, 2, 3, 4] and caller not in made
    with pytest.raises(OSError, match="no more to read"):
        next(found)
