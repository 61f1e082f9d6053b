"""What a submitted job carries: our rooms, the recipe's own files, and the command that the cluster runs. No Ray.

    <folder>/orchestrate, models, attacks, defenses, pyproject.toml     the code of this checkout, so a cluster never runs another
    <folder>/shipped/<hash8>/mine.py                                    methods from files; the words point there
    <folder>/shipped/recipe.json                                        a recipe from a file or from MLflow

Nothing else of this machine travels: no data, no runs, no environment, no secret.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrate import ROOT, axes, sweeps
from orchestrate.recipe import AUDIT, METHODS, Recipe, Resolved
from orchestrate.secrets import credentials

ROOMS = ("orchestrate", "models", "attacks", "defenses")
SHIPPED = "shipped"
WHERE = "ANTIDOTE_STORAGE"  # the nodes' variable that says where a cluster keeps runs
RUNS, STORAGE = "cluster.runs", "cluster.storage"  # the variable stands for the second
FILE = re.compile(r"[^\s,;+=\"]+\.py(?=:[A-Za-z_])")  # ./mine.py:Class in a word
ON_ONE_HOST = re.compile(r"(?![\w+.-]+:/|/|~)")  # a relative path: it means this directory, which no node has
# keys that hold a path, and the words that are none
PATHS = {"data.path": ("scenes",), "data.exclude": (AUDIT,), "data.cache": (), "cluster.runs": (), "cluster.storage": ()}

Source = Callable[[str], Callable[[Mapping[str, Any]], list[Resolved]]]


@dataclass(frozen=True)
class Order:
    """What is asked of the cluster: `run` or `sweep`, of what, with which words and options."""

    verb: str
    what: str
    words: tuple[str, ...]
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return re.sub(r"[^\w.-]+", "-", sweeps.called(self.what.split(",")), flags=re.ASCII)[:48].strip("-.") or "job"


def ask(what: str, words: Sequence[str], options: Sequence[str], source: Source, force: bool = False) -> tuple[Order, list[Recipe]]:
    """The order, checked as far as this machine can, and some of its recipes. ValueError for what the nodes would refuse.

    options: how a sweep searches, as typed. force: `run` alone knows it, so it makes no sweep and goes with none.
    """
    asked = sweeps.ask(what, words)
    space = axes.read({name: source(name) for name in asked.recipes}, asked.words)
    sweep = bool(space.axes or asked.shows or len(asked.recipes) > 1 or options)
    if sweep and force:
        raise ValueError("--force is for one recipe, and this is a sweep, which runs what is not finished: leave it, or submit one recipe.")
    found = [trial.recipe for trial in _some(space)] if sweep else [one.recipe for one in source(what)(_given(words))]
    for word in words:
        check(word)
    for recipe in found:
        _check("data.path", recipe.data.path)
    return Order("sweep" if sweep else "run", what, tuple(words), (*options, *(["--force"] if force else []))), found


def _some(space: axes.Space) -> list[axes.Trial]:
    """A few trials of a sweep: of three settings drawn, or the first ones where nothing but the seed varies."""
    drawn = any(axis.path != axes.SEED for axis in space.axes)
    return axes.sample(space, 3) if drawn else space.trials_at(axes.seeds(space)[0])


def _given(words: Sequence[str]) -> dict[str, str]:
    return {word.partition("=")[0]: word.partition("=")[2] for word in words}


def check(word: str) -> None:
    """ValueError for a word that must not, or cannot, travel."""
    _check(*word.partition("=")[::2])


def _check(key: str, value: str) -> None:
    if credentials(value):
        raise ValueError(
            f"{key} holds a password, and the dashboard shows the command of a job to everybody: leave it out, and set it in the nodes' "
            "environment (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; the cloud's own variables or roles for storage)."
        )
    key = f"{key}.path" if key == "data" else key
    values = re.split("[,;]", value.removeprefix("choice:")) if ON_ONE_HOST.match(value) else []  # of an axis
    if key in PATHS and any(one not in ("", *PATHS[key]) and ON_ONE_HOST.match(one) for one in values):
        raise ValueError(f"{key}={value} is a path in this directory: give the one by which all nodes know it, such as /shared/{value}.")


def code(folder: Path) -> None:
    """Our rooms, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    if (ROOT / "pyproject.toml").is_file():
        shutil.copy(ROOT / "pyproject.toml", folder)


def load(folder: Path, order: Order, source: Source) -> str:
    """Fill `folder` with what the job carries; the command that runs it there."""
    code(folder)
    what = ",".join(_recipe(folder, name, source) for name in order.what.split(","))
    words = [with_files(folder, word) for word in order.words]
    given = _given(words)
    line = shlex.join(["python", "-m", "orchestrate", order.verb, what, *words, *order.options])
    return " ".join([line, *([] if "cluster.address" in given else ["cluster.address=auto"]), *places(given)])


def places(given: Collection[str]) -> list[str]:
    """The words, for the nodes' shell, that say where runs are kept, unless the given keys do. Never in the job's own folder, which Ray
    removes."""
    if RUNS in given:
        return []
    mend = f"say where this cluster keeps runs: in {WHERE} on its nodes, as cluster.yaml does, or with {STORAGE}=…"
    return [*([] if STORAGE in given else [f'{STORAGE}="${{{WHERE}:?{mend}}}"']), f'{RUNS}="$HOME/antidote-runs"']


def _recipe(folder: Path, name: str, source: Source) -> str:
    """A recipe's name as it is; one from a file or from MLflow becomes a file that travels."""
    if not name.endswith(".json") and not name.startswith("mlflow:"):
        return name
    [one] = source(name)({})
    tree = one.recipe.as_dict()
    for method in METHODS:
        if tree[method]:
            tree[method]["use"] = with_files(folder, tree[method]["use"])
    file = folder / SHIPPED / f"{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(tree))
    return str(file.relative_to(folder))


def with_files(folder: Path, word: str) -> str:
    """Every `./mine.py:Class` of a word copied into the folder, and the word pointing at the copy."""

    def carry(found: re.Match[str]) -> str:
        path = Path(found[0]).expanduser().resolve()
        if not path.is_file():
            raise ValueError(f"no file {path} (from {word!r}).")
        target = folder / SHIPPED / hashlib.blake2b(path.read_bytes(), digest_size=4).hexdigest() / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        return f"./{target.relative_to(folder)}"

    return FILE.sub(carry, word)
