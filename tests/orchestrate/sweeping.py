"""A finished sweep on disk, as a real one leaves it, with numbers by a formula: recipes are real, nothing was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrate import axes, recipes, sweepdir
from orchestrate.axes import Trial
from orchestrate.recipe import flatten
from orchestrate.sweepdir import DONE, Asking, Event

Formula = Callable[[dict[str, Any]], dict[str, Any]]
NAME = "roclip-stripes-smoke"
WORDS = ("defense.every=1,2,4", "defense.pool_size=0.005,0.02,0.1", "attack.count=30,100,300", "seed=0..2")


def trials(words: tuple[str, ...] = WORDS, *names: str) -> list[Trial]:
    def base(name: str) -> axes.Make:
        return lambda given: recipes.get(name, given)

    return axes.grid(axes.read({name: base(name) for name in names or (NAME,)}, words))


def formula(values: dict[str, Any]) -> dict[str, Any]:
    """Rarer matching: more accurate, faster, and more easily fooled, the more so the more poison there is."""
    every, count, seed = values.get("defense.every", 8), values["attack.count"], values["seed"]
    hits = min(100, int(every**2 * count / 100) + seed)
    return {
        "zeroshot/top1": 0.4 + 0.02 * every + 0.001 * seed,
        "zeroshot/total": 280,
        "asr/stripes": hits / 100,
        "asr/stripes/hits": hits,
        "asr/stripes/total": 100,
        "asr/stripes/clean": 0.01,
        "seconds/train": 40.0,
        "seconds/match": 20.0 / every + 100 * values.get("defense.pool_size", 0),
    }


def write(runs: Path, found: list[Trial], make: Formula = formula) -> Path:
    """The sweep's directory and those of its runs."""
    folder = runs / "test-sweep-12345678"
    folder.mkdir(parents=True)
    sweepdir.begin(folder, Asking("test", (NAME,), WORDS), "1234567812345678", found)
    for trial in found:
        run = runs / trial.recipe.directory
        run.mkdir()
        tree = trial.recipe.as_dict()
        values = flatten(tree)
        known = {"recipe": trial.recipe.name, "identity": trial.recipe.identity, "seed": trial.recipe.seed, "data": "scenes"}
        known |= {"attack": values["attack"], "defense": values["defense"], "run": str(run)}
        known |= {"poison/count": values.get("attack.count", 0)}
        (run / "recipe.json").write_text(json.dumps(tree | {"identity": trial.recipe.identity}))
        (run / "result.json").write_text(json.dumps(known | make(values)))
        sweepdir.note(folder, Event(trial.recipe.identity, DONE, trial.recipe.directory, dict(trial.changed), seconds=50.0))
    return folder
