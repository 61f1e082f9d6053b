"""What travels with a submitted job, and what must not."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrate import cli, cli_sweeps, shipping
from orchestrate.shipping import Order

MINE = """
from dataclasses import dataclass
from defenses.base import Defense

@dataclass(frozen=True)
class Mine(Defense):
    \"\"\"x\"\"\"
    strength: float = 1.0
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words_of(command: str, runs: str = "/shared/runs") -> list[str]:
    """The command's words as the nodes' shell reads them."""
    done = subprocess.run(
        ["bash", "-c", command.replace("python -m orchestrate", "printf '%s\\n'", 1)],
        env={"PATH": os.environ["PATH"], "HOME": "/home/ray", shipping.WHERE: runs},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("what", "words", "verb"),
    [
        ("roclip-smoke", [], "run"),
        ("demo", [], "run"),
        ("roclip-smoke", ["data.classes=dog,cat"], "run"),
        ("roclip-smoke", ["defense.every=1,2"], "sweep"),
        ("frequency-smoke", [], "sweep"),
        ("roclip-smoke,clip-smoke", [], "sweep"),
        ("roclip-smoke", ["seed=0..2"], "sweep"),
    ],
)
def test_axes_make_a_sweep(what: str, words: list[str], verb: str):
    order, recipes = shipping.ask(what, words, [], cli.source)
    assert order.verb == verb and recipes


@pytest.mark.parametrize(
    ("typed", "verb", "forced"),
    [
        (["roclip-smoke"], "run", False),
        (["roclip-smoke", "--force"], "run", True),
        (["roclip-smoke", "--force", "seed=1"], "run", True),
        (["demo", "--force"], "run", True),
        (["roclip-smoke", "seed=0..2"], "sweep", None),
        (["roclip-smoke", "defense.every=1,2", "seed=0..2", "--search", "random", "--samples", "3"], "sweep", None),
        (["roclip-smoke", "--concurrent", "1"], "sweep", None),
        (["roclip-smoke", "defense.every=1,2", "evaluate.every=1", "--asha"], "sweep", None),
    ],
)
def test_what_is_sent_is_a_command_that_the_cluster_can_read(tmp_path: Path, typed: list[str], verb: str, forced: bool | None):
    """From the line that the user types to the line that the nodes parse, both through the parser itself."""
    there = sent(tmp_path, typed)
    assert there.what_verb == verb and getattr(there, "force", None) is forced
    assert there.overrides[-3:] == ["cluster.address=auto", "cluster.storage=/shared/runs", "cluster.runs=/home/ray/antidote-runs"]
    asked = [word for word in typed[1:] if "=" in word]
    assert there.overrides[:-3] == asked
    for option in ("search", "samples", "asha", "concurrent"):
        assert verb == "run" or getattr(there, option) == getattr(cli.parsed(["submit", *typed]), option)


def sent(folder: Path, typed: list[str]) -> argparse.Namespace:
    """What the cluster's parser makes of `antidote submit` with these words; `what_verb` is the verb."""
    args = cli.parsed(["submit", *typed])
    order, _ = shipping.ask(args.what, args.overrides, cli_sweeps.search_words(args), cli.source, args.force)
    words = words_of(shipping.load(folder / "cargo", order, cli.source))
    return argparse.Namespace(**vars(cli.parsed(words)), what_verb=words[0])


