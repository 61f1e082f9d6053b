"""The docs cannot rot: generated parts are fresh, commands run, links lead somewhere, every verb and every metric is told."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional as F

from attacks.base import PROBE_SCHEMA
from defenses.base import ClipOutput, clip_loss
from orchestrate import cli, journal, measure, pairing, recipes, rundir
from orchestrate.evaluate import attack_success, linear_probe, retrieval, zero_shot
from orchestrate.statistics import wilson

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
README, USAGE, GUIDE = ((ROOT / name).read_text() for name in ("README.md", "docs/usage.md", "CONTRIBUTING.md"))
RUNNABLE = re.findall(r"<!-- run -->\n```sh\n(.*?)```", README, re.DOTALL)
EXAMPLE, FRAME = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a user's own, with CONTRIBUTING's examples in it."""
    (tmp_path / "keep_top.py").write_text(EXAMPLE)
    (tmp_path / "frame.py").write_text(FRAME)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- generated parts ------------------------------------------------------------------------------------------------------------


def test_generated_parts_are_fresh() -> None:
    done = subprocess.run([sys.executable, "docs/build.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_is_stale_is_found(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, block = tmp_path / "page.md", "before\n<!-- generated: ls -->\nold\n<!-- end -->\nafter\n"
    page.write_text(block)
    monkeypatch.setattr(build, "METHODS", tmp_path / "methods")
    fresh = build.filled(block)
    assert build.stale({page: fresh}) == [page]
    assert fresh.startswith("before\n") and fresh.endswith("<!-- end -->\nafter\n") and "$ antidote ls" in fresh
    page.write_text(fresh)
    assert build.stale({page: build.filled(fresh)}) == []
    with pytest.raises(ValueError, match="no generated block"):
        build.filled("<!-- generated: nonsense -->\n<!-- end -->")


def test_a_card_must_explain_every_field(build: ModuleType) -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Mute:
        """Summary.

        Cost: none.
        """

        field: int = 1

    @dataclass(frozen=True)
    class Odd:
        """Summary.

        Price: none.
        """

    with pytest.raises(ValueError, match="no line for the field 'field'"):
        build.whole_card(Mute)
    with pytest.raises(ValueError, match="Price"):
        build.whole_card(Odd)


def test_results_are_collected_without_anybodys_paths(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "clip-1"
    run.mkdir(parents=True)
    result = {"recipe": "clip", "defense": "clip", "attack": "stripes", "data": "/home/me/sets/flickr", "run": str(run), "seed": 0}
    (run / "result.json").write_text(json.dumps(result | {"asr/stripes": 0.9, "asr/stripes/hits": 9, "asr/stripes/total": 10}))
    monkeypatch.setattr(build, "RESULTS", tmp_path / "results")
    file = build.collect("demo", [run], None, None, "a note")
    file = build.collect("demo", [run], "A title", None, None)
    assert "/home" not in file.read_text() and str(tmp_path) not in file.read_text()
    text = "\n".join(build.block_results())
    assert "## A title" in text and "a note" in text and "9/10 = 90.0 %" in text and "Data flickr" in text
    assert "9/10" in "\n".join(build.block_demo())
    build.collect("demo", [made(tmp_path / "more", 16, 0, 2)], None, None, None, add=True)
    text = "\n".join(build.block_results())
    assert "9/10 = 90.0 %" in text and "2/10 = 20.0 %" in text and "## A title" in text


def test_a_sweep_is_collected_with_a_row_for_each_setting(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [made(tmp_path / "runs", pool, seed, hits) for pool, seed, hits in ((16, 0, 2), (16, 1, 4), (64, 0, 1))]
    monkeypatch.setattr(build, "SWEEPS", tmp_path / "sweeps")
    file = build.collect_sweep("pool", runs, "", "How large", "antidote sweep pool", "It holds.")
    assert "/home" not in file.read_text() and str(tmp_path) not in file.read_text()
    text = "\n".join(build.block_sweeps())
    assert "| defense.pool_size | seeds | asr/a |" in text and "## How large" in text and "It holds." in text
    assert "| 16 | 2 | 6/20 = 30.0 % [" in text and "| 64 | 1 | 1/10 = 10.0 % [1.8, 40.4] |" in text


def test_a_matrix_is_collected_in_parts_with_its_picture(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "MATRICES", tmp_path / "matrices")
    build.collect_matrix("all", [made(tmp_path / "runs", 16, 0, 2)], "All", "antidote sweep matrix", "Half of it.", add=False)
    file = build.collect_matrix("all", [made(tmp_path / "runs", 64, 0, 1)], None, None, None, add=True)
    text = "\n".join(build.block_matrices())
    assert "| attack | poison | RoCLIP (pool_size=16) | RoCLIP (pool_size=64) |" in text and "Half of it." in text
    assert "2/10 = 20.0 % [5.7, 51.0] | 1/10 = 10.0 % [1.8, 40.4] |" in text
    assert "](matrices/all.png)" in text and file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "/home" not in file.read_text()


def made(folder: Path, pool: int, seed: int, hits: int) -> Path:
    """The directory of a finished run."""
    run = folder / f"roclip-{pool}-{seed}"
    run.mkdir(parents=True)
    recipe = {"name": "roclip", "seed": seed, "defense": {"use": "roclip", "pool_size": pool}, "data": {"path": "/home/me/set"}}
    result = {"recipe": "roclip", "defense": "roclip", "attack": "a", "data": "/home/me/set", "run": str(run), "seed": seed}
    counts = {"identity": run.name, "asr/a": hits / 10, "asr/a/hits": hits, "asr/a/total": 10, "poison/count": 0, "poison/rate": 0.0}
    low, high = wilson(hits, 10)
    (run / "recipe.json").write_text(json.dumps(recipe))
    (run / "result.json").write_text(json.dumps(result | counts | {"asr/a/low": low, "asr/a/high": high}))
    return run


@pytest.mark.parametrize("file", sorted((ROOT / "docs" / "results").glob("*.json")), ids=lambda file: file.stem)
def test_published_results_name_no_path(file: Path) -> None:
    for result in json.loads(file.read_text())["results"]:
        assert not [value for value in result.values() if isinstance(value, str) and "/" in value]


# --- commands -------------------------------------------------------------------------------------------------------------------


def test_there_is_something_to_run() -> None:
    assert RUNNABLE and all("antidote " in block for block in RUNNABLE)


@pytest.mark.parametrize("block", RUNNABLE)
def test_runnable_blocks_run(block: str, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PYTHON": sys.executable}
    script = 'set -euo pipefail\nantidote() { "$PYTHON" -m orchestrate "$@"; }\n' + block
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def commands() -> list[str]:
    fences = [fence for page in PAGES for fence in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)]
    lines = dict.fromkeys(line for fence in fences for line in fence.splitlines())
    return [line for line in lines if line.startswith("antidote ") and "…" not in line]


@pytest.mark.parametrize("line", commands())
def test_every_command_shown_is_one(line: str, mine: Path) -> None:
    """It parses, and its recipe and overrides exist; nothing is run."""
    args = cli._parser().parse_args(shlex.split(line, comments=True)[1:])
    if "recipe" in args and "checkpoint" not in args:
        assert cli.resolved(args.recipe, args.overrides)


def test_every_verb_is_told() -> None:
    [verbs] = [action for action in cli._parser()._actions if hasattr(action, "choices") and isinstance(action.choices, dict)]
    assert not [verb for verb in verbs.choices if f"`antidote {verb}" not in README]


def test_options_are_told_as_the_command_line_tells_them() -> None:
    """argparse wants %% for a % in a help text, a reader does not."""
    assert "5 % of the pairs" in USAGE and "%%" not in USAGE


# --- links ----------------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or not target.is_relative_to(ROOT) or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


# --- what is promised -----------------------------------------------------------------------------------------------------------


def test_the_example_defence_works_from_a_file(mine: Path) -> None:
    [one] = recipes.get("clip-targeted-smoke", {"defense": "./keep_top.py:KeepTop", "defense.share": "0.5"})
    assert one.recipe.defense is not None
    [(name, keep_top)] = one.recipe.defense.parts
    assert name == "KeepTop" and keep_top.share == 0.5
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(8, 4), dim=1) for _ in range(2))
    text[:4] = image[:4]  # the first four pairs agree best
    whole = ClipOutput(image.requires_grad_(), text, torch.tensor(1.0), epoch=2)
    young = ClipOutput(image, text, torch.tensor(1.0), epoch=1)
    assert keep_top.loss(young, clip_loss) == clip_loss(young)
    best = ClipOutput(image[:4], text[:4], torch.tensor(1.0))
    assert keep_top.loss(whole, clip_loss).item() == pytest.approx(clip_loss(best).item(), rel=1e-5)
    keep_top.loss(whole, clip_loss).backward()
    assert image.grad is not None and not image.grad[4:].any() and image.grad[:4].any()
    with pytest.raises(ValueError, match="share"):
        recipes.get("clip", {"defense": "./keep_top.py:KeepTop", "defense.share": "2"})


def test_every_metric_is_defined() -> None:
    torch.manual_seed(0)
    images, texts, classes = (F.normalize(torch.randn(n, 4), dim=1) for n in (20, 20, 2))
    labels = torch.arange(20) % 2
    rows = [{"image_id": str(i), "image_split": "heldout", "stamp": "x", "adversary": "cat", "truth": "dog", "group": 0} for i in range(20)]
    probe = pa.Table.from_pylist(rows, schema=PROBE_SCHEMA)
    keys = {*zero_shot(images, classes, labels), *retrieval(images, texts), *linear_probe(images, labels, images, labels, 0)}
    for how, clean in (("targeted", None), ("backdoor", texts)):
        keys |= set(attack_success("NAME", how, probe, ["dog", "cat"], classes, images, clean))
    assert len(keys) > 20
    told = set(re.findall(r"`([^`\s]+)`", USAGE))
    assert not {re.sub(r"/r(1|5|10)$", "/rK", key) for key in keys} - told


def test_what_the_packages_and_the_seconds_are_is_defined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "complete_gallery", lambda folder: None)
    recipe = recipes.get("clip-clean-smoke", {})[0].recipe
    journal.append(tmp_path / journal.NAME, {"kind": "eval", "epoch": recipe.train.epochs, "seconds": 1.0})
    ready = SimpleNamespace(manifest=None, table=SimpleNamespace(num_rows=1))
    families = {key.partition("/")[0] for key in rundir.finish(recipe, tmp_path, ready, None, 0.0) if "/" in key}
    assert "versions" in families and not {family for family in families if f"`{family}/" not in USAGE}
    assert " ".join(measure.MADE[measure.SECONDS].removesuffix(", in seconds").split()) in " ".join(USAGE.split())


def test_what_a_round_reports_is_defined() -> None:
    columns = {"caption": ["a dog", "a cat"], "poison": [True, False], "adversary": ["cat", ""], "label": pa.array([0, 1], pa.int32())}
    table = pa.table(columns).replace_schema_metadata({b"classes": b'["dog", "cat"]'})
    match = {"index": np.array([1, 1]), "distance": np.zeros(2), "solved": np.ones(2)}
    told = pairing.facts(table, pairing.Pool(["0", "1"], ["a dog", "a cat"]), match, "NAME")
    assert (told["poisoned_kept"], told["clean_kept"], told["moved"]) == (1, 1, 0.5)
    assert not set(told) - set(re.findall(r"`([^`\s]+)`", USAGE))
