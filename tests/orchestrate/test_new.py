"""`antidote new` writes files that work at once: as methods, in a plan, in a training step, and on a machine that has only their text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from orchestrate import cli, prepared, scaffold
from orchestrate.recipe import Model, Train, packed, resolve, unpacked
from orchestrate.step import Examples, Learner

from . import small

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return tmp_path


def test_a_new_defence_trains_at_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["new", "defense", "keep_top"]) == 0
    assert capsys.readouterr().out.splitlines() == ["wrote keep_top.py", "try it: antidote run clip-smoke defense=./keep_top.py:KeepTop"]
    recipe = resolve("run", [("test", {"defense": "./keep_top.py:KeepTop", "defense.share": 0.5, "defense.text_augment": False})]).recipe
    defense = prepared.build_defense(recipe)
    assert type(defense).__name__ == "KeepTop" and defense.share == 0.5
    rng = np.random.default_rng(0)
    batch = Examples(rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8), ["a dog", "a cat"] * 4, np.arange(8, dtype=np.uint64))
    one = Learner(Model("tiny-vit", 32), Train(batch=8, precision="fp32"), defense, seed=0, total_steps=10)
    losses = [float(one.step(batch, epoch=epoch)) for epoch in (1, 2)]
    assert np.isfinite(losses).all()


def test_a_new_attack_is_planned_at_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["new", "attack", "PinkFrame"]) == 0
    small.write(here / "set")
    words = ["poison", "clip", f"data={here / 'set'}", "data.heldout=40", "data.size=0", "data.side=32", f"data.cache={here}"]
    assert cli.main([*words, "attack=./pink_frame.py:PinkFrame", "attack.count=9", "--out", "poisoned"]) == 0
    assert "9 poisoned pairs" in capsys.readouterr().out
    table = pq.read_table("poisoned/manifest.parquet")
    assert set(table["stamp"].to_pylist()) == {"PinkFrame"} and table.num_rows == 9
    recipe = resolve("run", [("test", {"attack": "./pink_frame.py:PinkFrame"})]).recipe
    image = np.zeros((32, 32, 3), np.uint8)
    stamped = prepared.build_attack(recipe).stamp(image, {"stamp": "PinkFrame", "image_id": "x"})
    assert (stamped[0] == (255, 0, 255)).all() and not stamped[16].any(axis=1)[4:-4].any()
    assert not image.any()


@pytest.mark.parametrize("kind", ["attack", "defense"])
def test_what_is_written_keeps_the_style_of_the_house(kind: str, here: Path) -> None:
    (here / "some_name.py").write_text(scaffold.source(kind, "some_name")[1])
    config = ["--config", str(ROOT / "pyproject.toml")]
    # I001: elsewhere than here our rooms are somebody else's packages, and sorted among them.
    for check in (["check", "--ignore=I001", *config], ["format", "--check", *config]):
        done = subprocess.run([sys.executable, "-m", "ruff", *check, "some_name.py"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["defense", "../up"], "no name for a file and a class"),
        (["defense", "class"], "no name for a file and a class"),
        (["attack", "there"], "there.py is there already"),
    ],
)
def test_what_cannot_be_written_is_said(here: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "there.py").write_text("mine = 1\n")
    assert cli.main(["new", *words]) == 1
    assert message in capsys.readouterr().err
    assert (here / "there.py").read_text() == "mine = 1\n" and not list(here.parent.glob("up.py"))


def test_a_machine_without_the_file_gets_its_text(here: Path) -> None:
    """A packed recipe, unpacked by another process after the file is gone."""
    scaffold.write("defense", "keep_top", here)
    scaffold.write("attack", "frame", here)
    layer = {"defense": "./keep_top.py:KeepTop", "defense.share": 0.25, "attack": "targeted+./frame.py:Frame", "attack.Frame.count": 7}
    recipe = resolve("run", [("test", layer)]).recipe
    (here / "packed.json").write_text(json.dumps(packed(recipe)))
    for name in ("keep_top.py", "frame.py"):
        (here / name).unlink()
    code = """
import json, sys
from orchestrate.recipe import unpacked
recipe = unpacked(json.load(open("packed.json")))
print(recipe.identity, recipe.defense.parts[0][1].share, recipe.attack.parts[1][1].count)
"""
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=here)
    assert done.stdout.split() == [recipe.identity, "0.25", "7"], done.stderr
    with pytest.raises(ValueError, match="no file"):
        resolve("run", [("test", layer)])


def test_a_recipe_without_files_is_packed_as_it_is() -> None:
    recipe = resolve("run", [("test", {"defense": "roclip"})]).recipe
    assert packed(recipe)["files"] == {} and unpacked(packed(recipe)) == recipe
