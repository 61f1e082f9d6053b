"""The figures of a comparison: two axes as a heat map, attack success against poison, and what there is to choose from (Pareto)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrate import measure
from orchestrate.compare import Estimate, Group, Run, group, is_share, order, varying
from orchestrate.recommend import pareto, said, settings
from orchestrate.report_plots import PALETTE, on_paper, svg
from orchestrate.report_text import MISSING, finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UTILITY, HARM = "zeroshot/top1", "asr"
PANELS = 4  # heat maps side by side, one for each kind of poison
LINES = 16  # settings drawn as lines: more is a tangle
LINE_STYLES = ("-", "--", ":")


@dataclass(frozen=True)
class Figures:
    """What is drawn: `runs`, the two metrics, the setting to mark, and the two axes of the heat map (found where empty)."""

    runs: Sequence[Run]
    utility: str = UTILITY
    harm: str = HARM
    chosen: Group | None = None
    by: Sequence[str] = ()


def drawings(figures: Figures) -> dict[str, str]:
    """Name → SVG text for a page; without those that the runs do not allow."""
    found = {name: svg(draw, figures) for name, draw in DRAW.items()}
    return {name: text for name, text in found.items() if text}


def save(figures: Figures, folder: Path) -> list[Path]:
    """The same as PDF and PNG for a paper. The files written."""
    folder.mkdir(parents=True, exist_ok=True)
    return [file for name, draw in DRAW.items() for file in on_paper(draw, figures, folder / name)]


# --- two axes ----------------------------------------------------------------------------------------------------------------------


def plane(runs: Sequence[Run], by: Sequence[str] = ()) -> tuple[str, str] | None:
    """The two paths of a heat map: those asked for, else frequency × pool size, else the first two that vary."""
    own = [path for path in varying(runs) if path.partition(".")[0] not in ("attack", "data")]
    usual = [path for path in ("defense.every", "defense.pool_size") if path in own]
    paths = list(dict.fromkeys([*(path for path in by if path in varying(runs)), *usual, *own, *varying(runs)]))
    return (paths[0], paths[1]) if len(paths) > 1 else None


def _heat(figures: Figures) -> Figure | None:
    runs, axes_of = figures.runs, plane(figures.runs, figures.by)
    metrics = [m for m in (figures.harm, figures.utility) if any(measure.value(r.result, m) is not None for r in runs)]
    if axes_of is None or not metrics:
        return None
    from matplotlib.figure import Figure

    panels = _panels(runs, axes_of)
    figure = Figure(figsize=(1.2 + 3.1 * len(panels), 0.5 + 2.5 * len(metrics)), layout="constrained")
    grid = figure.subplots(len(metrics), len(panels), squeeze=False)
    for row, metric in zip(grid, metrics, strict=True):
        limits = _limits(panels, axes_of, metric)
        for axes, (title, some) in zip(row, panels, strict=True):
            _heat_map(axes, some, axes_of, metric, limits)
            axes.set_title(f"{said(metric)}{', ' * bool(title)}{title}", fontsize=9.5)
    return figure


def _panels(runs: Sequence[Run], axes_of: tuple[str, str]) -> list[tuple[str, Sequence[Run]]]:
    """A map for each value of the poison, if few; else one that averages."""
    poison = [path for path in varying(runs) if path.startswith("attack.") and path not in axes_of]
    if len(poison) != 1:
        return [("", runs)]
    groups = group(runs, poison)
    return [(g.label, g.runs) for g in groups] if len(groups) <= PANELS else [("", runs)]


def _limits(panels: Sequence[tuple[str, Sequence[Run]]], axes_of: tuple[str, str], metric: str) -> tuple[float, float]:
    """The ends of the colours, alike in all panels: 0 and 1 for what is bad, so that green is good, else the values' own."""
    if is_share(metric) and measure.lower_is_better(metric):
        return 0.0, 1.0
    found = [e.mean for _, runs in panels for g in group(runs, axes_of) if (e := g.estimate(metric))]
    return min(found, default=0.0), max(found, default=1.0)


def _heat_map(axes: Axes, runs: Sequence[Run], axes_of: tuple[str, str], metric: str, limits: tuple[float, float]) -> None:
    """Rows: the first path's values; columns: the second's; a number in each cell, grey where nothing was measured."""
    ys, xs = (sorted({run.at(path) for run in runs} - {MISSING}, key=order) for path in axes_of)
    known = {tuple(g.at.values()): g.estimate(metric) for g in group(runs, axes_of)}
    cells = [[known.get((y, x)) for x in xs] for y in ys]
    numbers = [[float("nan") if e is None else e.mean for e in row] for row in cells]
    colors = "RdYlGn_r" if measure.lower_is_better(metric) else "YlGn"
    squares(axes, numbers, [[_told(e, metric) for e in row] for row in cells], colors, limits)
    axes.set_xticks(range(len(xs)), xs)
    axes.set_yticks(range(len(ys)), ys)
    axes.set_xlabel(axes_of[1])
    axes.set_ylabel(axes_of[0])


def _told(e: Estimate | None, metric: str) -> str:
    if e is None:
        return MISSING
    if not is_share(metric):
        return f"{e.mean:.3g}"
    return f"{100 * e.mean:.0f} %" + ("" if e.low is None or e.high is None else f"\n[{100 * e.low:.0f}, {100 * e.high:.0f}]")


