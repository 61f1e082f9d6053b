"""Pixels are read one way: decoded, squared, and stamped where the row says so, whoever asks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.apply import apply
from orchestrate import prepared
from orchestrate.data import reader
from orchestrate.data.index import Dataset, open_dataset
from orchestrate.data.pixels import REFERENCE, Pixels, distinct
from orchestrate.recipe import Recipe

from . import small


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return small.recipe(small.write(tmp_path_factory.mktemp("set")))


@pytest.fixture(scope="module")
def dataset(recipe: Recipe) -> Dataset:
    return open_dataset(recipe.data)


@pytest.fixture(scope="module")
def ready(recipe: Recipe, dataset: Dataset) -> prepared.Prepared:
    return prepared.plan(recipe, dataset)


def decoded(dataset: Dataset, max_pixels: int = reader.MAX_PIXELS) -> tuple[np.ndarray, dict]:
    first, _ = distinct(pa.concat_tables([dataset.train, dataset.heldout]))
    images, errors = reader.load(first, small.SIDE, max_pixels)
    assert not errors
    images.setflags(write=False)  # as it comes from Ray's object store
    return images, prepared.places(first)


@pytest.fixture(scope="module")
def both(recipe: Recipe, dataset: Dataset, ready: prepared.Prepared) -> tuple[Pixels, Pixels]:
    """The poisoned table read from memory and read from its files."""
    images, where = decoded(dataset)
    attack = prepared.build_attack(recipe)
    held = prepared.pixels_of(recipe, attack, ready.table, images, prepared.place_of(ready.table, where))
    return held, prepared.pixels_of(recipe, attack, ready.table, None, None)


def test_memory_and_files_give_the_same_pixels(both):
    held, streamed = both
    every = np.arange(held.table.num_rows)
    assert np.array_equal(held.take(every), streamed.take(every))


@settings(max_examples=20)
@given(rows=st.lists(st.integers(0, 100), min_size=1, max_size=12))
def test_rows_come_in_the_order_asked_even_twice(both, rows):
    held, streamed = both
    one_by_one = np.concatenate([held.take(np.array([i])) for i in rows])
    assert np.array_equal(held.take(np.array(rows)), one_by_one)
    assert np.array_equal(streamed.take(np.array(rows)), one_by_one)


def test_only_rows_with_a_stamp_are_stamped_and_as_the_attack_does_it(recipe, ready, both):
    held, _ = both
    bare = Pixels(held.table, None, held.side, held.max_pixels, held.images, held.place)
    every = np.arange(held.table.num_rows)
    shown, plain = held.take(every), bare.take(every)
    changed = (shown != plain).reshape(len(every), -1).any(1)
    stamped = np.array([stamp != "" for stamp in held.table["stamp"].to_pylist()])
    assert stamped.sum() == 20 and np.array_equal(changed, stamped)
    attack = prepared.build_attack(recipe)
    for i in np.flatnonzero(stamped):
        row = held.table.slice(int(i), 1).to_pylist()[0]
        assert np.array_equal(shown[i], attack.stamp(plain[i].copy(), row))


def test_the_shared_array_is_never_written(both):
    held, _ = both
    before = held.images.copy()
    held.take(np.arange(held.table.num_rows))[:] = 0
    assert np.array_equal(held.images, before)


def test_a_pair_added_by_the_attack_shows_its_heldout_image(dataset, ready, both):
    held, _ = both
    rows = [i for i, row in enumerate(held.table["id"].to_pylist()) if row.startswith("poison-")]
    assert len(rows) == 12
    wanted = held.table["image_id"].take(pa.array(rows)).to_pylist()
    source = {name: i for i, name in enumerate(dataset.heldout["id"].to_pylist())}
    heldout, _ = reader.load(dataset.heldout, small.SIDE)
    assert np.array_equal(held.take(np.array(rows)), heldout[[source[name] for name in wanted]])


@pytest.mark.parametrize("streaming", [False, True])
def test_evaluation_reads_with_the_very_function_of_training(recipe, dataset, ready, both, streaming):
    """The same image under the same trigger is the same array in training, in matching and in a probe."""
    images, where = decoded(dataset)
    attack = prepared.build_attack(recipe)
    load = prepared.loader(recipe, attack, *((None, None) if streaming else (images, where)))
    stamped = ready.table.filter(pa.compute.not_equal(ready.table["stamp"], ""))
    at = [i for i, stamp in enumerate(ready.table["stamp"].to_pylist()) if stamp]
    assert np.array_equal(load(stamped), both[0].take(np.array(at)))
    clean = prepared.as_clean(dataset.heldout)
    assert np.array_equal(load(clean), reader.load(dataset.heldout, small.SIDE)[0])
    probes = ready.probes.tables["stripes"]
    rows = prepared.as_clean(dataset.heldout).set_column(
        clean.schema.get_field_index("stamp"), "stamp", pa.repeat(pa.scalar("stripes"), clean.num_rows)
    )
    shown = load(rows)
    assert probes.num_rows and (shown != load(clean)).reshape(len(shown), -1).any(1).all()


def test_an_image_that_vanishes_is_named(recipe, tmp_path: Path):
    folder = small.write(tmp_path / "set", 20, 8)
    dataset = open_dataset(small.recipe(folder, data__heldout=8).data)
    pixels = Pixels(prepared.as_clean(dataset.train), None, small.SIDE, reader.MAX_PIXELS)
    pixels.take(np.arange(20))
    (folder / "train.parquet").unlink()
    with pytest.raises(ValueError, match=r"could be read when the run began no longer can: .*train.parquet, row 3 \(id train0003\)"):
        pixels.take(np.array([3, 4]))


def test_an_image_larger_than_allowed_is_refused_unread(dataset):
    pixels = Pixels(prepared.as_clean(dataset.train), None, small.SIDE, 1000)
    with pytest.raises(ValueError, match=r"32 x 32 pixels are more than data.max_pixels=1000"):
        pixels.take(np.array([0]))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["", "tar"]), st.integers(0, 3), st.integers(1, 2)), max_size=40))
def test_distinct_images_are_the_first_rows_that_show_them(references):
    columns = list(zip(*references, strict=True)) or [()] * 4
    table = pa.table({**{name: list(values) for name, values in zip(REFERENCE, columns, strict=True)}, "at": list(range(len(references)))})
    first, place = distinct(table)
    keys = [tuple(row[name] for name in REFERENCE) for row in first.to_pylist()]
    assert len(set(keys)) == len(keys) == len(set(references))
    assert [keys[p] for p in place] == references
    assert first["at"].to_pylist() == [references.index(key) for key in keys]
    where = prepared.places(first)
    assert np.array_equal(prepared.place_of(table, where), place)


def test_pairs_that_share_an_image_are_decoded_once(dataset, ready):
    """Sixteen copies of a target, or five captions of a photo, are one image in memory."""
    first, place = distinct(pa.concat_tables([dataset.train, dataset.heldout, *[dataset.heldout] * 3]))
    assert first.num_rows == dataset.train.num_rows + dataset.heldout.num_rows
    assert len(place) == dataset.train.num_rows + 4 * dataset.heldout.num_rows
    assert apply(dataset.train, dataset.heldout, ready.manifest).equals(ready.table)
