"""Several attacks side by side: apart, each under its own name, and replayed from the file alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from attacks.backdoor import BadNets, Blended, Stripes
from attacks.base import Manifest, Probes, manifest
from attacks.combine import Several, rebuild
from attacks.targeted import Targeted

CLASSES: dict[str, Any] = {"Targeted": Targeted, "BadNets": BadNets, "Stripes": Stripes, "Blended": Blended}
PARTS = Several(
    (
        ("targeted", Targeted(targets=4, copies=10)),
        ("badnets", BadNets(count=300, place="random")),
        ("second", BadNets(count=0.2, place="center")),
        ("blended", Blended(count=60)),
    )
)


def test_parts_do_not_overlap_and_keep_their_counts(index: pa.Table, heldout: pa.Table) -> None:
    rows = PARTS.plan(index, heldout, 0).table.to_pylist()
    ids = [row["id"] for row in rows]
    assert len(ids) == len(set(ids)) == 40 + 300 + 240 + 60  # a share is one of the whole set, whatever came before
    assert [row["stamp"] for row in rows] == [""] * 40 + ["badnets"] * 300 + ["second"] * 240 + ["blended"] * 60


def test_a_later_part_quotes_no_replaced_pair(index: pa.Table, heldout: pa.Table) -> None:
    parts = Several((("badnets", BadNets(count=500)), ("targeted", Targeted(targets=4, copies=30))))
    by_id = {row["id"]: row["caption"] for row in index.to_pylist()}
    rows = parts.plan(index, heldout, 0).table.to_pylist()
    replaced = {row["id"] for row in rows if row["op"] == "replace"}
    left = {caption for identifier, caption in by_id.items() if identifier not in replaced}
    quoted = {row["caption"] for row in rows if row["op"] == "add"} & set(by_id.values())
    assert quoted and quoted <= left


def test_header_holds_every_part(index: pa.Table, heldout: pa.Table) -> None:
    plan = PARTS.plan(index, heldout, 0)
    assert plan.header["attack"] == "targeted+badnets+second+blended"
    assert plan.header["seed"] == 0
    assert [(part["name"], part["attack"], part["count"]) for part in plan.header["parts"]] == [
        ("targeted", "Targeted", 40),
        ("badnets", "BadNets", 300),
        ("second", "BadNets", 240),
        ("blended", "Blended", 60),
    ]
    assert plan.header["parameters"]["second"]["place"] == "center"
    assert plan.count == 640 and plan.rate == pytest.approx(640 / 1240)
    assert sum(part["rate"] for part in plan.header["parts"]) == pytest.approx(plan.rate)


def test_probes_stand_under_the_parts_names(index: pa.Table, heldout: pa.Table) -> None:
    plan, probes = PARTS.plan(index, heldout, 0), PARTS.probes(index, heldout, 0)
    assert probes.how == {"targeted": "targeted", "badnets": "backdoor", "second": "backdoor", "blended": "backdoor"}
    rows = plan.table.to_pylist()
    for name in ("badnets", "second", "blended"):
        table = probes.tables[name]
        assert set(table["stamp"].to_pylist()) == {name}
        assert set(table["adversary"].to_pylist()) == {row["adversary"] for row in rows if row["stamp"] == name}
    targets = [(row["image_id"], row["adversary"]) for row in probes.tables["targeted"].to_pylist()]
    assert targets == list(dict.fromkeys((row["image_id"], row["adversary"]) for row in rows if row["op"] == "add"))


def test_one_part_alone_chooses_as_in_company(index: pa.Table, heldout: pa.Table) -> None:
    alone = Several((("targeted", Targeted(targets=4, copies=10)),)).plan(index, heldout, 0).table
    assert PARTS.plan(index, heldout, 0).table.slice(0, 40).equals(alone)


def test_stamps_replay_from_the_file(index: pa.Table, heldout: pa.Table, tmp_path: Path) -> None:
    path = str(tmp_path / "manifest.parquet")
    PARTS.plan(index, heldout, 0).write(path)
    read = Manifest.read(path)
    again = rebuild(read.header, CLASSES.__getitem__)
    assert again == PARTS
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    pairs = zip(read.table.to_pylist(), PARTS.plan(index, heldout, 0).table.to_pylist(), strict=True)
    looks = {}
    for stored, planned in pairs:
        stamped = again.stamp(image, stored)
        assert np.array_equal(stamped, PARTS.stamp(image, planned))
        looks[stored["stamp"]] = stamped
    assert np.array_equal(looks[""], image)
    assert not np.array_equal(looks["badnets"], looks["second"])


def test_two_targeted_parts_have_ids_of_their_own(index: pa.Table, heldout: pa.Table) -> None:
    parts = Several((("targeted", Targeted(targets=3, copies=4)), ("more", Targeted(targets=3, copies=4))))
    ids = parts.plan(index, heldout, 0).table["id"].to_pylist()
    assert len(set(ids)) == 24
    assert ids[0] == "poison-targeted-00-0000" and ids[12] == "poison-more-targeted-00-0000"


class Careless:
    """A plugin that forgets `free`: it replaces the same pairs whatever came before."""

    def plan(self, index: pa.Table, heldout: pa.Table, seed: int) -> Manifest:
        return BadNets(count=5).plan(index.select(["id", "caption", "label"]), heldout, 0)

    def stamp(self, image: np.ndarray, row: Any) -> np.ndarray:
        return image

    def probes(self, index: pa.Table, heldout: pa.Table, seed: int) -> Probes:
        return Probes()


def test_a_plugin_that_overlaps_is_caught(index: pa.Table, heldout: pa.Table) -> None:
    with pytest.raises(ValueError, match=r"'two' replaces 5 pair.*free\(index\)"):
        Several((("one", Careless()), ("two", Careless()))).plan(index, heldout, 0)


def test_errors_say_the_mend(index: pa.Table, heldout: pa.Table) -> None:
    with pytest.raises(ValueError, match="at least one part"):
        Several(())
    with pytest.raises(ValueError, match="give each its own"):
        Several((("a", BadNets()), ("a", Blended())))
    with pytest.raises(ValueError, match="this attack has targeted, badnets"):
        PARTS.stamp(np.zeros((8, 8, 3), np.uint8), {"stamp": "other", "image_id": "a"})
    with pytest.raises(ValueError, match="no parts"):
        rebuild(manifest(BadNets(), [], index, 0).header, CLASSES.__getitem__)
