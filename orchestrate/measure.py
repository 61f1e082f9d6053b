"""Metrics of a result by name: those of result.json, and a few that stand for several."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from orchestrate.report_text import attacks, finite, success

Result = Mapping[str, Any]
WORST, BACKDOOR, SECONDS = "asr", "asr/backdoor", "seconds"
MADE = {
    WORST: "the largest success of any attack",
    BACKDOOR: "the largest success of any backdoor",
    SECONDS: "training, matching and the run's own audit, in seconds",
}


def value(result: Result, metric: str) -> float | None:
    """A result's number, None where it was not measured."""
    if metric in result:
        return finite(result[metric])
    if (name := attack_of(result, metric)) is not None:
        return finite(result[f"asr/{name}"])
    if metric == SECONDS:
        parts = [finite(result.get(f"seconds/{kind}")) for kind in ("train", "match", "audit")]
        return None if parts[0] is None else sum(part or 0.0 for part in parts)
    return None


def attack_of(result: Result, metric: str) -> str | None:
    """The attack whose success a metric means in this result."""
    kind, _, name = metric.partition("/")
    if kind != "asr" or "/" in name:
        return None
    found = [s for one in attacks([result]) if (s := success(result, one))]
    if name and any(s.name == name for s in found):
        return name
    known = [s for s in found if metric == WORST or (metric == BACKDOOR and s.backdoor)]
    return max(known, key=lambda s: s.share).name if known else None


def counts(result: Result, metric: str) -> tuple[int, int] | None:
    """(hits, trials) behind a share, None where a metric is none or does not say."""
    name = attack_of(result, metric)
    if name is not None:
        hits, total = (finite(result.get(f"asr/{name}/{x}")) for x in ("hits", "total"))
        return None if hits is None or total is None else (int(hits), int(total))
    share, total = finite(result.get(metric)), finite(result.get(f"{metric.partition('/')[0]}/total"))
    return (round(share * total), int(total)) if share is not None and total and metric.endswith("/top1") else None


def lower_is_better(metric: str) -> bool:
    return metric.partition("/")[0] in (WORST, SECONDS) or metric.startswith("match/poisoned")


def check(metric: str, known: list[str]) -> str:
    """The metric, if any result has it; ValueError with a suggestion."""
    names = sorted({*known, *MADE})
    if metric not in names:
        close = get_close_matches(metric, names, n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(names[:12])}, …"
        raise ValueError(f"no run has measured {metric!r}. {hint}")
    return metric
