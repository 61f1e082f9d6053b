"""Many runs side by side: grouped by what was set, averaged over seeds, with an interval. No Ray.

A line of the table is a value of every path in `by`. What else differs between its runs, the seed aside, is averaged within each seed
first, so that the seeds stay what is repeated.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrate import measure, sweepdir
from orchestrate.measure import Result
from orchestrate.recipe import flatten
from orchestrate.report_text import MISSING, aligned, attacks, duration, markdown
from orchestrate.statistics import mean_interval, wilson

UNLIKE = ("name", "seed", "cluster", "track", "data.cache", "identity")  # differ without making another setting
SHARES = ("asr", "zeroshot", "probe", "retrieval", "match")
FORMATS = ("text", "csv", "markdown", "latex")


@dataclass(frozen=True)
class Run:
    """A finished run: `flat` is its recipe under dotted paths."""

    folder: Path
    flat: Mapping[str, Any]
    result: Result

    def at(self, path: str) -> str:
        """A value as one would type it; a dash where the run's methods have no such field."""
        value = self.flat.get(path)
        return MISSING if value is None else value if isinstance(value, str) else json.dumps(value)

    @property
    def seed(self) -> Any:
        return self.flat.get("seed")


@dataclass(frozen=True)
class Estimate:
    """A mean over `seeds` seeds with its 95 % interval; no interval (None) for one seed of a metric that counts nothing.

    A share's interval is the wider, at each end, of Student's t over the seeds and of Wilson's on all hits and trials together: three
    seeds that agree on 0 of 16 do not prove a success of 0. `counts`: those hits and trials, where all runs tell them.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int
    counts: tuple[int, int] | None = None


@dataclass(frozen=True)
class Group:
    at: Mapping[str, str]
    runs: tuple[Run, ...]

    def estimate(self, metric: str) -> Estimate | None:
        return estimate(self.runs, metric)

    @property
    def label(self) -> str:
        return " ".join(f"{path}={value}" for path, value in self.at.items() if value != MISSING) or "all runs"


def load(folders: Sequence[Path]) -> list[Run]:
    """The finished runs of run and sweep directories, each once. ValueError where there are none."""
    found: dict[Path, Run] = {}
    for folder in folders:
        members = sweepdir.runs(folder) if sweepdir.is_sweep(folder) else [folder]
        if not sweepdir.is_sweep(folder) and not (folder / "result.json").is_file():
            raise ValueError(f"{folder} is neither a finished run nor a sweep: it has no result.json and no {sweepdir.SWEEP}.")
        for run in members:
            tree = json.loads((run / "recipe.json").read_text())
            found.setdefault(run.resolve(), Run(run, flatten(tree), json.loads((run / "result.json").read_text())))
    if not found:
        raise ValueError(f"no finished run in {', '.join(map(str, folders))}: wait for the first one.")
    return list(found.values())


def varying(runs: Sequence[Run]) -> list[str]:
    """The paths in which these runs differ, the seed and what changes no number aside."""
    paths = dict.fromkeys(path for run in runs for path in run.flat)
    own = [path for path in paths if path not in UNLIKE and path.partition(".")[0] not in UNLIKE]
    return [path for path in own if len({run.at(path) for run in runs} - {MISSING}) > 1]


def check_path(path: str, runs: Sequence[Run]) -> str:
    if any(path in run.flat for run in runs):
        return path
    raise ValueError(f"--by {path}: these runs have no such key. They differ in {', '.join(varying(runs)) or 'nothing but the seed'}.")


def group(runs: Sequence[Run], by: Sequence[str]) -> list[Group]:
    """Runs of equal values in `by`, in ascending order."""
    found: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(tuple(run.at(path) for path in by), []).append(run)
    keys = sorted(found, key=lambda key: [order(value) for value in key])
    return [Group(dict(zip(by, key, strict=True)), tuple(found[key])) for key in keys]


def order(text: str) -> tuple[int, float, str]:
    """Numbers by size, before words."""
    try:
        return (0, float(text), "")
    except ValueError:
        return (1, 0.0, text)


def estimate(runs: Sequence[Run], metric: str) -> Estimate | None:
    """None where no run has measured it."""
    by_seed: dict[Any, list[float]] = {}
    hits = trials = 0
    counted = True
    for run in runs:
        value = measure.value(run.result, metric)
        if value is None:
            continue
        by_seed.setdefault(run.seed, []).append(value)
        k_n = measure.counts(run.result, metric)
        counted = counted and k_n is not None
        hits, trials = (hits + k_n[0], trials + k_n[1]) if k_n else (hits, trials)
    if not by_seed:
        return None
    interval = mean_interval(math.fsum(values) / len(values) for values in by_seed.values())
    ends = [(interval.low, interval.high)] if math.isfinite(interval.half) else []
    counts = (hits, trials) if counted and trials else None
    ends += [wilson(*counts)] if counts else []
    if not ends:
        return Estimate(interval.mean, None, None, interval.n)
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    if is_share(metric) or metric.startswith(measure.SECONDS):
        low = max(0.0, low)
    if is_share(metric):
        high = min(1.0, high)
    return Estimate(interval.mean, low, high, interval.n, counts)


def is_share(metric: str) -> bool:
    return metric.partition("/")[0] in SHARES and not metric.endswith(("/hits", "/total", "/c", "/zscore"))


def metrics(runs: Sequence[Run]) -> list[str]:
    """What a table shows unless told otherwise."""
    names = ["zeroshot/top1", "retrieval/r1", *(f"asr/{name}" for name in attacks([run.result for run in runs])), measure.SECONDS]
    return [name for name in names if any(measure.value(run.result, name) is not None for run in runs)]


def known(runs: Sequence[Run]) -> list[str]:
    return sorted({key for run in runs for key, value in run.result.items() if isinstance(value, (int, float))})


def averaged(runs: Sequence[Run], by: Sequence[str]) -> str:
    """What the lines average over besides the seed, as a sentence; empty where nothing."""
    rest = [path for path in varying(runs) if path not in by]
    said = [f"{path} ({', '.join(sorted({run.at(path) for run in runs} - {MISSING}, key=order))})" for path in rest]
    return f"Each line also averages over {'; '.join(said)}." if said else ""


# --- tables ----------------------------------------------------------------------------------------------------------------------


def table(groups: Sequence[Group], names: Sequence[str], form: str = "text") -> str:
    """The groups as aligned text, CSV, Markdown or LaTeX (booktabs)."""
    if form == "csv":
        return _csv(groups, names)
    by = list(groups[0].at) if groups else []
    head = [*by, "seeds", *names]
    rows = [[*(g.at[path] for path in by), str(len({r.seed for r in g.runs})), *(cell(g.estimate(m), m) for m in names)] for g in groups]
    return laid_out(head, rows, form, len(by))


def laid_out(head: Sequence[str], rows: Sequence[Sequence[str]], form: str, by: int) -> str:
    """Cells as aligned text, Markdown or LaTeX (booktabs), the first `by` columns to the left."""
    if form == "latex":
        return _latex(head, rows, by)
    return markdown(head, rows) if form == "markdown" else aligned(head, rows)


def cell(found: Estimate | None, metric: str) -> str:
    """`1/16 = 6.2 % [1.1, 28.3]` of attack success, `41.2 % [38.0, 44.4]` of other shares, `41.2 s [38.0 s, 44.4 s]`."""
    if found is None:
        return MISSING
    if is_share(metric):
        ends = "" if found.low is None or found.high is None else f" [{100 * found.low:.1f}, {100 * found.high:.1f}]"
        counts = f"{found.counts[0]}/{found.counts[1]} = " if found.counts and metric.partition("/")[0] == measure.WORST else ""
        return f"{counts}{100 * found.mean:.1f} %{ends}"
    form: Callable[[float], str] = duration if metric.startswith(measure.SECONDS) else "{:.4g}".format
    ends = "" if found.low is None or found.high is None else f" [{form(found.low)}, {form(found.high)}]"
    return form(found.mean) + ends


def _csv(groups: Sequence[Group], names: Sequence[str]) -> str:
    """Plain numbers, shares from 0 to 1: mean, low and high of each metric."""
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n")
    by = list(groups[0].at) if groups else []
    write.writerow([*by, "seeds", *(f"{name}{end}" for name in names for end in ("", "/mean_low", "/mean_high"))])
    for g in groups:
        found = [g.estimate(name) for name in names]
        numbers = [x for e in found for x in ((e.mean, e.low, e.high) if e else (None, None, None))]
        write.writerow([*g.at.values(), len({r.seed for r in g.runs}), *("" if x is None else f"{x:.6g}" for x in numbers)])
    return out.getvalue().rstrip("\n")


def _latex(head: Sequence[str], rows: Sequence[Sequence[str]], by: int) -> str:
    def escaped(text: str) -> str:
        for sign in "\\&%$#_{}":
            text = text.replace(sign, r"\textbackslash{}" if sign == "\\" else f"\\{sign}")
        return text.replace(MISSING, "--")

    lines = [" & ".join(map(escaped, row)) + r" \\" for row in rows]
    columns = "l" * by + "r" * (len(head) - by)
    top = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", " & ".join(map(escaped, head)) + r" \\", r"\midrule"]
    return "\n".join([*top, *lines, r"\bottomrule", r"\end{tabular}"])
