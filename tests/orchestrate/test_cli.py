"""The command line as a user meets it: what it prints, what it refuses, and how. No Ray: `run` stops at what it can know beforehand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from attacks.base import Manifest
from orchestrate import ROOT, plugins, recipes
from orchestrate.cli import main, resolved
from orchestrate.recipe import flatten


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one message of a command that fails, from stderr."""
    assert main(words) == 1
    out, err = capsys.readouterr()
    [message] = [text for text in err.split("\n") if text.startswith("antidote: ")] or [err]
    assert out == "" and err.endswith(f"{message}\n") and "Traceback" not in err
    return message


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    """What `show` prints of one recipe: dotted path → the rest of its line."""
    assert main(["show", *words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    pairs = [line.strip().partition(" ") for line in out.splitlines() if line.startswith("  ")]
    return {path: rest.strip() for path, _, rest in pairs} | {"": out.splitlines()[0]}


def test_without_a_verb_it_helps(capsys):
    assert main([]) == 0
    assert "antidote" in capsys.readouterr().out


def test_ls_names_every_recipe_part_method_and_model(capsys):
    assert main(["ls"]) == 0
    out = capsys.readouterr().out
    for name in (*recipes.METHODS, *recipes.ATTACKS, *recipes.SCALES, *recipes.SUITES):
        assert f"\n    {name} " in out
    for part in (*recipes.METHODS.values(), *recipes.ATTACKS.values(), *recipes.SCALES.values()):
        assert part.shows in out
    for kind in plugins.BUILT_IN:
        assert all(name in out for name in plugins.names(kind))
    for config in (ROOT / "models" / "configs").glob("*.json"):
        assert config.stem in out


def test_show_tells_every_value_its_origin_and_the_resources(capsys):
    [found] = recipes.get("roclip-badnets-smoke", {"attack.count": 5})
    lines = shown(capsys, "roclip-badnets-smoke", "attack.count=5")
    assert set(flatten(found.recipe.as_dict())) <= set(lines)
    assert lines["attack.count"].split() == ["5", "command", "line"]
    assert lines["train.epochs"].split() == ["4", "scale", "smoke"]
    assert lines["train.lr"] == "0.001"
    assert lines["defense.synonyms"] == "none"
    assert found.recipe.identity in lines[""] and f"runs/{found.recipe.directory}" in lines[""]
    assert lines["resources:"] == "1 training worker × 1 CPU + 1 matching actor × 0.5 CPU = 1.5 CPU"


def test_what_show_prints_can_be_typed_again(capsys):
    [found] = recipes.get("roclip-both-smoke", {"data.classes": "dog,cat"})
    lines = shown(capsys, "roclip-both-smoke", "data.classes=dog,cat")
    origins = set(found.origins.values()) - {"default"}
    words = []
    for path in flatten(found.recipe.as_dict()):
        text = lines[path]
        for origin in origins:
            text = text.removesuffix(origin).strip()
        words.append(f"{path}={text}")
    assert main(["show", "clip", *words]) == 0
    assert found.recipe.identity in capsys.readouterr().out


def test_a_defence_that_never_matches_asks_for_no_actor(capsys):
    assert shown(capsys, "clip")["resources:"] == "1 training worker × 1 CPU = 1 CPU"
    assert shown(capsys, "roclip", "defense.warmup=99")["resources:"] == "1 training worker × 1 CPU = 1 CPU"
    assert shown(capsys, "clip", "data.stream=always")["resources:"] == "1 training worker × 1 CPU + readers × 1 CPU = 2 CPU"


def test_show_prints_each_member_of_a_suite(capsys):
    assert main(["show", "demo"]) == 0
    out = capsys.readouterr().out
    assert all(f"{one.recipe.name}   identity {one.recipe.identity}" in out for one in recipes.get("demo"))


@pytest.mark.parametrize("verb", ["show", "run", "poison"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["roclip", "defense.evry=1"], "unknown key 'defense.evry'. Did you mean defense.every"),
        (["rocklip"], "no recipe is called 'rocklip'. Did you mean roclip"),
        (["roclip", "train.lr=fast"], "train.lr='fast': a number is wanted."),
        (["roclip", "train.lr"], "'train.lr' is no override: write key=value"),
        (["roclip", "seed=1", "seed=2"], "seed is given twice"),
        (["roclip", "attack=badnets", "attack.size=7"], "antidote: attack.size=7.0 is no share"),
        (["nowhere.json"], "no file nowhere.json. A finished run keeps its recipe"),
    ],
)
def test_a_mistake_is_one_message_on_stderr(here, capsys, verb, words, message):
    assert message in refused(capsys, verb, *words)
    assert list(here.iterdir()) == []


def test_a_mistake_in_one_member_stops_the_suite_before_its_first_run(here, capsys):
    assert "MLflow" in refused(capsys, "run", "demo", "track.uri=./mlruns")
    assert list(here.iterdir()) == []


def test_a_recipe_file_is_run_again_as_it_was(here, capsys):
    [found] = recipes.get("roclip-badnets-smoke", {"attack.count": 5, "seed": 7})
    (here / "recipe.json").write_text(json.dumps({**found.recipe.as_dict(), "identity": found.recipe.identity}))
    lines = shown(capsys, "recipe.json")
    assert found.recipe.identity in lines[""] and lines["attack.count"].split() == ["5", "recipe.json"]
    assert found.recipe.identity not in shown(capsys, "recipe.json", "seed=8")[""]
    assert shown(capsys, "recipe.json", "seed=8")["seed"].split() == ["8", "command", "line"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "recipe.json is no JSON"),
        ("\u00ff", "recipe.json is no JSON"),
        ("[1]", "a recipe is a JSON object"),
        ('{"train": {"epoch": 3}}', "unknown key 'train.epoch'. Did you mean train.epochs"),
        ('{"train": {"lr": NaN}}', "train.lr=nan: a number is wanted"),
    ],
)
def test_a_broken_recipe_file_is_one_message(here, capsys, content, message):
    (here / "recipe.json").write_text(content, encoding="latin-1")
    assert message in refused(capsys, "show", "recipe.json")


