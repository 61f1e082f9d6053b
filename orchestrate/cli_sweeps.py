"""The verbs on many runs: sweep, compare, recommend. As in cli.py nothing slow is imported before a verb needs it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrate import axes, sweeps
from orchestrate.recipe import Resolved

if TYPE_CHECKING:
    from orchestrate import compare
    from orchestrate.sweepdir import Asking, Options

Verb = Callable[[str, Callable[..., Any], str], argparse.ArgumentParser]
Source = Callable[[str], Callable[[Mapping[str, Any]], list[Resolved]]]


def add(verb: Verb, source: Source) -> None:
    """The verbs' arguments. `source`: a recipe's name → what makes its recipes from overrides."""
    sweep = verb("sweep", lambda args: _sweep(args, source), "run a recipe for every combination of values; goes on where it was killed")
    sweep.add_argument("what", metavar="RECIPE", help="a recipe, several by comma, a ready sweep (antidote ls), or a sweep's directory")
    sweep.add_argument("overrides", nargs="*", metavar="key=value", help="axes such as defense.every=1,2,4 seed=0..2, and single values")
    add_search(sweep)
    sweep.add_argument("--resume", action="store_true", help="only go on with what was begun; RECIPE may be the sweep's directory")
    sweep.add_argument("--dry", action="store_true", help="list the trials and stop")
    compare = verb("compare", _compare, "runs and sweeps side by side: means over seeds with intervals; tables, plots, a page")
    compare.add_argument("runs", nargs="+", help="directories of runs and sweeps")
    compare.add_argument("--by", default="", metavar="PATHS", help="lines of the table, by comma (default: all that varies but the seed)")
    compare.add_argument("--metric", default="", metavar="METRICS", help="columns, by comma (default: accuracy, attack success, time)")
    compare.add_argument(
        "--matrix", action="store_true", help="attacks × defences: a line for each attack, a column for each defence; with --out a heat map"
    )
    compare.add_argument("--format", default="text", help="text, csv, markdown or latex (default: text)")
    compare.add_argument("--out", default="", help="folder for table.csv, .md and .tex, plots as PDF and PNG, and report.html")
    advise = verb("recommend", _recommend, "the cheapest setting of a sweep that keeps to a limit, and why")
    advise.add_argument("sweep", help="directory of a sweep or a run")
    advise.add_argument("conditions", nargs="+", metavar="CONDITION", help="such as 'asr<=0.125' or 'zeroshot/top1>=40%%'")
    advise.add_argument("--cost", default="seconds", metavar="METRIC", help="what is paid: seconds, or a utility to lose least of")


def add_search(parser: argparse.ArgumentParser) -> None:
    """How a sweep searches: the options that `sweep` and `submit` share. None where one is not given: the defaults are `Options`'."""
    parser.add_argument("--search", metavar="HOW", help="grid, random, or optuna (default: grid)")
    parser.add_argument("--samples", type=int, help="settings that random or optuna draws (default: 20)")
    parser.add_argument("--seed", type=int, help="of the draws (default: 0)")
    parser.add_argument("--sampler", help="optuna's: tpe or nsga (default: tpe)")
    parser.add_argument("--maximize", metavar="METRIC", help="utility (default: zeroshot/top1)")
    parser.add_argument("--minimize", metavar="METRIC", help="harm (default: asr, the largest of any attack)")
    parser.add_argument("--asha", nargs="?", const="zeroshot/top1", metavar="METRIC", help="stop the worse half early by this")
    parser.add_argument("--concurrent", type=int, help="at most so many trials at once (default: as many as fit)")


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The search's options that were typed."""
    from orchestrate import sweepdir

    return {name: value for name in sweepdir.Options.__dataclass_fields__ if (value := getattr(args, name)) is not None}


def _options(args: argparse.Namespace) -> Options:
    """ValueError also for an option that the chosen search does not look at."""
    from orchestrate import sweepdir

    given = _given(args)
    options = sweepdir.Options(**given)
    for name, searches in (("samples", ("random", "optuna")), ("seed", ("random", "optuna")), ("sampler", ("optuna",))):
        if name in given and options.search not in searches:
            wanted = " or ".join(f"--search {search}" for search in searches)
            raise ValueError(f"--{name} says nothing to --search {options.search}: give {wanted} with it, or leave it.")
    return options


def search_words(args: argparse.Namespace) -> list[str]:
    """The options that were typed, checked, to be typed again."""
    _options(args)
    return [word for name, value in _given(args).items() for word in (f"--{name}", str(value))]


