"""The verb `audit`. As in cli.py nothing slow is imported before it needs it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orchestrate.recipe import DROP, Recipe, Resolved, parse_overrides, resolve
from orchestrate.recipes import OWN
from orchestrate.values import coerce

Verb = Callable[[str, Callable[..., Any], str], argparse.ArgumentParser]
Source = Callable[[str], Callable[[Mapping[str, Any]], list[Resolved]]]


def add(verb: Verb, source: Source) -> None:
    """The verb's arguments. `source`: a recipe's name → what makes its recipes from overrides."""
    audit = verb(
        "audit", lambda args: _audit(args, source), "rank the pairs of a data set by how suspicious they are, and write a clean set"
    )
    audit.add_argument("what", metavar="data=PATH|RECIPE", help="the set; or a recipe, whose poison tells what the scores are worth")
    audit.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, such as data.caption_column=text model=RN50")
    audit.add_argument("--out", default="audit", help="folder; an audit that was killed goes on in it (default: audit)")
    audit.add_argument("--checkpoint", default="", help="model to score with (default: one of its own, trained on the set)")
    audit.add_argument("--model", default=None, help="architecture, where the checkpoint is a bare state dict")
    audit.add_argument("--epochs", type=int, default=0, help="of the own model (default: 2 to 8, by the number of pairs)")
    audit.add_argument("--batch", type=int, default=512, help="pairs among which neighbours are sought (default: 512)")
    audit.add_argument("--drop", default=str(DROP), help=f"pairs that the clean set leaves out, a share or a count (default: {DROP:g})")
    audit.add_argument("--rounds", default="", metavar="RUN", help="a run's directory: counts how often its matching moved a caption")
    audit.add_argument("--copy-gb", type=float, default=2.0, help="larger sets get a list of ids instead of a clean copy (default: 2)")


def chosen(what: str, overrides: list[str], source: Source) -> Recipe:
    """The recipe to audit by, from `data=PATH` and overrides or from a recipe's name. ValueError for several, or for epochs as a key."""
    words = parse_overrides([what, *overrides] if "=" in what else overrides)
    if "train.epochs" in words:
        raise ValueError("train.epochs is not what an audit goes by: use --epochs, for the model it trains itself.")
    if "=" in what:
        return resolve("audit", [("data of your own", OWN), ("command line", words)]).recipe
    found = source(what)(words)
    if len(found) > 1:
        raise ValueError(f"{what} names {len(found)} recipes: audit one of them, {', '.join(one.recipe.name for one in found)}.")
    return found[0].recipe


def _audit(args: argparse.Namespace, source: Source) -> None:
    recipe = chosen(args.what, args.overrides, source)
    from orchestrate import audit

    drop, copy_gb = coerce(args.drop, int | float, "--drop"), coerce(args.copy_gb, float, "--copy-gb")
    asked = {name: getattr(args, name) for name in ("checkpoint", "model", "epochs", "batch", "rounds")}
    facts = audit.audit(recipe, Path(args.out), audit.Options(drop=drop, copy_gb=copy_gb, **asked))
    for line in told({**facts, "out": args.out}):
        print(line)


def told(facts: Mapping[str, Any]) -> list[str]:
    """What an audit found, in lines."""
    lines = [
        f"{facts['pairs']:,} pairs of {facts['data']} scored; the {facts['removed']:,} most suspicious ones are left out of the clean set"
    ]
    if facts["quarantined"]:
        lines += [f"{facts['quarantined']:,} rows could not be used and are set aside, with reasons in {facts['out']}/quarantine.parquet"]
    words = ", ".join(f"{word} ({here}/{of})" for word, here, of in facts["words"][:3])
    lines += [f"their captions share: {words}"] if words else []
    lines += [f"{facts['out']}/audit.html shows them; {facts['out']}/scores.parquet ranks all; clean set: {facts['out']}/{facts['clean']}"]
    lines += [f"  no copy of the set: {facts['why']}"] if facts["why"] else []
    for part, scores in facts.get("measured", {}).items():
        first = next(iter(scores.values()))
        lines += [
            "",
            f"{part}: {first['poison']:,} of {first['pairs']:,} pairs poisoned; at 1 % removed {100 * first['ceiling']:.0f} % can be found",
        ]
        lines += [f"  {'score':<10} {'AUROC':>6} {'AP':>6} {'found':>6}"]
        for name, m in scores.items():
            lines.append(f"  {name:<10} {m['auroc']:6.3f} {m['average_precision']:6.3f} {100 * m['recall']:5.1f} %")
    return lines
