"""What an audit writes: the clean set, which the reader takes as it took the first, and a page that nothing from data can break."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrate import audit, audit_clean, audit_model
from orchestrate.cli_audit import chosen
from orchestrate.data.index import Dataset, open_dataset
from orchestrate.recipe import Data
from orchestrate.recipes import get

from . import auditing, small


def opened(folder: Path, **more: object):
    return open_dataset(Data(path=str(folder), heldout=40, **more))


def cleaned(folder: Path, out: Path, gone: list[int], limit: float = 1.0, planted: bool = False, **more: object):
    dataset = opened(folder, **more)
    kept = ~np.isin(np.arange(dataset.train.num_rows), gone)
    out.mkdir(exist_ok=True)
    return dataset, kept, audit_clean.write(out, dataset.train, kept, dataset.heldout, limit, planted)


def test_the_clean_set_is_the_set_without_the_removed_rows(tmp_path: Path):
    folder = small.write(tmp_path / "set")
    dataset, kept, told = cleaned(folder, tmp_path / "out", [0, 49, 50, 119])
    assert told == {"clean": "clean", "why": ""}
    again = opened(tmp_path / "out" / "clean")
    ids = np.array(dataset.train["id"].to_pylist())
    assert again.train["id"].to_pylist() == ids[kept].tolist() and len(again.train) == 116
    assert again.heldout["id"].to_pylist() == dataset.heldout["id"].to_pylist() and again.classes == dataset.classes
    first, second = (pq.read_table(place / "train.parquet") for place in (folder, tmp_path / "out" / "clean"))
    assert first.filter(pa.array(kept)).equals(second)


def test_what_cannot_be_copied_is_listed_with_the_reason(tmp_path: Path):
    folder = small.write(tmp_path / "set")
    reasons = {}
    for name, how in (("planted", {"planted": True}), ("large", {"limit": 1e-6})):
        dataset, kept, told = cleaned(folder, tmp_path / name, [3, 4], **how)
        reasons[name] = told["why"]
        assert pq.read_table(tmp_path / name / told["clean"])["id"].to_pylist() == dataset.train["id"].filter(pa.array(kept)).to_pylist()
        assert not (tmp_path / name / "clean").exists()
    assert "no file holds it" in reasons["planted"] and "above --copy-gb 1e-06" in reasons["large"]
    rows = pq.read_table(folder / "train.parquet")
    captions = pa.array([[caption, f"another {caption}"] for caption in rows["caption"].to_pylist()])
    pq.write_table(rows.append_column("captions", captions), folder / "train.parquet")
    assert "one a caption" in cleaned(folder, tmp_path / "several", [3], captions="every")[2]["why"]


def test_the_page_escapes_all_that_comes_from_data_and_loads_nothing(tmp_path: Path):
    auditing.write(tmp_path / "audit.html")
    text = (tmp_path / "audit.html").read_text()
    assert "<script" not in text and 'onerror="x' not in text
    assert text.count("&lt;script&gt;") > 20
    assert set(re.findall(r'(?:src|href)="([^":]*:)', text)) == {"data:"} and "http:" not in text and "https:" not in text
    assert "default-src 'none'" in text


def source(name: str):
    return lambda overrides: get(name, overrides)


def test_an_audit_goes_by_a_set_or_by_a_recipe(tmp_path: Path):
    own = chosen("data=some/where", ["data.caption_column=text"], source)
    assert (own.data.path, own.data.caption_column, own.data.heldout, own.attack) == ("some/where", "text", 0.05, None)
    assert chosen("clip-badnets", ["attack.count=5"], source).attack.use == "badnets"
    with pytest.raises(ValueError, match="use --epochs"):
        chosen("data=x", ["train.epochs=3"], source)
    with pytest.raises(ValueError, match="names 4 recipes"):
        chosen("demo", [], source)


def test_pairs_cut_from_the_training_files_are_known_to_be(tmp_path: Path):
    folder = small.write(tmp_path / "set")
    assert not opened(folder).carved
    (folder / "test.parquet").unlink()
    assert opened(folder).carved
    assert json.loads((folder / "classnames.json").read_text()) == small.CLASSES


def test_a_folder_takes_one_audit(tmp_path: Path):
    plan = {"pairs": 3, "weights": "a", "attack": None}
    audit._claim(tmp_path / "parts", plan)
    audit._claim(tmp_path / "parts", plan)
    with pytest.raises(ValueError, match="other data, another model or another seed"):
        audit._claim(tmp_path / "parts", {**plan, "weights": "b"})


@pytest.mark.parametrize(("pairs", "asked", "epochs"), [(120, 0, 8), (30_000, 0, 4), (1_000_000, 0, 2), (120, 5, 5)])
def test_the_young_model_stops_early_the_earlier_the_more_pairs(tmp_path: Path, pairs: int, asked: int, epochs: int):
    recipe = get("roclip-badnets")[0].recipe
    train = pa.table({"id": pa.nulls(pairs, pa.string())})
    young = audit_model.young(recipe, Dataset("set", train, train, [], ()), tmp_path, asked)
    assert young.train.epochs == epochs and young.attack == recipe.attack
    assert young.cluster.runs == str(tmp_path / "model") and young.track.uri == "none"


def test_options_that_cannot_be_meant_are_refused():
    with pytest.raises(ValueError, match="--batch 32"):
        audit.Options(batch=32)
    with pytest.raises(ValueError, match="leave it out, or --checkpoint"):
        audit.Options(checkpoint="model", epochs=3)
