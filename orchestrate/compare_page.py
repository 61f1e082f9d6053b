"""The HTML page of a sweep: what to take and why, the table, the figures, what failed. One file, offline, like a run's report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrate import compare_plots, measure, pages, sweepdir
from orchestrate.compare import Run, averaged, cell, group, metrics, varying
from orchestrate.compare_plots import Figures
from orchestrate.recommend import Advice, Condition, caveats, recommend, said
from orchestrate.report_text import duration

USUAL = (Condition("asr", below=True, limit=0.125),)  # what the page recommends for unless told otherwise
CAPTIONS = {
    "heatmap": "Means over seeds; brackets: 95 % interval. A dash: not measured.",
    "poison": "Attack success against the number of poisoned pairs, a line a setting; bands: 95 % interval.",
    "pareto": "Each point a setting. The line joins those that no other setting beats in both; the star is the recommended one.",
}


def advised(runs: Sequence[Run], conditions: Sequence[Condition] = USUAL) -> Advice | None:
    """What to take by the conditions on what was measured; None where nothing was."""
    measured = [c for c in conditions if any(measure.value(run.result, c.metric) is not None for run in runs)]
    return recommend(runs, measured) if measured else None


def write(folders: Sequence[Path], out: Path, runs: Sequence[Run], by: Sequence[str] = ()) -> Path:
    """The page of these runs and sweeps. `by`: the table's lines, everything that varies unless given."""
    from markupsafe import Markup

    advice = advised(runs)
    lines, names = list(by) or varying(runs), metrics(runs)
    figures = compare_plots.drawings(Figures(runs, chosen=advice.setting if advice else None, by=by))
    events = [event for folder in folders if sweepdir.is_sweep(folder) for event in sweepdir.events(folder).values()]
    content: dict[str, Any] = {
        "title": " · ".join(folder.name for folder in folders[:3]),
        "advice": advice.sentence if advice else "",
        "caveats": caveats(runs),
        "facts": _facts(runs, events),
        "by": lines,
        "names": [said(name) for name in names],
        "rows": [
            {"at": list(g.at.values()), "seeds": len({r.seed for r in g.runs}), "cells": [cell(g.estimate(m), m) for m in names]}
            for g in group(runs, lines)
        ],
        "note": averaged(runs, lines),
        "figures": [(Markup(text), CAPTIONS[name]) for name, text in figures.items()],  # drawn, and escaped, by us
        "failed": [event for event in events if event.state in (sweepdir.FAILED, sweepdir.STOPPED)],
        "runs": [_link(run, out) for run in runs],
    }
    return pages.write(out, "sweep.html", content)


def _facts(runs: Sequence[Run], events: Sequence[sweepdir.Event]) -> list[tuple[str, str]]:
    spent = sum(event.seconds for event in events if event.state not in (sweepdir.RUNNING, sweepdir.SKIPPED))
    facts = {
        "runs": str(len(runs)),
        "seeds": ", ".join(map(str, sorted({run.seed for run in runs}))),
        "data": ", ".join(dict.fromkeys(Path(str(run.result.get("data", "–"))).name for run in runs)),
        "attacks": ", ".join(dict.fromkeys(str(run.result.get("attack", "none")) for run in runs)),
        "spent": duration(spent) if spent else "",
        "failed": str(sum(event.state == sweepdir.FAILED for event in events) or ""),
    }
    return [(name, value) for name, value in facts.items() if value]


def _link(run: Run, out: Path) -> dict[str, str]:
    """A run's own page, by a path from this one."""
    page = run.folder / "report.html"
    return {"name": run.folder.name, "href": os.path.relpath(page, out.parent) if page.exists() else ""}
