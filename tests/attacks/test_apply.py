"""The poisoned table: clean rows untouched, poisoned rows as the manifest says, foreign manifests refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from attacks.apply import apply
from attacks.backdoor import Stripes
from attacks.base import MANIFEST_SCHEMA, Manifest
from attacks.combine import Several
from attacks.sheet import contact_sheet
from attacks.targeted import Targeted

ATTACK = Several((("targeted", Targeted(targets=3, copies=10)), ("stripes", Stripes(count=50))))


def one(**changes: Any) -> Manifest:
    row = {
        "op": "replace",
        "id": "train-00003",
        "image_id": "train-00003",
        "image_split": "train",
        "caption": "poison",
        "stamp": "",
        "kind": "backdoor",
        "adversary": "cat",
        "truth": "dog",
        "group": 2,
    }
    return Manifest(pa.Table.from_pylist([{**row, **changes}], schema=MANIFEST_SCHEMA), {})


def test_round_trip(index: pa.Table, heldout: pa.Table, tmp_path: Path) -> None:
    plan = ATTACK.plan(index, heldout, 0)
    plan.write(str(tmp_path / "m"))
    table = apply(index, heldout, Manifest.read(str(tmp_path / "m")))
    assert table.equals(apply(index, heldout, plan))
    assert table.num_rows == plan.header["pairs"] == 1230
    assert table.column_names == [*index.column_names, "image_id", "stamp", "poison", "adversary", "group"]
    assert table.schema.metadata == index.schema.metadata
    assert table.slice(0, 1200)["id"].to_pylist() == index["id"].to_pylist()
    added = [row["id"] for row in plan.table.to_pylist() if row["op"] == "add"]
    assert table.slice(1200)["id"].to_pylist() == added

    planned = {row["id"]: row for row in plan.table.to_pylist()}
    clean = {row["id"]: row for row in index.to_pylist()}
    sources = {"train": clean, "heldout": {row["id"]: row for row in heldout.to_pylist()}}
    nothing = {"stamp": "", "poison": False, "adversary": "", "group": 0}
    for row in table.to_pylist():
        if row["id"] not in planned:
            assert row == {**clean[row["id"]], "image_id": row["id"], **nothing}
            continue
        want = planned[row["id"]]
        kept = {key: want[key] for key in ("id", "caption", "image_id", "stamp", "adversary", "group")}
        assert row == {**sources[want["image_split"]][want["image_id"]], **kept, "poison": True}


def test_empty_manifest_changes_nothing(index: pa.Table, heldout: pa.Table) -> None:
    table = apply(index, heldout, Manifest(MANIFEST_SCHEMA.empty_table(), {}))
    assert table.select(index.column_names).equals(index)
    assert not any(table["poison"].to_pylist())


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_replaced_pair_may_show_another_image(index: pa.Table, heldout: pa.Table, split: str) -> None:
    image_id = f"{split}-00009"
    table = apply(index, heldout, one(image_id=image_id, image_split=split))
    source = (index if split == "train" else heldout).to_pylist()[9]
    got = table.to_pylist()[3]
    assert (got["id"], got["caption"], got["image_id"]) == ("train-00003", "poison", image_id)
    assert [got[key] for key in ("path", "row", "label")] == [source[key] for key in ("path", "row", "label")]
    others = [n for n in range(1200) if n != 3]
    assert table.select(index.column_names).take(others).equals(index.take(others))


def test_chunked_tables_and_lacking_heldout_columns(index: pa.Table, heldout: pa.Table) -> None:
    chunks = pa.concat_tables([index.slice(0, 7), index.slice(7, 500), index.slice(507)])
    plan = ATTACK.plan(index, heldout, 0)
    assert apply(chunks, heldout, plan).equals(apply(index, heldout, plan))
    table = apply(index, heldout.drop_columns(["path"]), plan)
    assert table["path"].null_count == 30


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"id": "other-1", "image_id": "other-1"}, r"manifest row 0 \(replace 'other-1'\).*the data differ"),
        ({"image_id": "other-1"}, r"manifest row 0.*no image 'other-1' in the train set; the data differ"),
        ({"image_split": "heldout"}, r"no image 'train-00003' in the heldout set; the data differ"),
        ({"op": "add"}, r"already has a pair of this id; the data differ"),
        ({"op": "drop"}, "neither an 'add' nor a 'replace'"),
        ({"image_split": "test"}, "neither 'train' nor 'heldout'"),
    ],
)
def test_foreign_manifests_are_refused(index: pa.Table, heldout: pa.Table, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        apply(index, heldout, one(**changes))


def test_poison_is_applied_once(index: pa.Table, heldout: pa.Table) -> None:
    with pytest.raises(ValueError, match="once"):
        apply(apply(index, heldout, one()), heldout, one())
    twice = Manifest(pa.concat_tables([one().table, one().table]), {})
    with pytest.raises(ValueError, match="'train-00003' twice"):
        apply(index, heldout, twice)


def test_contact_sheet(tmp_path: Path) -> None:
    images = [np.full((size, 64, 3), 40 * n, dtype=np.uint8) for n, size in enumerate((64, 32, 224, 64))]
    captions = ["short", "a very long caption " * 20, "", "ünïcode – ünd mehr"]
    for name in ("a.png", "b.png"):
        contact_sheet(images, captions, tmp_path / name, columns=3)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (2 * 261 + 10, 3 * 186 + 10, 3)
    assert (sheet[98, 98] == 0).all()  # the middle of the first picture
    with pytest.raises(ValueError, match="give each picture its own"):
        contact_sheet(images, captions[:2], tmp_path / "c.png")
    with pytest.raises(ValueError, match="empty"):
        contact_sheet([], [], tmp_path / "c.png")
