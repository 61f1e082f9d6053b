"""From a recipe to what training reads: the poisoned table, the order of samples, their keys, and what cannot be read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.apply import ADDED
from attacks.base import Manifest
from defenses.base import Defense
from defenses.roclip import RoCLIP
from orchestrate import prepared, reading
from orchestrate.data import reader
from orchestrate.data.index import Dataset, open_dataset
from orchestrate.recipe import Recipe

from . import small


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Recipe:
    return small.recipe(folder)


@pytest.fixture(scope="module")
def dataset(recipe: Recipe) -> Dataset:
    return open_dataset(recipe.data)


# --- the plan ----------------------------------------------------------------------------------------------------------------


def test_the_table_is_the_index_with_the_manifest_on_it(recipe, dataset):
    ready = prepared.plan(recipe, dataset)
    table, manifest = ready.table, ready.manifest
    assert table.num_rows == 120 + 12 and pc.sum(table["poison"]).as_py() == manifest.count == 12 + 20
    assert manifest.rate == 32 / 132
    rows = {row["id"]: row for row in table.to_pylist()}
    for planned in manifest.table.to_pylist():
        assert rows[planned["id"]]["poison"]
        assert {k: rows[planned["id"]][k] for k in ("caption", "stamp", "image_id")} == {
            k: planned[k] for k in ("caption", "stamp", "image_id")
        }
    clean = table.filter(pc.invert(table["poison"])).select(dataset.train.column_names)
    untouched = dataset.train.filter(pc.invert(pc.is_in(dataset.train["id"], value_set=manifest.table["id"].combine_chunks())))
    assert clean.equals(untouched)


def test_the_plan_changes_with_the_recipes_seed_and_nothing_else(recipe, dataset):
    again = prepared.plan(dataclasses.replace(recipe, name="other"), dataset)
    assert again.manifest.table.equals(prepared.plan(recipe, dataset).manifest.table)
    assert not prepared.plan(dataclasses.replace(recipe, seed=1), dataset).manifest.table.equals(again.manifest.table)


def test_without_attack_the_table_is_the_index_and_nothing_is_probed(recipe, dataset):
    ready = prepared.plan(dataclasses.replace(recipe, attack=None), dataset)
    assert ready.manifest is None and not ready.probes.tables
    assert ready.table.select(dataset.train.column_names).equals(dataset.train)
    assert ready.table.column_names[-len(ADDED) :] == ADDED.names
    assert not any(ready.table["poison"].to_pylist()) and set(ready.table["stamp"].to_pylist()) == {""}


def test_a_set_without_classes_cannot_be_attacked_and_says_what_to_do(recipe, dataset):
    bare = dataclasses.replace(dataset, classes=[])
    with pytest.raises(ValueError, match=r"has no classes to attack: name some with data.classes=dog,cat,… or take attack=none"):
        prepared.plan(recipe, bare)
    assert prepared.plan(dataclasses.replace(recipe, attack=None), bare).table.num_rows == 120


def test_a_recipe_builds_its_methods(folder):
    assert prepared.build_attack(small.recipe(folder, attack="none")) is None
    assert type(prepared.build_defense(small.recipe(folder))) is Defense
    assert prepared.build_defense(small.recipe(folder, defense="roclip", defense__every=3)) == RoCLIP(every=3)
    assert [name for name, _ in prepared.build_attack(small.recipe(folder)).parts] == ["targeted", "stripes"]


def test_what_is_written_beside_a_run_is_what_was_planned(recipe, dataset, tmp_path):
    ready = prepared.plan(recipe, dataset)
    prepared.write(tmp_path, ready)
    assert Manifest.read(str(tmp_path / "manifest.parquet")).table.equals(ready.manifest.table)
    told = json.loads((tmp_path / "data.json").read_text())
    assert (told["train"], told["pairs"], told["heldout"], told["quarantined"]) == (120, 132, 40, 0)
    assert told["classes"] == small.CLASSES and told["fingerprint"] == ready.fingerprint
    assert pq.read_table(tmp_path / "quarantine.parquet").equals(dataset.quarantine)


def test_rows_for_the_probe_are_labelled_clean_and_chosen_by_hash(dataset):
    unknown = dataset.train.set_column(
        dataset.train.schema.get_field_index("label"), "label", pa.array([-1 if i % 3 == 0 else i % 4 for i in range(120)], pa.int32())
    )
    found = prepared.probe_rows(unknown, 30, 0)
    assert found.num_rows == 30 and min(found["label"].to_pylist()) >= 0
    backwards = unknown.take(pa.array(np.arange(120)[::-1].copy()))
    assert sorted(prepared.probe_rows(backwards, 30, 0)["id"].to_pylist()) == sorted(found["id"].to_pylist())
    assert prepared.probe_rows(unknown, 30, 1)["id"].to_pylist() != found["id"].to_pylist()
    assert prepared.probe_rows(unknown, 10**6, 0).num_rows == 80


# --- sizes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"defense": "safeclip", "train.epochs": 6}, "train.epochs=6 end before SafeCLIP matches or selects any pair"),
        ({"defense": "otcclip", "defense.warmup": 4, "train.epochs": 4}, "train.epochs=4 end before OTCCLIP matches or selects any pair"),
        ({"defense": "roclip", "defense.every": 9, "train.epochs": 3}, "or defense.every"),
        ({"defense": "hint", "evaluate.probe": False}, "HINT hardens the probe, which evaluate.probe=false leaves out"),
        ({"defense": "safeclip", "train.epochs": 7}, None),
        ({"defense": "cleanclip", "defense.batch": 64, "defense.clean": 60}, "the repair's batch of 64 .* and its 60 trusted pairs"),
        (
            {"defense": "cleanclip", "defense.batch": 3, "cluster.workers": 4},
            "the repair's batch of 3 must hold a pair for each of cluster.workers=4",
        ),
        ({"defense": "cleanclip", "defense.batch": 30, "cluster.workers": 4, "defense.clean": 0.5}, None),
        ({"defense": "cleanclip", "defense.batch": 32, "cluster.workers": 4, "defense.clean": 0.5}, None),
    ],
)
def test_a_stage_that_cannot_be_is_refused_before_training(folder, dataset, words, message):
    recipe = small.recipe(folder, **words)
    table = prepared.plan(recipe, dataset).table
    if message is None:
        prepared.check_size(recipe, table)
    else:
        with pytest.raises(ValueError, match=message):
            prepared.check_size(recipe, table)


def test_a_probe_that_nothing_can_harden_is_refused_and_not_passed_over(folder, dataset):
    recipe = small.recipe(folder, defense="hint")
    table = prepared.plan(recipe, dataset).table
    prepared.check_size(recipe, table)
    unknown = pa.array(np.full(table.num_rows, -1), pa.int32())
    with pytest.raises(ValueError, match="no class is known of"):
        prepared.check_size(recipe, table.set_column(table.column_names.index("label"), "label", unknown))


@pytest.mark.parametrize(
    ("batch", "workers", "accumulate", "message"),
    [
        (16, 1, 1, None),
        (16, 4, 4, None),
        (120, 2, 1, None),
        (121, 1, 1, "120 training pairs do not fill one batch of train.batch=121: lower it, or use more data."),
        (16, 3, 1, None),
        (16, 4, 8, "train.batch=16 is smaller than cluster.workers=4 × train.accumulate=8: each takes at least one pair."),
    ],
)
def test_a_batch_must_be_filled_and_have_a_pair_for_each(folder, dataset, batch, workers, accumulate, message):
    recipe = small.recipe(folder, train__batch=batch, cluster__workers=workers, train__accumulate=accumulate)
    if message is None:
        prepared.check_size(recipe, dataset.train)
    else:
        with pytest.raises(ValueError) as error:
            prepared.check_size(recipe, dataset.train)
        assert str(error.value) == message


def test_a_set_streams_when_it_would_not_fit(folder, dataset):
    bytes_held = 160 * small.SIDE**2 * 3
    assert not prepared.streams(small.recipe(folder), dataset)
    assert not prepared.streams(small.recipe(folder, data__memory_gb=(bytes_held + 1) / 1e9), dataset)
    assert prepared.streams(small.recipe(folder, data__memory_gb=(bytes_held - 1) / 1e9), dataset)
    assert prepared.streams(small.recipe(folder, data__stream="always"), dataset)
    assert not prepared.streams(small.recipe(folder, data__stream="never", data__memory_gb=0), dataset)


def test_images_are_kept_at_the_models_side_unless_another_is_named(folder):
    assert prepared.stored_side(small.recipe(folder, data__side=0)) == prepared.model_side(small.recipe(folder)) == 64
    assert prepared.stored_side(small.recipe(folder, data__side=0, model__image_size=96)) == 96
    assert prepared.stored_side(small.recipe(folder)) == small.SIDE


# --- what cannot be read -----------------------------------------------------------------------------------------------------


def unreadable(dataset: Dataset) -> list[tuple[str, str]]:
    _, errors = reader.load(dataset.train, small.SIDE)
    ids = dataset.train["id"].to_pylist()
    return [(ids[i], why) for i, why in errors]


def test_unreadable_images_are_left_out_and_recorded(tmp_path):
    dataset = open_dataset(small.recipe(small.write(tmp_path, broken=(3, 77))).data)
    bad = unreadable(dataset)
    assert [name for name, _ in bad] == ["train0003", "train0077"]
    found = prepared.without_unreadable(dataset, bad, 0.02)
    assert found.train.num_rows == 118 and not set(found.train["id"].to_pylist()) & {"train0003", "train0077"}
    assert found.heldout.equals(dataset.heldout) and found.train.schema.metadata == dataset.train.schema.metadata
    assert found.quarantine["id"].to_pylist() == ["train0003", "train0077"]
    told = list(zip(found.quarantine["path"].to_pylist(), found.quarantine["reason"].to_pylist(), strict=True))
    assert all("train.parquet" in path and "not an image" in why and "train.parquet" not in why for path, why in told)
    assert found.report[-1] == "2 images could not be read and are quarantined."
    assert reader.load(found.train, small.SIDE)[1] == []


def test_too_many_unreadable_images_stop_the_run_with_their_names(tmp_path):
    dataset = open_dataset(small.recipe(small.write(tmp_path, broken=(3, 77))).data)
    with pytest.raises(
        ValueError,
        match=r"2 of 160 rows cannot be used, more than data.max_bad=0.01 tolerates:\n.*row 3 \(id train0003\)(.|\n)*data.max_bad=0.013",
    ):
        prepared.without_unreadable(dataset, unreadable(dataset), 0.01)
    prepared.without_unreadable(dataset, unreadable(dataset), 0.013)


def test_images_that_fail_add_to_what_is_quarantined_already(tmp_path):
    """One tolerance for the whole set: rows without caption and images that cannot be read are counted together."""
    dataset = open_dataset(small.recipe(small.write(tmp_path, broken=(3,))).data)
    earlier = dataset.train.slice(0, 2)
    quarantine = reader.quarantined(earlier, [(0, "empty caption"), (1, "empty caption")])
    dataset = dataclasses.replace(dataset, train=dataset.train.slice(2), quarantine=quarantine)
    with pytest.raises(ValueError, match="3 of 160 rows"):
        prepared.without_unreadable(dataset, unreadable(dataset), 2.5 / 160)
    assert prepared.without_unreadable(dataset, unreadable(dataset), 3 / 160).quarantine.num_rows == 3


@settings(max_examples=30)
@given(lost=st.sets(st.integers(0, 159), max_size=40))
def test_whatever_is_lost_the_rest_stays_in_order(dataset, lost):
    ids = dataset.train["id"].to_pylist() + dataset.heldout["id"].to_pylist()
    found = prepared.without_unreadable(dataset, [(ids[i], "gone") for i in sorted(lost)], 1.0)
    assert found.train["id"].to_pylist() == [name for i, name in enumerate(ids[:120]) if i not in lost]
    assert found.heldout["id"].to_pylist() == [name for i, name in enumerate(ids[120:], 120) if i not in lost]
    assert found.quarantine.num_rows == len(lost)


def test_a_checked_set_is_not_checked_again(folder, dataset):
    recipe = small.recipe(folder)
    assert prepared.known_unreadable(recipe, dataset) is None
    prepared.remember_unreadable(recipe, dataset, [])
    assert prepared.known_unreadable(recipe, dataset) == []
    prepared.remember_unreadable(recipe, dataset, [("train0003", "gone")])
    assert prepared.known_unreadable(recipe, dataset) == [("train0003", "gone")]
    assert prepared.known_unreadable(small.recipe(folder, data__max_pixels=1000), dataset) is None
    assert prepared.known_unreadable(recipe, dataclasses.replace(dataset, train=dataset.train.slice(1))) is None


def test_who_only_evaluates_leaves_out_what_a_run_found_unreadable(tmp_path):
    recipe = small.recipe(small.write(tmp_path / "set"))
    dataset = prepared.readable(recipe)
    assert dataset.train.num_rows == 120
    prepared.remember_unreadable(recipe, dataset, [("train0003", "gone")])
    left = prepared.readable(recipe)
    assert "train0003" not in left.train["id"].to_pylist() and left.quarantine["reason"].to_pylist() == ["gone"]
    run_s = prepared.without_unreadable(dataset, [("train0003", "gone")], recipe.data.max_bad)
    assert prepared.plan_key(recipe, left) == prepared.plan_key(recipe, run_s)


def test_a_run_does_not_go_on_with_another_poison_than_it_began_with(tmp_path):
    folder = small.write(tmp_path / "set")
    recipe = small.recipe(folder)
    dataset = open_dataset(recipe.data)
    ready = prepared.plan(recipe, dataset)
    prepared.check_same_poison(tmp_path, ready)  # nothing there to differ from
    prepared.write(tmp_path, ready)
    prepared.check_same_poison(tmp_path, prepared.plan(recipe, dataset))
    with pytest.raises(ValueError, match=r"differs in \d+ of 32 pairs, such as .*data\.cache along.*--force"):
        prepared.check_same_poison(tmp_path, prepared.plan(small.recipe(folder, seed=1), dataset))
    parts = [part | {"materials": {"patch": "another"}} for part in ready.manifest.header["parts"]]
    painted = Manifest(ready.manifest.table, ready.manifest.header | {"parts": parts})
    with pytest.raises(ValueError, match="what its triggers look like"):
        prepared.check_same_poison(tmp_path, dataclasses.replace(ready, manifest=painted))


def test_a_refusal_from_an_earlier_check_names_the_file_it_came_from(folder, dataset):
    recipe = small.recipe(folder)
    known = [("train0003", "gone"), ("train0004", "gone")]
    told = r"2 of 160 rows cannot(.|\n)*earlier check(.|\n)*delete .*cache/checked-[0-9a-f]{16}-64000000.json"
    with pytest.raises(ValueError, match=told):
        prepared.without_known(recipe, dataset, known)
    assert prepared.without_known(small.recipe(folder, data__max_bad=0.1), dataset, known).train.num_rows == 118


@pytest.mark.parametrize(
    ("failed", "max_bad", "kept"),
    [
        ([], 0.01, []),
        ([(3, "not an image", True)], 0.01, [["train0003", "not an image"]]),
        ([(3, "not an image", True), (4, "time-out", False)], 0.1, None),
        ([(i, "access denied", False) for i in range(160)], 0.01, None),
        ([(i, "not an image", True) for i in range(160)], 0.01, None),
    ],
)
def test_a_check_of_a_streamed_set_is_kept_only_where_it_holds_for_good(tmp_path, monkeypatch, failed, max_bad, kept):
    """A store that was away for an hour must not stay away in the cache."""
    recipe = small.recipe(small.write(tmp_path), data__stream="always", data__max_bad=max_bad)
    dataset = open_dataset(recipe.data)
    monkeypatch.setattr(reading.cluster, "node_id", lambda: "here")
    monkeypatch.setattr(reading, "_decode", lambda *_: failed)
    if len(failed) > max_bad * 160:
        with pytest.raises(ValueError, match="160 of 160 rows cannot be used"):
            reading.read_images(recipe, dataset, streaming=True)
    else:
        readable, images = reading.read_images(recipe, dataset, streaming=True)
        assert images is None and readable.quarantine.num_rows == len(failed)
    files = [json.loads(file.read_text()) for file in (tmp_path / "cache").glob("checked-*.json")]
    assert files == ([] if kept is None else [kept])


def test_plans_are_shared_by_recipes_of_one_data_set_attack_and_seed(tmp_path):
    """Equal keys give equal plans, byte for byte; another seed, attack or set has a key of its own."""
    folder = small.write(tmp_path / "set")
    one = small.recipe(folder)
    dataset = open_dataset(one.data)
    alike = small.recipe(folder, defense="roclip", train__epochs=3, train__lr=0.1)
    assert prepared.plan_key(one, dataset) == prepared.plan_key(alike, dataset)
    assert prepared.plan(one, dataset).table.equals(prepared.plan(alike, dataset).table)
    for other in (small.recipe(folder, seed=1), small.recipe(folder, attack="badnets", attack__count=5)):
        assert prepared.plan_key(other, dataset) != prepared.plan_key(one, dataset)
    less = dataclasses.replace(dataset, train=dataset.train.slice(1))
    assert prepared.plan_key(one, less) != prepared.plan_key(one, dataset)
    audited = small.recipe(folder, data__exclude="audit", data__drop=0.05)
    assert prepared.plan_key(audited, dataset) == prepared.plan_key(one, dataset)
    assert prepared.plan(audited, dataset).table.equals(prepared.plan(one, dataset).table), "not known before there is an audit"
    assert prepared.needs(audited)[1] and not prepared.needs(small.recipe(folder, defense="clip"))[1]