def _sweep(args: argparse.Namespace, source: Source) -> None:
    asking = _asking(args)
    space = axes.read({name: source(name) for name in asking.recipes}, asking.words)
    if args.dry:
        return _list(asking, space)
    from orchestrate import sweepdir
    from orchestrate.sweep import run_sweep

    folder = run_sweep(asking, space, fresh=not args.resume)
    print(f"sweep: {folder}")
    trials = sweepdir.events(folder).values()
    if failed := sum(trial.state == sweepdir.FAILED for trial in trials):
        raise RuntimeError(f"{failed} of {len(trials)} trials failed; {folder / sweepdir.TRIALS} says of what. The others are kept.")


def _compare(args: argparse.Namespace) -> None:
    from orchestrate import compare, measure

    folders = [Path(run) for run in args.runs]
    runs = compare.load(folders)
    if args.format not in compare.FORMATS:
        raise ValueError(f"--format {args.format}: choose one of {', '.join(compare.FORMATS)}.")
    if args.matrix:
        _matrix(args, runs)
        return
    by = [compare.check_path(path, runs) for path in _listed(args.by)] or compare.varying(runs)
    names = [measure.check(name, compare.known(runs)) for name in _listed(args.metric)] or compare.metrics(runs)
    groups = compare.group(runs, by)
    print(compare.table(groups, names, args.format))
    if args.format == "text" and (note := compare.averaged(runs, by)):
        print(f"\n{note}")
    if args.out:
        for file in _written(Path(args.out), folders, runs, groups, names, _listed(args.by)):
            print(f"wrote {file}")


def _matrix(args: argparse.Namespace, runs: list[compare.Run]) -> None:
    from orchestrate import compare_matrix

    if args.by or args.metric:
        raise ValueError("--matrix has lines and columns of its own: leave --by and --metric.")
    if args.format == "csv":
        raise ValueError("--matrix --format csv: its cells are texts. Choose text, markdown or latex, or leave --matrix.")
    found = compare_matrix.arranged(runs)
    print(compare_matrix.table(found, args.format))
    for file in compare_matrix.save(found, Path(args.out)) if args.out else []:
        print(f"wrote {file}")


def _written(
    out: Path, folders: list[Path], runs: list[compare.Run], groups: list[compare.Group], names: list[str], by: list[str]
) -> list[Path]:
    """Every form of the comparison, in a folder."""
    from orchestrate import compare, compare_page, compare_plots

    out.mkdir(parents=True, exist_ok=True)
    files = [out / "table.csv", out / "table.md", out / "table.tex"]
    for file, form in zip(files, ("csv", "markdown", "latex"), strict=True):
        file.write_text(compare.table(groups, names, form) + "\n")
    harm = next((name for name in names if name.startswith("asr")), compare_plots.HARM)
    advice = compare_page.advised(runs)
    files += compare_plots.save(compare_plots.Figures(runs, harm=harm, chosen=advice.setting if advice else None, by=by), out)
    return [*files, compare_page.write(folders, out / "report.html", runs, by)]


def _recommend(args: argparse.Namespace) -> None:
    from orchestrate import compare, recommend

    conditions = [recommend.condition(text) for text in args.conditions]
    runs = compare.load([Path(args.sweep)])
    print(recommend.recommend(runs, conditions, args.cost).sentence)
    for text in recommend.caveats(runs):
        print(f"Doubt: {text}")


def _listed(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _asking(args: argparse.Namespace) -> Asking:
    """What is asked for, by words or by the directory of a sweep."""
    from orchestrate import sweepdir

    folder = Path(args.what)
    if os.path.isdir(folder):  # False for many recipes by comma, which are too long for a file's name; Path.is_dir raises
        if not args.resume or args.overrides:
            raise ValueError(f"{folder} is a directory: `antidote sweep {folder} --resume` goes on with the sweep in it.")
        return _again(folder, _given(args))
    options, asked = _options(args), sweeps.ask(args.what, args.overrides)
    return sweepdir.Asking(asked.name, asked.recipes, asked.words, options)


def _again(folder: Path, given: Mapping[str, Any]) -> Asking:
    """What a sweep's directory asks for; how many trials run at once may be another number each time."""
    from orchestrate import sweepdir

    asking = sweepdir.asked(folder)
    if others := [f"--{name}" for name in given if name != "concurrent"]:
        raise ValueError(
            f"{folder} goes on as it was asked for, and takes --concurrent only: leave {' and '.join(others)}, or type the whole command "
            "of the sweep that you want; what is finished is not run again."
        )
    return replace(asking, options=replace(asking.options, **given))


def _list(asking: Asking, space: axes.Space) -> None:
    from orchestrate import search

    trials: Sequence[axes.Trial] = search.listed(space, asking.options)
    for trial in trials:
        print(f"{trial.recipe.identity}  {trial.label}")
    if not trials:
        print(f"{asking.options.samples} settings, drawn by {asking.options.search} from {', '.join(map(str, space.axes))}")
    else:
        print(f"{len(trials)} trials")
