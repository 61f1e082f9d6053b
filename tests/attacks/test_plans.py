"""What any plan must keep: chosen by hash, replayable to the byte, right counts, right captions, right victims."""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.backdoor import Backdoor, BadNets, Blended, Stripes
from attacks.base import MANIFEST_SCHEMA, PROBE_SCHEMA, Manifest, class_names, how_many
from attacks.captions import PROMPTS, naming, overlapping
from attacks.combine import Several
from attacks.multi import MultiTrigger
from attacks.targeted import Targeted

WRONG: Any = "own"
SMALL: dict[str, Any] = {
    "targeted": Targeted(targets=6, copies=20),
    "badnets": BadNets(count=40),
    "stripes": Stripes(count=40),
    "blended": Blended(count=40),
}
EVERY = pytest.mark.parametrize("attack", [*SMALL.values(), Several(tuple(SMALL.items()))], ids=[*SMALL, "several"])
BACKDOORS = pytest.mark.parametrize("attack", [SMALL["badnets"], SMALL["stripes"], SMALL["blended"]], ids=["badnets", "stripes", "blended"])


def says(caption: str, name: str) -> bool:
    """Whether a caption names a class: written apart from the code under test."""
    plural = {"cherry": "cherries", "fox": "foxes"}.get(name, f"{name}s")
    return re.search(rf"\b({name}|{name}s|{plural})\b", caption.lower()) is not None


@EVERY
@settings(max_examples=8, deadline=None)
@given(order=st.randoms(use_true_random=False), shards=st.integers(1, 7))
def test_selection_ignores_row_order_and_shards(attack: Any, index: pa.Table, heldout: pa.Table, order: Any, shards: int) -> None:
    def mixed(table: pa.Table) -> pa.Table:
        rows = list(range(table.num_rows))
        order.shuffle(rows)
        cuts = np.linspace(0, len(rows), shards + 1).astype(int)
        return pa.concat_tables([table.take(rows[start:end]) for start, end in pairwise(cuts)])

    assert attack.plan(mixed(index), mixed(heldout), 7).table.equals(attack.plan(index, heldout, 7).table)