def test_what_the_system_refuses_is_one_message_too(here, capsys, scenes):
    (here / "taken").write_text("a file where a folder should go")
    assert "File exists: 'taken'" in refused(capsys, "poison", *TINY, scenes, "--out", "taken")


TINY = (
    "clip-both-smoke",
    "attack=targeted+stripes",
    "data.size=300",
    "data.heldout=60",
    "data.side=32",
    "attack.targeted.copies=3",
    "attack.stripes.count=40",
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One cache of pictures for the file."""
    return f"data.cache={tmp_path_factory.mktemp('scenes')}"


def test_poison_writes_the_plan_and_a_sheet_and_the_same_again(here, capsys, scenes):
    assert main(["poison", *TINY, scenes, "--out", "a"]) == 0
    out = capsys.readouterr().out
    assert "targeted+stripes on scenes, seed 0: 88 poisoned pairs" in out and "wrote a/manifest.parquet and a/sheet.png" in out
    assert "stripes    →" in out and "    40 pairs" in out
    assert main(["poison", *TINY, scenes, "--out", "b"]) == 0
    for name in ("manifest.parquet", "sheet.png"):
        assert (here / "a" / name).read_bytes() == (here / "b" / name).read_bytes()
    manifest = Manifest.read("a/manifest.parquet")
    assert manifest.count == 16 * 3 + 40 and manifest.header["seed"] == 0
    assert {part["name"]: part["count"] for part in manifest.header["parts"]} == {"targeted": 48, "stripes": 40}
    sheet = np.asarray(Image.open("a/sheet.png"))
    assert sheet.ndim == 3 and sheet.std() > 20  # pictures, not a blank page


def test_another_seed_is_another_plan(here, capsys, scenes):
    for seed in ("0", "1"):
        assert main(["poison", *TINY, scenes, f"seed={seed}", "--out", seed]) == 0
    tables = [pq.read_table(f"{seed}/manifest.parquet") for seed in ("0", "1")]
    assert not tables[0].equals(tables[1])


def test_the_plan_goes_to_a_folder_named_after_the_recipe(here, capsys, scenes):
    assert main(["poison", *TINY, scenes]) == 0
    [found] = resolved(TINY[0], [*TINY[1:], scenes])
    assert (here / f"poison-{found.recipe.identity[:8]}" / "manifest.parquet").is_file()


def test_a_recipe_without_attack_cannot_be_poisoned(here, capsys):
    assert "this recipe has no attack: name one" in refused(capsys, "poison", "clip-clean-smoke")


def test_a_plan_of_no_pair_is_a_plan(here, capsys, scenes):
    """The control of an experiment: count 0, everything else as in the poisoned run."""
    assert main(["poison", "clip-badnets-smoke", *TINY[2:5], scenes, "attack.count=0", "--out", "a"]) == 0
    assert "0 poisoned pairs, 0.00% of 300" in capsys.readouterr().out
    assert Manifest.read("a/manifest.parquet").count == 0


def test_report_and_track_name_a_missing_run(here, capsys):
    assert "nowhere" in refused(capsys, "report", "nowhere")
    assert "no run directory nowhere" in refused(capsys, "track", "sync", "nowhere")


def test_eval_reads_data_and_recipe_from_the_words_it_is_given(here, capsys):
    """No checkpoint is there: the data are not read before that is said."""
    assert "no-checkpoint" in refused(capsys, "eval", "no-checkpoint")
    assert "data.path is given twice" in refused(capsys, "eval", "x", "--data", "a", "data.path=b")
    for verb in ("eval", "certify"):
        assert "data is given twice ('a' and 'b')" in refused(capsys, verb, "x", "--data", "a", "data=b")
    assert "unknown key 'evaluate.bach'" in refused(capsys, "eval", "x", "evaluate.bach=3")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(("words", "option"), [(("certify", "no-checkpoint"), "--radius"), (("audit", "data=nowhere.csv"), "--copy-gb")])
def test_an_option_takes_no_number_that_is_none(here, capsys, words, option, value):
    """Before a checkpoint or a set is looked for: neither is there."""
    assert f"{option}={value}: a number is wanted" in refused(capsys, *words, f"{option}={value}")


@pytest.mark.parametrize("words", [["seed=1", "--out", "a"], ["--out", "a", "seed=1"], ["seed=1", "--out", "a", "data.side=32"]])
def test_overrides_may_stand_before_and_after_an_option(here, capsys, words):
    assert "seed is given twice ('5' and '1')" in refused(capsys, "poison", "clip", "seed=5", *words)


@pytest.mark.parametrize("words", [["ls", "more"], ["run", "roclip", "--forse"], ["report", "a", "--outt", "b"], ["nothing"]])
def test_an_unknown_word_or_option_is_refused_with_the_usage(here, capsys, words):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and "usage: antidote" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error():
    """`antidote ls | head -1` ends in silence."""
    code = "import sys; from orchestrate.cli import main; sys.exit(main(['ls']))"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 0
