"""The command line. torch, ray and mlflow are imported inside the verbs that need them, so help answers at once."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrate import cli_audit, cli_cluster, cli_models, cli_sweeps, recipe_file, recipes, sweeps
from orchestrate.recipe import Recipe, Resolved, flatten, from_dict, parse_overrides


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 what the user can mend (one message on stderr), 130 interrupted, by Ctrl-C or SIGTERM."""
    args = parsed(argv)
    if not getattr(args, "verb", None):
        _parser().print_help()
        return 0
    try:
        code = args.verb(args) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `antidote ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, RuntimeError, OSError) as error:
        print(f"antidote: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("antidote: interrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
        return 130


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """A command line, read. What argparse refuses ends the process with code 2 and the usage."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # key=value after an option, which argparse leaves over
        args.overrides += rest
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="antidote", description="Poison-robust CLIP pre-training on Ray: attacks, defences, one table.")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")

    def verb(name: str, call: Callable[..., Any], help: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help, description=help)
        sub.set_defaults(verb=call)
        return sub

    def recipe_verb(name: str, call: Callable[..., Any], help: str) -> argparse.ArgumentParser:
        sub = verb(name, call, help)
        sub.add_argument("recipe", help="a recipe's name (antidote ls), a recipe.json, or mlflow:RUN_ID")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, such as defense.every=1")
        return sub

    verb("ls", _ls, "list recipes, attacks, defences and models")
    recipe_verb("show", _show, "print a resolved recipe: values, where each came from, identity, resources")
    run = recipe_verb("run", _run, "poison, pre-train, score, report; continues what was interrupted")
    run.add_argument("--force", action="store_true", help="run again although this identity is finished")
    poison = recipe_verb("poison", _poison, "plan the attack only: manifest.parquet and a contact sheet")
    poison.add_argument("--out", default="", help="folder (default: poison-<identity>)")
    cli_sweeps.add(verb, source)
    cli_audit.add(verb, source)
    cli_cluster.add(verb, source)
    score = verb("eval", _eval, "score any open_clip checkpoint")
    score.add_argument("checkpoint", help="an export folder, or a state dict (.pt, .safetensors) with --model")
    score.add_argument("--model", default=None, help="architecture of a bare state dict")
    score.add_argument("--data", default="", help="data set (default: the recipe's, else scenes)")
    score.add_argument("--recipe", default="", help="recipe.json whose attack is probed (default: clean figures only)")
    score.add_argument("--out", default="", help="also write the figures as JSON, with CLIP_benchmark's keys")
    score.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of data.* and evaluate.*")
    cli_models.add(verb)
    report = verb("report", _report, "one HTML page from finished run directories")
    report.add_argument("runs", nargs="+", help="run directories")
    report.add_argument("--out", default="report.html")
    ui = verb("ui", _ui, "MLflow's own UI on localhost for the project's store")
    ui.add_argument("--uri", default="", help="tracking store (default: runs/mlflow.db)")
    ui.add_argument("--port", type=int, default=5000)
    track = verb("track", _track, "track sync RUN…: send MLflow what it has not got")
    track.add_argument("what", choices=["sync"])
    track.add_argument("runs", nargs="+", help="run directories")
    track.add_argument("--uri", default="", help="address of their MLflow, where it holds a password (default: MLFLOW_TRACKING_URI)")
    return parser


def resolved(name: str, words: Sequence[str]) -> list[Resolved]:
    """A recipe's name, a recipe.json or mlflow:RUN_ID, with overrides → recipes."""
    return source(name)(parse_overrides(words))


def source(name: str) -> Callable[[Mapping[str, Any]], list[Resolved]]:
    """A recipe's name, a recipe.json or mlflow:RUN_ID → what makes its recipes from overrides."""
    if name.startswith("mlflow:"):
        return lambda overrides: [from_dict(*_recorded(name.removeprefix("mlflow:"), dict(overrides)))]
    if name.endswith(".json"):
        tree = recipe_file.read(Path(name))
        return lambda overrides: [from_dict(tree, overrides)]
    return lambda overrides: recipes.get(name, overrides)


def _recorded(run_id: str, overrides: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run's recipe from MLflow; `track.uri` says which MLflow, and is no override of it."""
    from orchestrate.track import load_recipe

    return load_recipe(str(overrides.pop("track.uri", "")), run_id), overrides


def _ls(args: argparse.Namespace) -> None:
    from orchestrate import plugins

    print("Recipes: <method>[-<attack>][-<scale>], such as roclip, roclip-badnets, clip-targeted-smoke\n")
    default = lambda name, own: " (default)" if name == own else ""
    tables = {
        "methods": {name: part.shows for name, part in recipes.METHODS.items()},
        "attacks": {name: f"{part.shows}{default(name, recipes.ATTACK)}" for name, part in recipes.ATTACKS.items()},
        "scales": {name: f"{scale.shows}; {scale.time}{default(name, recipes.SCALE)}" for name, scale in recipes.SCALES.items()},
        "suites": {name: f"{shows} ({', '.join(members)})" for name, (shows, members, _) in recipes.SUITES.items()},
        "sweeps": {name: sweeps.shows(name) for name in sweeps.SWEEPS},
    }
    width = max(len(name) for table in tables.values() for name in table)
    for title, table in tables.items():
        print(f"  {title}")
        for name, shows in table.items():
            print(f"    {name:<{width}}  {shows}")
    print(f"\nAttack plug-ins:  {', '.join(plugins.names('attack'))}; join with +, or ./file.py:Class")
    print(f"Defence plug-ins: {', '.join(plugins.names('defense'))}; or ./file.py:Class")
    print(f"Our small models: {', '.join(sorted(p.stem for p in _configs()))}; or any open_clip architecture")


def _configs() -> list[Path]:
    from orchestrate import ROOT

    return list((ROOT / "models" / "configs").glob("*.json"))


def _show(args: argparse.Namespace) -> None:
    from orchestrate import capacity, prepared

    for one in resolved(args.recipe, args.overrides):
        recipe = one.recipe
        print(f"{recipe.name}   identity {recipe.identity}   directory {recipe.cluster.runs}/{recipe.directory}")
        for path, value in flatten(recipe.as_dict()).items():
            origin = one.origins.get(path, "")
            print(f"  {path:<28} {_value(value):<34} {'' if origin == 'default' else origin}".rstrip())
        print(f"  resources: {capacity.plan(*prepared.needs(recipe))}\n")


def _value(value: Any) -> str:
    """As one would write it in an override."""
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def _run(args: argparse.Namespace) -> None:
    found = resolved(args.recipe, args.overrides)
    for one in found:  # every plan is checked before the first run starts
        _check(one.recipe)
    from orchestrate import suite
    from orchestrate.report import text_table, write_report

    results = suite.run([one.recipe for one in found], force=args.force)
    print(text_table(results))
    folders = [Path(result["run"]) for result in results]
    print("\n" + "\n".join(f"run: {folder}" for folder in folders))
    for audit in (folder / "audit" / "audit.html" for folder in folders):
        if audit.exists():
            print(f"audit: {audit}")
    page = folders[0] / "report.html"
    if len(found) > 1:
        page = folders[0].parent / f"{args.recipe}-{_joint(found)}" / "report.html"
        page.parent.mkdir(exist_ok=True)
        write_report(folders, page)
    if page.exists():
        print(f"report: {page}")


def _joint(found: Sequence[Resolved]) -> str:
    import hashlib

    return hashlib.blake2b("".join(one.recipe.identity for one in found).encode(), digest_size=4).hexdigest()


def _check(recipe: Recipe) -> None:
    """What can be known to be wrong before anything is read."""
    if recipe.track.uri and recipe.track.uri != "none":
        from orchestrate import mlflow_uri

        mlflow_uri.resolve(recipe.track.uri, Path(recipe.cluster.runs).absolute())


def _poison(args: argparse.Namespace) -> None:
    from orchestrate import poisoning

    for one in resolved(args.recipe, args.overrides):
        out = Path(args.out or f"poison-{one.recipe.identity[:8]}")
        for line in poisoning.write(one.recipe, out):
            print(line)


def _eval(args: argparse.Namespace) -> None:
    from orchestrate import scoring

    overrides = parse_overrides([*([f"data={args.data}"] if args.data else []), *args.overrides])
    base = recipe_file.read(Path(args.recipe)) if args.recipe else {"name": "eval"}
    recipe = from_dict(base, overrides).recipe
    metrics, record = scoring.score(args.checkpoint, args.model, recipe)
    for key, value in metrics.items():
        print(f"{key:<28} {value:.4f}" if isinstance(value, float) else f"{key:<28} {value}")
    if args.out:
        Path(args.out).write_text(json.dumps({**record, "antidote": metrics}, indent=1))
        print(f"wrote {args.out}")


def _report(args: argparse.Namespace) -> None:
    from orchestrate.report import write_report

    print(write_report([Path(run) for run in args.runs], Path(args.out)))


def _ui(args: argparse.Namespace) -> int:
    import subprocess

    from orchestrate.track import ui

    return subprocess.call(ui(args.uri, args.port))


def _track(args: argparse.Namespace) -> None:
    from orchestrate import rundir
    from orchestrate.track import Tracker, address

    for run in args.runs:
        if not Path(run).is_dir():
            raise ValueError(f"no run directory {run}.")
        tracker = Tracker.load(Path(run), address(Path(run), args.uri))
        if (Path(run) / rundir.RESULT).exists() and not tracker.ended:  # killed between its result and the end of its MLflow run
            tracker.owe("finished", rundir.artifacts(Path(run)))
        print(f"{run}: {tracker.replay()} lines sent")