def squares(
    axes: Axes, numbers: Sequence[Sequence[float]], texts: Sequence[Sequence[str]], colors: str, limits: tuple[float, float], **lines: Any
) -> None:
    """Rows of coloured squares from the top, a text in each; no colour for nan. `lines`: between them, as pcolormesh takes them."""
    if numbers:
        edges = [[k - 0.5 for k in range(count + 1)] for count in (len(numbers[0]), len(numbers))]
        # Not imshow: its picture inside the SVG is one that a browser, which reads the SVG as part of the page, does not show.
        axes.pcolormesh(*edges, numbers, cmap=colors, alpha=0.75, vmin=limits[0], vmax=limits[1], **lines)
    axes.invert_yaxis()
    for i, row in enumerate(texts):
        for k, text in enumerate(row):
            axes.text(k, i, text, ha="center", va="center", fontsize=8.5)
    for spine in axes.spines.values():
        spine.set_visible(False)


# --- success against poison --------------------------------------------------------------------------------------------------------


def _by_poison(figures: Figures) -> Figure | None:
    """One line a setting: attack success against the number of poisoned pairs, with intervals."""
    lines = [(g, _points(g, figures.harm)) for g in settings(figures.runs)]
    lines = [(g, points) for g, points in lines if points]
    if not any(len(points) > 1 for _, points in lines):
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    axes = figure.subplots()
    for i, (g, points) in enumerate(lines[:LINES]):
        color, style = PALETTE[i % len(PALETTE)], LINE_STYLES[i // len(PALETTE) % len(LINE_STYLES)]
        x, mean = [p[0] for p in points], [p[1] for p in points]
        axes.plot(x, mean, color=color, linestyle=style, marker="o", markersize=4, linewidth=1.8, label=short(g))
        axes.fill_between(x, [p[2] for p in points], [p[3] for p in points], color=color, alpha=0.12, linewidth=0)
    axes.set_xlabel("poisoned pairs")
    axes.set_xscale("log" if min(p[0] for _, points in lines for p in points) > 0 else "linear")
    ticks = sorted({p[0] for _, points in lines for p in points})
    axes.set_xticks(ticks, [f"{int(t):,}" for t in ticks])
    axes.minorticks_off()
    _share(axes, "y", said(figures.harm))
    if len(lines) > 1:
        figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _points(setting: Group, metric: str) -> list[tuple[float, float, float, float]]:
    """(poisoned pairs, mean, low, high), ascending."""
    counts = sorted({c for run in setting.runs if (c := finite(run.result.get("poison/count"))) is not None})
    found = []
    for count in counts:
        e = Group({}, tuple(run for run in setting.runs if finite(run.result.get("poison/count")) == count)).estimate(metric)
        if e is not None:
            found.append((count, e.mean, e.mean if e.low is None else e.low, e.mean if e.high is None else e.high))
    return found


# --- what there is to choose from ----------------------------------------------------------------------------------------------------


def front(runs: Sequence[Run], utility: str = UTILITY, harm: str = HARM) -> tuple[list[Group], list[Group]]:
    """(settings that no other beats in both metrics, in ascending harm; all settings that have both)."""
    every = [g for g in settings(runs) if g.estimate(utility) and g.estimate(harm)]
    points = [(u.mean, h.mean) for g in every if (u := g.estimate(utility)) and (h := g.estimate(harm))]
    return [every[i] for i in pareto(points)], every


def _front(figures: Figures) -> Figure | None:
    best, every = front(figures.runs, figures.utility, figures.harm)
    if len(every) < 2:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    axes = figure.subplots()
    named: set[tuple[float, float]] = set()
    for g in every:
        u, h = g.estimate(figures.utility), g.estimate(figures.harm)
        assert u is not None and h is not None
        chosen = figures.chosen is not None and g.at == figures.chosen.at
        color = PALETTE[3] if chosen else PALETTE[2] if g in best else PALETTE[5]
        mark: Any = {"fmt": "*", "markersize": 11} if chosen else {"fmt": "o", "markersize": 5}
        axes.errorbar(h.mean, u.mean, _spread(u), _spread(h), color=color, elinewidth=0.7, **mark)
        if (g in best or chosen) and (u.mean, h.mean) not in named:
            named.add((u.mean, h.mean))
            axes.annotate(short(g), (h.mean, u.mean), xytext=(6, 6), textcoords="offset points", fontsize=8)
    line = [(h.mean, u.mean) for g in best if (u := g.estimate(figures.utility)) and (h := g.estimate(figures.harm))]
    axes.plot([x for x, _ in line], [y for _, y in line], color=PALETTE[2], linewidth=1.2, alpha=0.6, drawstyle="steps-post", zorder=0)
    _share(axes, "x", f"{said(figures.harm)}  (less is better)")
    axes.set_ylabel(said(figures.utility))
    axes.grid(axis="y")
    return figure


def short(g: Group) -> str:
    """`every=1 pool_size=0.02`: a label without the sections, where the last words tell the paths apart."""
    ends = [path.rpartition(".")[2] for path in g.at]
    names = ends if len(set(ends)) == len(ends) else list(g.at)
    return " ".join(f"{name}={value}" for name, value in zip(names, g.at.values(), strict=True) if value != MISSING) or g.label


def _spread(e: Estimate) -> list[list[float]]:
    """The lengths of an error bar, down and up."""
    low, high = (e.mean if end is None else end for end in (e.low, e.high))
    return [[max(0.0, e.mean - low)], [max(0.0, high - e.mean)]]


def _share(axes: Axes, which: str, label: str) -> None:
    ticks: Any = ([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
    if which == "x":
        axes.set_xlim(-0.03, 1.05)
        axes.set_xticks(*ticks)
        axes.set_xlabel(label)
    else:
        axes.set_ylim(-0.03, 1.05)
        axes.set_yticks(*ticks)
        axes.set_ylabel(label)
    axes.grid(axis=which)  # type: ignore[arg-type]


DRAW: dict[str, Callable[[Figures], Figure | None]] = {"heatmap": _heat, "poison": _by_poison, "pareto": _front}
