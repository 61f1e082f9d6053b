"""The verbs on many runs: sweep, compare, recommend. As in cli.py nothing slow is imported before a verb needs it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrate import axes, sweeps
from orchestrate.recipe import Resolved

if TYPE_CHECKING:
    from orchestrate.sweepdir import Asking

Verb = Callable[[str, Callable[..., Any], str], argparse.ArgumentParser]
Source = Callable[[str], Callable[[Mapping[str, Any]], list[Resolved]]]


def add(verb: Verb, source: Source) -> None:
    """The verbs' arguments. `source`: a recipe's name → what makes its recipes from overrides."""
    sweep = verb("sweep", lambda args: _sweep(args, source), "run a recipe for every combination of values; goes on where it was killed")
    sweep.add_argument("what", metavar="RECIPE", help="a recipe, several by comma, a ready sweep (antidote ls), or a sweep's directory")
    sweep.add_argument("overrides", nargs="*", metavar="key=value", help="axes such as defense.every=1,2,4 seed=0..2, and single values")
    sweep.add_argument("--search", default="grid", metavar="HOW", help="grid, random, or optuna (default: grid)")
    sweep.add_argument("--samples", type=int, default=20, help="settings that random or optuna draws (default: 20)")
    sweep.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    sweep.add_argument("--sampler", default="tpe", help="optuna's: tpe or nsga (default: tpe)")
    sweep.add_argument("--maximize", default="zeroshot/top1", metavar="METRIC", help="utility (default: zeroshot/top1)")
    sweep.add_argument("--minimize", default="asr", metavar="METRIC", help="harm (default: asr, the largest of any attack)")
    sweep.add_argument("--asha", nargs="?", const="zeroshot/top1", default="", metavar="METRIC", help="stop the worse half early by this")
    sweep.add_argument("--concurrent", type=int, default=0, help="at most so many trials at once (default: as many as fit)")
    sweep.add_argument("--resume", action="store_true", help="only go on with what was begun; RECIPE may be the sweep's directory")
    sweep.add_argument("--dry", action="store_true", help="list the trials and stop")


def _sweep(args: argparse.Namespace, source: Source) -> None:
    asking = _asking(args)
    space = axes.read({name: source(name) for name in asking.recipes}, asking.words)
    if args.dry:
        return _list(asking, space)
    from orchestrate.sweep import run_sweep

    folder = run_sweep(asking, space, fresh=not args.resume)
    print(f"sweep: {folder}")


def _asking(args: argparse.Namespace) -> Asking:
    """What is asked for, by words or by the directory of a sweep."""
    from orchestrate import sweepdir

    folder = Path(args.what)
    if folder.is_dir():
        if not args.resume or args.overrides:
            raise ValueError(f"{folder} is a directory: `antidote sweep {folder} --resume` goes on with the sweep in it.")
        return sweepdir.asked(folder)
    names = [field for field in sweepdir.Options.__dataclass_fields__]
    options = sweepdir.Options(**{name: getattr(args, name) for name in names})
    asked = sweeps.ask(args.what, args.overrides)
    return sweepdir.Asking(asked.name, asked.recipes, asked.words, options)


def _list(asking: Asking, space: axes.Space) -> None:
    from orchestrate import search

    trials: Sequence[axes.Trial] = search.listed(space, asking.options)
    for trial in trials:
        print(f"{trial.recipe.identity}  {trial.label}")
    if not trials:
        print(f"{asking.options.samples} settings, drawn by {asking.options.search} from {', '.join(map(str, space.axes))}")
    else:
        print(f"{len(trials)} trials")
