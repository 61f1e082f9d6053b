"""Attacks × defences: a line for each attack, a column for each defence, as a table and as a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from orchestrate import recipes
from orchestrate.compare import Run, cell, estimate, laid_out, order
from orchestrate.compare_plots import squares
from orchestrate.report_plots import on_paper
from orchestrate.report_text import MISSING, attacks, defence, finite, percent, poison, success, undefended

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACCURACY = "zero-shot, mean of the attacks"


@dataclass(frozen=True)
class Line:
    """One thing that an attack measures: `metric` (asr/NAME), and the runs of each column, which are seeds of one setting."""

    name: str
    poison: str
    metric: str
    cells: tuple[tuple[Run, ...], ...]


@dataclass(frozen=True)
class Matrix:
    """`accuracy`: of each column the mean over its attacks of their mean over seeds; None where it was not measured."""

    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    accuracy: tuple[float | None, ...]


def arranged(runs: Sequence[Run]) -> Matrix:
    """Runs by attack and defence, the undefended first. A run that measures several attacks has a line for each."""
    runs = sorted(runs, key=lambda run: not undefended(run.result))
    plans, columns = (
        told_apart(runs, [planted(run) for run in runs], "attack"),
        told_apart(runs, [defence(r.result) for r in runs], "defense"),
    )
    cells: dict[tuple[str, str], dict[str, list[Run]]] = {}
    for run, plan, column in zip(runs, plans, columns, strict=True):
        for name in attacks([run.result]):
            cells.setdefault((plan, name), {}).setdefault(column, []).append(run)
    heads, lines = tuple(dict.fromkeys(columns)), []
    for (plan, name), found in sorted(cells.items()):
        amounts = dict.fromkeys(poison(run.result) for some in found.values() for run in some)
        shown = plan if len([other for other in cells if other[0] == plan]) == 1 else f"{plan}: {name}"
        lines.append(Line(shown, ", ".join(amounts), f"asr/{name}", tuple(tuple(found.get(column, ())) for column in heads)))
    alike: dict[tuple[str, str], list[Run]] = {}
    for run, plan, column in zip(runs, plans, columns, strict=True):
        alike.setdefault((column, plan), []).append(run)
    accuracy = tuple(_accuracy([some for (column, _), some in alike.items() if column == head]) for head in heads)
    return Matrix(heads, tuple(lines), accuracy)


def table(found: Matrix, form: str) -> str:
    """Attack success as counted in one run, or as the mean over seeds, and its poison; last the accuracy. As text, Markdown or LaTeX."""
    rows = [[line.name, line.poison, *(_cell(runs, line.metric) for runs in line.cells)] for line in found.lines]
    if any(value is not None for value in found.accuracy):
        rows.append([ACCURACY, "", *(MISSING if value is None else percent(value) for value in found.accuracy)])
    return laid_out(["attack", "poison", *found.columns], rows, form, by=2)


def save(found: Matrix, folder: Path) -> list[Path]:
    """matrix.md and .tex, and the heat map as PDF and PNG. The files written."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "matrix.md", folder / "matrix.tex"]
    for file, form in zip(files, ("markdown", "latex"), strict=True):
        file.write_text(table(found, form) + "\n")
    return [*files, *on_paper(picture, found, folder / "matrix")]


def picture(found: Matrix) -> Figure:
    """Attack success in percent, green where the attack fails, grey where it was not run; below it accuracy, green where it is high."""
    from matplotlib.figure import Figure

    height, wide = 0.27 * (len(found.lines) + 1) + 1.1, max(1.15, 0.085 * max(map(len, found.columns)))
    figure = Figure(figsize=(3.2 + wide * len(found.columns), height), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[max(1, len(found.lines)), 1])
    success_of = [[estimate(runs, line.metric) for runs in line.cells] for line in found.lines]
    _percents(above, [[None if e is None else e.mean for e in row] for row in success_of], "RdYlGn_r", (0.0, 1.0))
    above.set_yticks(range(len(found.lines)), [f"{line.name}: {line.poison}" for line in found.lines])
    above.set_xticks(range(len(found.columns)), found.columns)
    above.xaxis.tick_top()
    above.set_title("attack success, %", fontsize=8.5, loc="left", x=-0.02, ha="right", y=1.0)
    known = [value for value in found.accuracy if value is not None]
    _percents(below, [list(found.accuracy)], "YlGn", (0.0, max(known, default=1.0)))
    below.set_yticks([0], ["zero-shot accuracy, %"])
    below.set_xticks([])
    return figure


def _percents(axes: Axes, numbers: Sequence[Sequence[float | None]], colors: str, limits: tuple[float, float]) -> None:
    shown = [[float("nan") if x is None else x for x in row] for row in numbers]
    texts = [[MISSING if x is None else f"{100 * x:.0f}" for x in row] for row in numbers]
    squares(axes, shown, texts, colors, limits, edgecolors="white", linewidth=0.6)
    axes.set_facecolor("#d8d8d8")
    axes.tick_params(length=0, labelsize=8.5)


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


def _cell(runs: Sequence[Run], metric: str) -> str:
    name = metric.removeprefix("asr/")
    if len(runs) <= 1:
        return str(success(runs[0].result, name)) if runs else MISSING
    cleans = [found.clean for run in runs if (found := success(run.result, name)) and found.clean is not None]
    text = f"{cell(estimate(runs, metric), metric)}, {len(runs)} runs"
    return f"{text}, clean {percent(fmean(cleans))}" if cleans else text


def _accuracy(attacks_of: Sequence[Sequence[Run]]) -> float | None:
    found = [[value for run in runs if (value := finite(run.result.get("zeroshot/top1"))) is not None] for runs in attacks_of]
    means = [fmean(values) for values in found if values]
    return fmean(means) if means else None
