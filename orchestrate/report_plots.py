"""The figures of a report, as SVG text that sits inside the page.

Text and axes are drawn in the page's own colour (`currentColor`), so one drawing serves a light and a dark page, and words stay
words: they can be read out, searched and copied. `save` writes the same figures for a paper.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrate.report_text import Success, finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#d6455d", "#e09a2b", "#1f8fd1", "#2aa876", "#8a63d2", "#5f7f95", "#c2619f", "#7a8f2a")
DASHES: Any = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))  # zero-shot, then each attack
INK = "#010203"  # replaced by currentColor
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "antidote",  # the same run gives the same bytes
    "text.parse_math": False,  # names from data may hold a $
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.linewidth": 0.6,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True)
class Series:
    """What a figure knows of a run. accuracy: name → share or None; records: the lines of metrics.jsonl."""

    label: str
    color: str
    successes: Mapping[str, Success | None]
    accuracy: Mapping[str, float | None]
    records: Sequence[Mapping[str, Any]]


def outcome(series: Sequence[Series]) -> str | None:
    """Attack success beside accuracy, a bar for each run; None where nothing was measured."""
    return svg(_outcome, series)


def curves(series: Sequence[Series]) -> str | None:
    """Loss by epoch with robust epochs marked, and what was evaluated on the way; None where nothing was logged."""
    return svg(_curves, series)


def save(series: Sequence[Series], folder: Path) -> list[Path]:
    """The figures as PDF and PNG for a paper. The files written."""
    return [*on_paper(_outcome, series, folder / "outcome"), *on_paper(_curves, series, folder / "curves")]


def losses(records: Sequence[Mapping[str, Any]]) -> dict[int, tuple[float | None, bool]]:
    """Epoch → (mean loss, None where it was not finite; whether the epoch was robust)."""
    seen: dict[int, list[tuple[float | None, bool]]] = {}
    for record in records:
        epoch = finite(record.get("epoch"))
        if record.get("kind") == "train" and epoch is not None and "loss" in record:
            seen.setdefault(int(epoch), []).append((finite(record["loss"]), bool(record.get("robust"))))
    out = {}
    for epoch, lines in sorted(seen.items()):
        values = [loss for loss, _ in lines if loss is not None]
        whole = len(values) == len(lines)
        out[epoch] = (sum(values) / len(values) if whole else None, any(robust for _, robust in lines))
    return out


def _outcome(series: Sequence[Series]) -> Figure | None:
    attacks = [name for name in series[0].successes if any(s.successes[name] for s in series)] if series else []
    skills = [name for name in series[0].accuracy if any(s.accuracy[name] is not None for s in series)] if series else []
    if not attacks and not skills:
        return None
    figure, panels = _panels([("Attack success  (lower is better)", attacks), ("Accuracy  (higher is better)", skills)], 3.1)
    width = 0.8 / len(series)
    trials = {name: _trials(series, name) for name in attacks}
    for axes, (names, kind) in zip(panels, [p for p in ((attacks, "asr"), (skills, "skill")) if p[0]], strict=True):
        for k, one in enumerate(series):
            for x, name in enumerate(names):
                at = x + (k - (len(series) - 1) / 2) * width
                if kind == "asr":
                    _success_bar(axes, at, width, one, one.successes[name], trials[name] is not None)
                elif (value := one.accuracy[name]) is not None:
                    axes.bar(at, value, width * 0.86, color=one.color)
                    axes.text(at, value + 0.02, f"{100 * value:.0f}", ha="center", fontsize=9)
        of = {name: f"\nof {count:,}" for name, count in trials.items() if kind == "asr" and count is not None}
        axes.set_xticks(range(len(names)), [(name if len(name) < 24 else name[:22] + "…") + of.get(name, "") for name in names])
        axes.set_xlim(-0.6, len(names) - 0.4)
        _share_axis(axes)
    _legend(figure, series)
    return figure


def _trials(series: Sequence[Series], name: str) -> int | None:
    """How often an attack was tried, where that is one number in all runs: then it stands below the bars, and hits suffice above them."""
    totals = {success.total for s in series if (success := s.successes[name])}
    return totals.pop() if len(totals) == 1 else None


def _success_bar(axes: Axes, at: float, width: float, one: Series, success: Success | None, common: bool) -> None:
    if success is None:
        return
    low = success.low if success.low is not None else success.share
    high = success.high if success.high is not None else success.share
    axes.bar(at, success.share, width * 0.86, color=one.color)
    error = [[max(0.0, success.share - low)], [max(0.0, high - success.share)]]
    axes.errorbar(at, success.share, error, color=INK, elinewidth=1, capsize=3, capthick=1, alpha=0.75)
    count = f"{success.hits:,}" if common and success.hits is not None else success.count
    axes.text(at, min(high, 1.0) + 0.03, count, ha="center", fontsize=9)
    if success.clean is not None:
        axes.hlines(success.clean, at - width * 0.43, at + width * 0.43, color=INK, linestyle=(0, (2, 2)), linewidth=1.2)


def _curves(series: Sequence[Series]) -> Figure | None:
    loss = {s.label: losses(s.records) for s in series}
    evals = {s.label: [r for r in s.records if r.get("kind") == "eval" and finite(r.get("epoch"))] for s in series}
    names = [n for s in series for r in evals[s.label] for n in r if n == "zeroshot/top1" or n.startswith("asr/")]
    names = [n for n in dict.fromkeys(names) if n.count("/") == 1]
    on_the_way = any(len(lines) > 1 for lines in evals.values()) and names
    panels = [("Loss  (○ robust epoch)", loss), ("While training", names if on_the_way else None)]
    if not any(loss.values()) and not on_the_way:
        return None
    figure, drawn = _panels(panels if any(loss.values()) else panels[1:], 2.9)
    if any(loss.values()):
        axes = drawn.pop(0)
        for one in series:
            _loss_line(axes, one, loss[one.label])
        axes.set_xlabel("epoch")
        axes.grid(axis="y")
    if drawn:
        _eval_lines(drawn[0], series, evals, names)
    _legend(figure, series, names if drawn else ())
    return figure


def _loss_line(axes: Axes, one: Series, loss: Mapping[int, tuple[float | None, bool]]) -> None:
    epochs = list(loss)
    values = [float("nan") if value is None else value for value, _ in loss.values()]  # a gap where it diverged
    axes.plot(epochs, values, color=one.color, linewidth=1.8)
    robust = [(e, v) for e, v in zip(epochs, values, strict=True) if loss[e][1]]
    axes.plot([e for e, _ in robust], [v for _, v in robust], "o", color=one.color, markerfacecolor="none", markersize=6.5)


def _eval_lines(axes: Axes, series: Sequence[Series], evals: Mapping[str, Any], names: Sequence[str]) -> None:
    for one in series:
        for k, name in enumerate(names):
            points = [(r["epoch"], v) for r in evals[one.label] if (v := finite(r.get(name))) is not None]
            style = DASHES[min(k, len(DASHES) - 1)]
            axes.plot([e for e, _ in points], [v for _, v in points], color=one.color, linestyle=style, linewidth=1.8)
    axes.set_xlabel("epoch")
    _share_axis(axes)


def _panels(panels: Sequence[tuple[str, Any]], height: float) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each title that has something to show, as wide as it has groups of bars."""
    from matplotlib.figure import Figure

    shown = [(title, content) for title, content in panels if content]
    figure = Figure(figsize=(9.6, height), layout="constrained")
    bars = all(isinstance(content, list) for _, content in shown)
    widths = [len(content) + 0.6 if bars else 1 for _, content in shown]
    grid = figure.subplots(1, len(shown), squeeze=False, gridspec_kw={"width_ratios": widths})
    for axes, (title, _) in zip(grid[0], shown, strict=True):
        axes.set_title(title, pad=10)
    return figure, list(grid[0])