@pytest.mark.parametrize("more", [["defense.every=1,2"], ["seed=0..2"], ["--concurrent", "1"]])
def test_a_sweep_is_not_forced(more: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.main(["submit", "roclip-smoke", *more, "--force", "--address", "http://127.0.0.1:1"]) == 1
    assert "--force is for one recipe, and this is a sweep" in capsys.readouterr().err


def test_a_mistake_is_found_before_anything_is_sent():
    with pytest.raises(ValueError, match=r"defense\.evry.*Did you mean"):
        shipping.ask("roclip", ["defense.evry=1"], [], cli.source)


@pytest.mark.parametrize("word", ["data=pairs.csv", "cluster.runs=runs", "data.cache=cache", "data.exclude=audited/scores.parquet"])
def test_a_path_of_this_directory_is_refused_with_the_mend(word: str):
    with pytest.raises(ValueError, match="the one by which all nodes know it"):
        shipping.ask("roclip", [word], [], cli.source)
    for path in ("/shared/x", "s3://bucket/x", "~/x"):
        shipping.check(f"{word.partition('=')[0]}={path}")


@pytest.mark.parametrize(
    "word", ["data.exclude=audit", "data.exclude=", "data=scenes", "data=scenes,/shared/x", "data.exclude=audit,/shared/scores.parquet"]
)
def test_a_word_that_is_no_path_travels(word: str):
    shipping.check(word)
    with pytest.raises(ValueError, match="is a path in this directory"):
        shipping.check(f"{word},here/x")


@pytest.mark.parametrize("more", [["--samples", "3"], ["--search", "random", "--sampler", "nsga"], ["--search", "all"]])
def test_an_option_that_the_cluster_would_refuse_is_refused_here(more: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.main(["submit", "roclip-smoke", "defense.every=1,2", *more, "--address", "http://127.0.0.1:1"]) == 1
    assert more[-2] in capsys.readouterr().err


def test_a_password_is_refused_and_not_repeated():
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD") as error:
        shipping.ask("roclip", ["track.uri=http://me:hush@host"], [], cli.source)
    assert "hush" not in str(error.value)


def test_the_command_says_what_was_asked_whatever_the_words_hold(tmp_path: Path):
    words = ("data.classes=dog,a cat's", "name=$(touch owned)", "data=/shared/a b;c", "train.lr=1e-3")
    command = shipping.load(tmp_path, Order("run", "roclip-smoke", words, ("--force",)), cli.source)
    expected = ["run", "roclip-smoke", *words, "--force", "cluster.address=auto", f"{shipping.STORAGE}=/shared/runs"]
    assert words_of(command)[: len(expected)] == expected and not Path("owned").exists()


def test_a_cluster_that_keeps_runs_nowhere_says_so(tmp_path: Path):
    command = shipping.load(tmp_path, Order("run", "roclip-smoke", ()), cli.source)
    done = subprocess.run(["bash", "-c", command], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert done.returncode and "ANTIDOTE_STORAGE: say where this cluster keeps runs" in done.stderr
    command = shipping.load(tmp_path / "other", Order("run", "roclip-smoke", ("cluster.runs=/x",)), cli.source)
    assert "ANTIDOTE_STORAGE" not in command


def test_a_run_is_never_made_in_the_folder_of_the_job_which_ray_removes(tmp_path: Path):
    for name, words in (("a", ()), ("b", ("cluster.storage=s3://mine/runs",))):
        sent = words_of(shipping.load(tmp_path / name, Order("run", "roclip-smoke", words), cli.source))
        assert "cluster.runs=/home/ray/antidote-runs" in sent and sum(word.startswith("cluster.storage=") for word in sent) == 1


def test_methods_from_files_travel_and_keep_the_runs_identity(here: Path):
    words = ("defense=./mine.py:Mine", "defense.strength=2")
    command = shipping.load(here / "cargo", Order("run", "clip-smoke", words), cli.source)
    sent = words_of(command)
    [there] = [word for word in sent if word.startswith("defense=")]
    assert there.startswith("defense=./shipped/") and there.endswith("/mine.py:Mine")
    [mine] = cli.resolved("clip-smoke", words)
    (here / "mine.py").unlink()
    os.chdir(here / "cargo")
    [theirs] = cli.resolved(sent[1], [word for word in sent[2:] if not word.startswith("cluster.")])
    assert theirs.recipe.identity == mine.recipe.identity


def test_a_recipe_from_a_file_travels_with_its_methods(here: Path):
    [one] = cli.resolved("clip-smoke", ["defense=./mine.py:Mine", "defense.strength=3"])
    (here / "my.json").write_text(json.dumps(one.recipe.as_dict()))
    sent = words_of(shipping.load(here / "cargo", Order("run", "my.json", ()), cli.source))
    (here / "mine.py").unlink()
    os.chdir(here / "cargo")
    [theirs] = cli.resolved(sent[1], [])
    assert theirs.recipe.identity == one.recipe.identity


def test_what_travels_runs_by_itself_and_holds_nothing_else(tmp_path: Path):
    shipping.code(tmp_path)
    assert {item.name for item in tmp_path.iterdir()} == {*shipping.ROOMS, "pyproject.toml"}
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 5_000_000
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    code = "import orchestrate, models; print(orchestrate.ROOT, models.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path), str(tmp_path / "models" / "__init__.py")]


def test_the_name_of_a_job_is_one():
    for what in ("roclip-smoke", "a,b", "/x/y/recipe.json", "mlflow:12", "../é"):
        name = Order("run", what, ()).name
        assert name and shlex.quote(name) == name
    assert Order("sweep", "mine/one.json,/x/two.json", ()).name == "one-two"
