"""The verbs on a trained model, repair and certify, and for a method of one's own, new. As in cli.py what is slow is imported late."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from orchestrate import recipe_file
from orchestrate.recipe import METHODS, from_dict, parse_overrides
from orchestrate.values import coerce

Verb = Callable[[str, Callable[..., Any], str], argparse.ArgumentParser]


def add(verb: Verb) -> None:
    repair = verb("repair", _repair, "fine-tune a poisoned checkpoint on trusted pairs, and score it before and after")
    _checkpoint(repair)
    repair.add_argument(
        "--clean", default="", metavar="DATA", help="trusted pairs (default: pairs of the recipe's data that it leaves alone)"
    )
    repair.add_argument("--recipe", default="", help="recipe.json whose data and attack are measured (default: the run directory's)")
    repair.add_argument("--out", default="repaired", help="folder for the model, its card and result.json (default: repaired)")
    repair.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of defense.*, data.* and evaluate.*")
    certify = verb("certify", _certify, "certified accuracy of a checkpoint's features against poison in the labelled set")
    _checkpoint(certify)
    certify.add_argument("--data", default="", help="labelled data set (default: the run directory's, else scenes)")
    certify.add_argument("--max", type=int, default=50, help="largest number of poisoned examples (default: 50)")
    certify.add_argument("--k", type=int, default=0, help="neighbours of kNN (default: half of an average class of the labelled set)")
    certify.add_argument(
        "--radius", type=float, default=0.0, help="of rNN, 1 - cosine (default: 5 %% of the pairs of test images are nearer)"
    )
    certify.add_argument("--shards", type=int, default=50, help="heads of the partitioned probe; 0 = none (default: 50)")
    certify.add_argument("--out", default="certificate", help="folder for table and plot (default: certificate)")
    certify.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of data.* and evaluate.*")
    new = verb("new", _new, "write a working attack or defence of your own into a file, to be changed")
    new.add_argument("kind", choices=["attack", "defense"])
    new.add_argument("name", metavar="NAME", help="such as keep_top: the file keep_top.py with the class KeepTop")


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a run directory, an export folder, or a state dict (.pt, .safetensors) with --model")
    parser.add_argument("--model", default=None, help="architecture of a bare state dict")


def _repair(args: argparse.Namespace) -> None:
    from orchestrate import repair

    checkpoint, own = repair.checkpoint_of(args.checkpoint)
    words = parse_overrides(args.overrides)
    recipe = repair.recipe_of(_tree(args.recipe, own, {"defense", *words}), words)
    if not (args.clean or args.recipe or own):
        raise ValueError("which pairs are trusted? Give --clean DATA, or --recipe with the recipe.json of the run that made the model.")
    result = repair.repair(checkpoint, args.model, recipe, repair.trusted_data(args.clean, words), Path(args.out))
    for line in repair.lines(result):
        print(line)
    print(f"repaired on {result['trusted']}, which this assumes to be free of poison")
    print(f"wrote {args.out}")


def _certify(args: argparse.Namespace) -> None:
    from orchestrate import certificates, repair

    checkpoint, own = repair.checkpoint_of(args.checkpoint)
    overrides = parse_overrides([*([f"data={args.data}"] if args.data else []), *args.overrides])
    tree = recipe_file.found(Path(own), METHODS) if own else {}
    kept = {key: value for key, value in tree.items() if key not in METHODS}  # neither has a part in it, so no code of theirs is loaded
    if {"data", "data.path"} & overrides.keys():
        kept.pop("data", None)  # its size and split are of the run's own set
    recipe = from_dict({"name": "certify", **kept}, overrides).recipe
    settings = certificates.Settings(args.max, args.k, coerce(args.radius, float, "--radius"), args.shards)
    found = certificates.certify_checkpoint(checkpoint, args.model, recipe, settings)
    for line in certificates.lines(found):
        print(line)
    for file in certificates.write(found, Path(args.out)):
        print(f"wrote {file}")


def _new(args: argparse.Namespace) -> None:
    from orchestrate import scaffold

    file, command = scaffold.write(args.kind, args.name, Path())
    print(f"wrote {file}\ntry it: {command}")


def _tree(named: str, own: str, told: Collection[str]) -> dict[str, Any]:
    """A recipe.json that the user named, or that of the checkpoint's directory, where `told` says which methods the words choose."""
    return recipe_file.read(Path(named)) if named else recipe_file.found(Path(own), told) if own else {}