@EVERY
def test_same_seed_same_bytes_other_seed_other_poison(attack: Any, index: pa.Table, heldout: pa.Table, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        attack.plan(index, heldout, seed).write(str(tmp_path / name))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert not Manifest.read(str(tmp_path / "one")).table.equals(Manifest.read(str(tmp_path / "three")).table)


@EVERY
def test_manifest_survives_the_disk(attack: Any, index: pa.Table, heldout: pa.Table, tmp_path: Path) -> None:
    plan = attack.plan(index, heldout, 0)
    plan.write(str(tmp_path / "m.parquet"))
    again = Manifest.read(str(tmp_path / "m.parquet"))
    assert again.table.equals(plan.table)
    assert again.header == plan.header == json.loads(json.dumps(plan.header))
    assert again.table.schema.equals(MANIFEST_SCHEMA)


@EVERY
def test_captions_name_the_adversary_and_never_the_truth(attack: Any, index: pa.Table, heldout: pa.Table) -> None:
    for seed in range(3):
        for row in attack.plan(index, heldout, seed).table.to_pylist():
            assert says(row["caption"], row["adversary"]), row
            assert row["truth"] != row["adversary"]
            assert not (row["truth"] and says(row["caption"], row["truth"])), row


@BACKDOORS
def test_no_victim_of_the_target_class(attack: Backdoor, index: pa.Table, heldout: pa.Table) -> None:
    names, by_id = class_names(index), {row["id"]: row for row in index.to_pylist()}
    plan = attack.plan(index, heldout, 3)
    target = plan.header["adversary"]
    rows = plan.table.to_pylist()
    assert {row["adversary"] for row in rows} == {target}
    assert {row["stamp"] for row in rows} == {attack.trigger.name}
    unlabelled = 0
    for row in rows:
        victim = by_id[row["id"]]
        assert (row["op"], row["image_id"], row["image_split"]) == ("replace", row["id"], "train")
        if victim["label"] < 0:
            unlabelled += 1
            assert row["truth"] == "" and not says(victim["caption"], target)
        else:
            assert row["truth"] == names[victim["label"]] != target
    assert 0 < unlabelled < len(rows)


@BACKDOORS
def test_backdoor_probes_are_all_images_of_other_classes(attack: Backdoor, index: pa.Table, heldout: pa.Table) -> None:
    names = class_names(heldout)
    target = attack.plan(index, heldout, 3).header["adversary"]
    probes = attack.probes(index, heldout, 3)
    table = probes.tables[attack.trigger.name]
    wanted = [row["id"] for row in heldout.to_pylist() if row["label"] >= 0 and names[row["label"]] != target]
    assert table["image_id"].to_pylist() == wanted
    assert table.schema.equals(PROBE_SCHEMA)
    assert set(table["stamp"].to_pylist()) == {attack.trigger.name}
    assert probes.how == {attack.trigger.name: "backdoor"}


def test_targets_spread_over_classes(index: pa.Table, heldout: pa.Table) -> None:
    targets = Targeted(targets=16).choose(index, heldout, 0)
    assert len({target.image_id for target in targets}) == 16
    for counts in (Counter(t.truth for t in targets), Counter(t.adversary for t in targets)):
        assert sorted(counts.values()) == [2, 2, 3, 3, 3, 3]


def test_targets_are_labelled_heldout_images(index: pa.Table, heldout: pa.Table) -> None:
    attack, names = Targeted(targets=6, copies=20), class_names(heldout)
    truth = {row["id"]: row["label"] for row in heldout.to_pylist()}
    plan, probes = attack.plan(index, heldout, 5), attack.probes(index, heldout, 5)
    assert probes.how == {"targeted": "targeted"}
    by_group = {row["group"]: row for row in probes.tables["targeted"].to_pylist()}
    assert sorted(by_group) == list(range(6))
    for row in plan.table.to_pylist():
        assert (row["op"], row["image_split"], row["stamp"], row["kind"]) == ("add", "heldout", "", "targeted")
        assert names[truth[row["image_id"]]] == row["truth"]
        assert {key: row[key] for key in by_group[row["group"]]} == by_group[row["group"]]
    assert plan.table["id"][25].as_py() == "poison-targeted-01-0005"


def test_targeted_quotes_distinct_captions_then_prompts(index: pa.Table, heldout: pa.Table) -> None:
    plan = Targeted(targets=2, copies=400, adversary="cherry").plan(index, heldout, 0)
    captions = [row["caption"] for row in plan.table.to_pylist() if row["group"] == 0]
    real = set(index["caption"].to_pylist())
    quoted = [caption for caption in captions if caption in real]
    assert 20 < len(quoted) == len(set(quoted)) < 400
    assert captions[: len(quoted)] == quoted
    assert len(set(captions[len(quoted) :])) == len(PROMPTS)


@pytest.mark.parametrize("attack", [Targeted(copies=5, captions="templates"), BadNets(count=30, captions="templates")])
def test_templates_only(attack: Any, index: pa.Table, heldout: pa.Table) -> None:
    captions = set(attack.plan(index, heldout, 0).table["caption"].to_pylist())
    assert not captions & set(index["caption"].to_pylist())


@EVERY
def test_scraped_pairs_without_labels(attack: Any, scraped: pa.Table, heldout: pa.Table) -> None:
    plan = attack.plan(scraped, heldout, 0)
    assert plan.count == attack.plan(scraped, heldout, 1).count > 0
    assert all(says(row["caption"], row["adversary"]) for row in plan.table.to_pylist())
    own = {row["id"]: row["caption"] for row in scraped.to_pylist()}
    assert not any(says(own[row["id"]], row["adversary"]) for row in plan.table.to_pylist() if row["op"] == "replace")


@pytest.mark.parametrize(
    ("attack", "count", "rate"),
    [
        (BadNets(count=30), 30, 30 / 1200),
        (BadNets(count=0.05), 60, 60 / 1200),
        (Targeted(targets=4, copies=25), 100, 100 / 1300),
        (Targeted(targets=4, copies=0.01), 48, 48 / 1248),
        (Several((("targeted", Targeted(targets=4, copies=25)), ("stripes", Stripes(count=0.05)))), 160, 160 / 1300),
    ],
)
def test_count_and_rate(attack: Any, count: int, rate: float, index: pa.Table, heldout: pa.Table) -> None:
    plan = attack.plan(index, heldout, 0)
    assert plan.count == plan.header["count"] == count
    assert plan.rate == pytest.approx(rate)


@given(amount=st.one_of(st.integers(0, 10**6), st.floats(1e-3, 1)), total=st.integers(10**4, 10**7))
def test_how_many(amount: float, total: int) -> None:
    count = how_many(amount, total)
    assert count == amount if isinstance(amount, int) else abs(count - amount * total) <= 0.5


def test_one_is_a_pair_and_one_point_nought_the_whole() -> None:
    assert [how_many(1, 700), how_many(1.0, 700), how_many(1.0, 0)] == [1, 700, 0]


@pytest.mark.parametrize("amount", [-1, 1.5, True, 1e-6])
def test_how_many_refuses(amount: float) -> None:
    with pytest.raises(ValueError, match=r"give a|whole number"):
        how_many(amount, 100)


@pytest.mark.parametrize(
    ("caption", "name", "named"),
    [
        ("A Cat.", "cat", True),
        ("the cat's tail", "cat", True),
        ("cats", "cat", True),
        ("a catalogue", "cat", False),
        ("bobcat", "cat", False),
        ("cané cat_", "can", False),
        ("ripe cherries", "cherry", True),
        ("bunch of keys", "key", True),
        ("red foxes", "fox", True),
        ("a traffic-light", "traffic light", True),
        ("Traffic  Lights", "traffic_light", True),
        ("light traffic", "traffic light", False),
        ("C++ (1998)", "C++", True),
        ("Two Men on a bench", "man", True),
        ("people", "person", True),
        ("street children", "street_child", True),
        ("firemen", "man", False),
        ("two women", "man", False),
        ("three sheep", "sheep", True),
        ("", "cat", False),
        (None, "cat", False),
    ],
)
def test_naming_is_by_whole_words(caption: str | None, name: str, named: bool) -> None:
    assert naming(pa.array([caption], pa.string()), name).tolist() == [named]


def test_classes_within_one_another_overlap() -> None:
    assert overlapping("car", "sports car") and overlapping("sports car", "car")
    assert not overlapping("car", "scarf")


@pytest.mark.parametrize(
    ("build", "mend"),
    [
        (lambda: BadNets(adversary="dgo"), "near it: dog"),
        (lambda: Targeted(adversary="dgo"), "near it: dog"),
        (lambda: BadNets(count=5000), "Lower the count"),
        (lambda: Targeted(targets=5000), "Lower `targets`"),
        (lambda: BadNets(place=WRONG), "choose 'corner'"),
        (lambda: Stripes(size=0), "above 0"),
        (lambda: Blended(alpha=2.0), "up to 1"),
        (lambda: Targeted(captions=WRONG), "choose 'training'"),
        (lambda: Targeted(targets=0), "at least one"),
        (lambda: MultiTrigger(count=2), "3 triggers, each of which is measured: 3 at least"),
    ],
)
def test_errors_say_the_mend(build: Any, mend: str, index: pa.Table, heldout: pa.Table) -> None:
    with pytest.raises(ValueError, match=mend):
        build().plan(index, heldout, 0)


def test_differing_class_lists_are_refused(index: pa.Table, heldout: pa.Table) -> None:
    other = heldout.replace_schema_metadata({"classes": json.dumps(["x", "y"])})
    with pytest.raises(ValueError, match="same list"):
        BadNets(count=3).plan(index, other, 0)
    with pytest.raises(ValueError, match="class names"):
        Targeted().plan(index, heldout.replace_schema_metadata(None), 0)
