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
def one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)  # where --out lies by default


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


def test_a_trusted_set_is_read_by_its_own_settings_not_by_those_of_the_set_that_is_measured(run: Path, tmp_path: Path) -> None:
    tree = json.loads((run / "recipe.json").read_text())
    tree["data"] |= {"size": 100, "heldout": 40}  # more than half of the trusted pairs
    (run / "recipe.json").write_text(json.dumps(tree))
    data, out = small.write(tmp_path / "trusted", train=40), tmp_path / "out"
    (data / "test.parquet").unlink()
    assert cli.main(["repair", str(run), "--clean", str(data), "--out", str(out), *QUICK[1:]]) == 0
    result = json.loads((out / "result.json").read_text())
    assert (result["pairs"], result["before"]["asr/stripes/total"]) == (40, 30)
    assert cli.main(["certify", str(run), "--data", str(data), "--max", "2", "--out", str(out), "data.heldout=10"]) == 0
    assert json.loads((out / "certificate.json").read_text())["labelled"] == 30


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN", "--clean", "SET", "defense.clean=30"], "give one of the two"),
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


def test_a_folder_that_cannot_be_written_is_told_before_the_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("a file where a folder should go")
    monkeypatch.setattr(repair, "fine_tune", lambda *_: pytest.fail("it trained, and has nowhere to keep what it trained"))
    for out in ("taken", "taken/inside"):
        assert cli.main(["repair", str(run), "--out", str(tmp_path / out), *QUICK]) == 1
        assert "taken" in capsys.readouterr().err


EVIL = """
import pathlib
from attacks.backdoor import Stripes as E
pathlib.Path("ran").touch()
"""


@pytest.mark.parametrize("method", ["attack", "defense"])
@pytest.mark.parametrize("form", ["file", "joined", "module", "bare"])
def test_code_that_a_directory_names_runs_only_where_the_user_names_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], method: str, form: str
) -> None:
    (run / "evil.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(run)
    use = {"joined": f"badnets+{run}/evil.py:E", "module": "evil:E"}.get(form, f"{run}/evil.py:E")
    recipe = json.loads((run / "recipe.json").read_text())
    recipe[method] = use if form == "bare" else {"use": use}
    (run / "recipe.json").write_text(json.dumps(recipe))
    ends = ("defense.batch=500", "evaluate.probe=false")  # where the recipe was taken, this is what the command ends by
    told = {
        "certify": "nowhere.csv",
        "repair": "--recipe" if method == "attack" else "do not fill one batch",
        "none": "do not fill one batch",
    }
    for words in (["certify", str(run), "--data", "nowhere.csv"], ["repair", str(run), *ends], ["repair", str(run), "attack=none", *ends]):
        assert cli.main(words) == 1
        assert told["none" if "attack=none" in words else words[0]] in capsys.readouterr().err
        assert not (tmp_path / "ran").exists()
    if (method, form) == ("attack", "file"):
        assert cli.main(["repair", str(run), "--recipe", str(run / "recipe.json"), *ends]) == 1
        assert "samples wanted, only 90 to choose from" in capsys.readouterr().err  # the attack's own words, so it was loaded
        assert (tmp_path / "ran").exists(), "named by the user, it is a method as any other"


@pytest.mark.parametrize(("content", "message"), [("{", "is no JSON"), ("[1]", "a recipe is a JSON object"), (None, "no file")])
@pytest.mark.parametrize("verb", ["repair", "eval"])
def test_a_recipe_that_is_none_is_told_by_its_file(
    run: Path, tmp_path: Path, content: str | None, message: str, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.json"
    if content is not None:
        file.write_text(content)
    assert cli.main([verb, str(run / "model"), "--recipe", str(file)]) == 1
    said = capsys.readouterr().err
    assert message in said and str(file) in said


def test_a_directory_whose_recipe_is_none_is_told_by_its_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "recipe.json").write_text("[1]")
    for verb in ("repair", "certify"):
        assert cli.main([verb, str(run)]) == 1
        assert f"{run / 'recipe.json'}: a recipe is a JSON object" in capsys.readouterr().err


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