def _share_axis(axes: Axes) -> None:
    axes.set_ylim(0, 1.14)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
    axes.grid(axis="y")


def _legend(figure: Figure, series: Sequence[Series], names: Sequence[str] = ()) -> None:
    """Under the figure: what the colours mean, and the dashes where there are any."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=one.color, label=one.label.lstrip("_") or "run") for one in series]
    for k, name in enumerate(names):
        words = "zero-shot accuracy" if name == "zeroshot/top1" else f"success: {name.removeprefix('asr/')}"
        handles.append(Line2D([], [], color=INK, linestyle=DASHES[min(k, len(DASHES) - 1)], linewidth=1.4, label=words))
    figure.legend(handles=handles, loc="outside lower left", ncols=min(6, len(handles)), handlelength=2.2)


def on_paper(draw: Callable[[Any], Figure | None], what: Any, file: Path, forms: Sequence[str] = ("pdf", "png")) -> list[Path]:
    """The drawing of `what` in black on white as `file`.pdf and `file`.png (200 dpi). The files written: none where nothing is drawn."""
    import matplotlib

    with matplotlib.rc_context(STYLE | {key: "black" for key, value in STYLE.items() if value == INK}):
        figure = draw(what)
        if figure is None:
            return []
        written = [file.with_name(f"{file.name}.{ending}") for ending in forms]
        for path in written:
            figure.savefig(path, dpi=200, facecolor="white", bbox_inches="tight")
    return written


def svg(draw: Callable[[Any], Figure | None], series: Any) -> str | None:
    """The drawing alone: no document head, no addresses, no ids that two figures of a page would share."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = draw(series)
        if figure is None:
            return None
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    return svg.replace(INK, "currentColor")
