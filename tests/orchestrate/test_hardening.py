"""The probe on poisoned labels: what it learns from, what it trusts, and that the figures come out of the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from attacks.base import class_names
from defenses.hint import HINT
from models import clip, export
from orchestrate import cli, measure, prepared
from orchestrate.data.index import open_dataset
from orchestrate.hardening import hardening

from . import small


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_poison_is_labelled_as_the_adversary_says_and_nothing_trusted_is_poisoned(tmp_path: Path) -> None:
    recipe = small.recipe(small.write(tmp_path / "set"))
    table = prepared.plan(recipe, open_dataset(recipe.data, None)).table
    given = hardening(HINT(), table, 100, 0)
    assert given is not None and (given.rows.num_rows, given.valid.num_rows) == (100, 25)
    names = class_names(table)
    for row in given.rows.to_pylist():
        assert not row["poison"] or names[row["label"]] == row["adversary"]
    assert any(given.rows["poison"].to_pylist()) and not any(given.valid["poison"].to_pylist())
    assert not set(given.rows["id"].to_pylist()) & set(given.valid["id"].to_pylist())
    shuffled = table.take(torch.randperm(table.num_rows, generator=torch.Generator().manual_seed(0)).numpy())
    assert set(hardening(HINT(), shuffled, 100, 0).rows["id"].to_pylist()) == set(given.rows["id"].to_pylist())
    assert hardening(None, table, 100, 0) is None


@pytest.mark.parametrize("where", ["features", "pixels"])
def test_an_evaluation_tells_both_probes(where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = small.recipe(small.write(tmp_path / "set", heldout=24), data__heldout=24, attack="stripes", attack__count=30)
    cfg = clip.config("tiny-rn", 32)
    export.save(clip.build(cfg, seed=0), cfg, tmp_path / "model", "A card.")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.as_dict()))
    words = ["eval", str(tmp_path / "model"), "--recipe", str(tmp_path / "recipe.json"), "--out", str(tmp_path / "out.json")]
    words += ["defense=hint", f"defense.where={where}", "defense.steps=2", "evaluate.precision=fp32", "evaluate.probe_size=64"]
    assert cli.main(words) == 0
    assert "hint/plain/asr/stripes" in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())["antidote"]
    assert found["hint/learnt"] == 64 and 0 < found["hint/poisoned"] < 40
    for name in ("hint", "hint/plain"):
        assert found[f"{name}/asr/stripes/total"] == found["asr/stripes/total"] == 18
        assert found[f"{name}/asr/stripes"] == found[f"{name}/asr/stripes/hits"] / 18
        assert 0 <= found[f"{name}/top1"] <= 1
        right, tried = measure.counts(found, f"{name}/top1")
        assert tried == found["zeroshot/total"] and found[f"{name}/top1"] == right / tried
    assert found["hint/loss"] < found["hint/plain/loss"]
