"""Attacks × defences as one table: a line for each attack, a column for each defence."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from orchestrate import recipes
from orchestrate.compare import Run, cell, estimate, order
from orchestrate.report_text import MISSING, attacks, defence, finite, percent, poison, success, undefended

ACCURACY = "zero-shot, mean of the lines"


def matrix(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: each attack's success under each defence, as counted in one run or as the mean over seeds, and its poison.

    A run that measures several attacks has a line for each. The last line is each defence's accuracy, where it was measured.
    """
    runs = sorted(runs, key=lambda run: not undefended(run.result))
    plans, columns = (
        told_apart(runs, [planted(run) for run in runs], "attack"),
        told_apart(runs, [defence(r.result) for r in runs], "defense"),
    )
    cells: dict[tuple[str, str], dict[str, list[Run]]] = {}
    for run, plan, column in zip(runs, plans, columns, strict=True):
        for name in attacks([run.result]):
            cells.setdefault((plan, name), {}).setdefault(column, []).append(run)
    heads, rows = list(dict.fromkeys(columns)), []
    for (plan, name), found in sorted(cells.items()):
        amounts = dict.fromkeys(poison(run.result) for some in found.values() for run in some)
        shown = plan if len([other for other in cells if other[0] == plan]) == 1 else f"{plan}: {name}"
        rows.append([shown, ", ".join(amounts), *(_cell(found.get(column, []), name) for column in heads)])
    means = [_accuracy([run for run, column in zip(runs, columns, strict=True) if column == head]) for head in heads]
    return ["attack", "poison", *heads], [*rows, *([[ACCURACY, "", *means]] if set(means) != {MISSING} else [])]


def planted(run: Run) -> str:
    """The attack by the name a recipe has for it (two patterns of one method are two), else by its method."""
    method = str(run.result.get("attack") or "none")
    try:
        name = recipes.parts(str(run.result.get("recipe")))[1]
    except ValueError:
        return method
    return name if recipes.ATTACKS[name].layer["attack"] == method else method


def told_apart(runs: Sequence[Run], names: Sequence[str], section: str) -> list[str]:
    """The names, with the values of the section's fields in which runs of one name differ: `RoCLIP (every=2)`."""
    out = []
    for run, name in zip(runs, names, strict=True):
        alike = [other for other, its in zip(runs, names, strict=True) if its == name]
        paths = sorted({path for other in alike for path in other.flat if path.startswith(f"{section}.")}, key=order)
        differ = [path for path in paths if len({other.at(path) for other in alike} - {MISSING}) > 1]
        values = ", ".join(f"{path.removeprefix(f'{section}.')}={run.at(path)}" for path in differ)
        out.append(f"{name} ({values})" if values else name)
    return out


def _cell(runs: Sequence[Run], name: str) -> str:
    if len(runs) <= 1:
        return str(success(runs[0].result, name)) if runs else MISSING
    cleans = [found.clean for run in runs if (found := success(run.result, name)) and found.clean is not None]
    text = f"{cell(estimate(runs, f'asr/{name}'), f'asr/{name}')}, {len(runs)} runs"
    return f"{text}, clean {percent(fmean(cleans))}" if cleans else text


def _accuracy(runs: Sequence[Run]) -> str:
    found = [value for run in runs if (value := finite(run.result.get("zeroshot/top1"))) is not None]
    return percent(fmean(found)) if found else MISSING
