"""Repairing and certifying a checkpoint, from the command line, on real pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from defenses.cleanclip import CleanCLIP
from models import clip, export
from orchestrate import cli, prepared, repair
from orchestrate.data.index import open_dataset

from . import small


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory: a poisoned recipe and a model."""
    recipe = small.recipe(small.write(tmp_path / "set"), defense="roclip")
    folder = tmp_path / "run"
    cfg = clip.config("tiny-vit", 32)
    export.save(clip.build(cfg, seed=0), cfg, folder / "model", "A card.")
    (folder / "recipe.json").write_text(json.dumps(recipe.as_dict()))
    return folder


QUICK = ("defense.clean=0.5", "defense.epochs=3", "defense.batch=16", "defense.lr=1e-3", "defense.warmup=1", "evaluate.probe=false")


def test_a_runs_model_is_repaired_on_pairs_its_attack_leaves_alone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "repaired"
    assert cli.main(["repair", str(run), "--out", str(out), *QUICK]) == 0
    said = capsys.readouterr().out
    assert "asr/stripes" in said and "which this assumes to be free of poison" in said
    result = json.loads((out / "result.json").read_text())
    assert result["pairs"] == 50  # half of 120 less the 20 stamped ones
    assert result["before"]["asr/stripes/total"] == result["after"]["asr/stripes/total"] == 30
    assert len(result["losses"]) == 3 and result["losses"][-1] < result["losses"][0]
    mended, _ = export.load(out)
    poisoned, _ = export.load(run / "model")
    moved = [not torch.equal(a, b) for a, b in zip(mended.parameters(), poisoned.parameters(), strict=True)]
    assert all(np.array(moved)[[p.ndim > 1 for p in mended.parameters()]])
    card = (out / "README.md").read_text()
    assert "Poisoned on purpose" in card and "repaired by" in card and "before.asr/stripes" in card


def test_a_bare_checkpoint_is_repaired_on_a_set_of_ones_own(tmp_path: Path) -> None:
    weights = tmp_path / "their.pt"
    torch.save(clip.build("tiny-rn", seed=1).state_dict(), weights)
    data, out = small.write(tmp_path / "set", train=40, heldout=8), tmp_path / "out"
    words = ["repair", str(weights), "--model", "tiny-rn", "--clean", str(data), "--out", str(out), "data.heldout=8", "defense.epochs=1"]
    assert cli.main([*words, "defense.batch=16", "evaluate.probe=false"]) == 0
    result = json.loads((out / "result.json").read_text())
    assert (result["pairs"], result["attack"], result["trusted"]) == (40, "none", str(data))
    assert "zeroshot/top1" in result["before"] and not any(key.startswith("asr") for key in result["after"])
    assert (out / "README.md").read_text().startswith("**Not known to be poisoned**")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL"], "which pairs are trusted"),
        (["RUN", "defense=roclip"], "defense=roclip does not repair"),
        (["RUN", "defense.batch=500"], "do not fill one batch of defense.batch=500"),
        (["RUN", "--clean", "/nowhere.csv"], "nowhere"),
    ],
)
def test_what_cannot_be_repaired_is_said(run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    known = {"RUN": str(run), "MODEL": str(run / "model")}
    assert cli.main(["repair", *(known.get(word, word) for word in words), "evaluate.probe=false"]) == 1
    assert message in capsys.readouterr().err


def test_trusted_pairs_are_never_poisoned_and_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    recipe = small.recipe(small.write(tmp_path / "set"))
    table = prepared.plan(recipe, open_dataset(recipe.data, None)).table
    some = prepared.trusted_rows(table, 0.3, 5)
    assert not any(some["poison"].to_pylist()) and some.num_rows == 30
    shuffled = table.take(np.random.default_rng(0).permutation(table.num_rows))
    assert set(prepared.trusted_rows(shuffled, 0.3, 5)["id"].to_pylist()) == set(some["id"].to_pylist())
    assert prepared.trusted_rows(table, 1.0, 5).num_rows == 100


def test_a_repair_is_the_same_each_time(tmp_path: Path) -> None:
    recipe = small.recipe(small.write(tmp_path / "set"), defense="cleanclip")
    table = prepared.plan(recipe, open_dataset(recipe.data, None)).table
    plan = CleanCLIP(epochs=2, batch=16, lr=1e-3, warmup=1).repair()
    cfg, losses = clip.config("tiny-vit", 32), []
    for _ in range(2):
        losses.append(repair.fine_tune(clip.build(cfg, seed=0), cfg, plan, recipe, prepared.trusted_rows(table, 32, 0), 32))
    assert losses[0] == losses[1]


def test_a_checkpoint_is_certified_and_the_scope_is_printed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "certificate"
    assert cli.main(["certify", str(run), "--max", "5", "--shards", "3", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "under this fixed encoder" in said and "nothing of poison among the pairs" in said
    found = json.loads((out / "certificate.json").read_text())
    assert (found["labelled"], found["test"], found["k"]) == (120, 40, 15)
    for curve in found["certified"].values():
        assert len(curve) == 6 and sorted(curve, reverse=True) == curve
    joint = next(name for name in found["certified"] if name.endswith("joint"))
    single = joint.removesuffix(", joint")
    assert all(a >= b for a, b in zip(found["certified"][joint], found["certified"][single], strict=True))
    assert {f.name for f in out.iterdir()} == {f"certificate.{ending}" for ending in ("json", "csv", "png", "pdf")}
    assert cli.main(["certify", str(run), "--max", "500", "--out", str(out)]) == 1
    assert "lower --k" in capsys.readouterr().err


def test_poison_in_one_shard_moves_one_vote() -> None:
    """What the certificate of shards rests on: no head sees anything of another shard."""
    from orchestrate.certificates import shard_votes

    draw = torch.Generator().manual_seed(0)
    train, test = torch.randn(90, 6, generator=draw), torch.randn(20, 6, generator=draw)
    labels, content = np.random.default_rng(0).integers(3, size=90), [f"s{i}" for i in range(90)]
    clean = shard_votes(train, labels, content, test, 3, 4, 0)
    for i in range(2):
        wrong = labels.copy()
        wrong[i] = (labels[i] + 1) % 3
        kept = np.arange(90) != i
        for votes in (
            shard_votes(train, wrong, content, test, 3, 4, 0),
            shard_votes(train[kept], labels[kept], [c for c, k in zip(content, kept, strict=True) if k], test, 3, 4, 0),
        ):
            assert (np.abs(votes - clean).sum(1) <= 2).all()
        exchanged, new = train.clone(), [*content]
        exchanged[i], new[i] = 1000.0, "other"
        assert (np.abs(shard_votes(exchanged, wrong, new, test, 3, 4, 0) - clean).sum(1) <= 4).all()
    assert (clean.sum(1) == 4).all()
