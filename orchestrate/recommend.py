"""Which setting to take: the cheapest one whose bound stays within what is asked, whatever poison was tried; and the Pareto front."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrate import measure
from orchestrate.compare import Estimate, Group, Run, cell, group, is_share, known, order, varying
from orchestrate.report_text import MISSING, attacked, attacks, doubts, duration, percent, undefended

CONDITION = re.compile(r"\s*([\w/.+-]+?)\s*(<=|>=|<|>)\s*([\d.eE+-]+)\s*(%?)\s*")
GIVEN = ("attack", "data")  # what one defends against is not what one sets


@dataclass(frozen=True)
class Condition:
    metric: str
    below: bool
    limit: float

    def bound(self, found: Estimate) -> float:
        """The end of the interval that must stay within the limit; the mean where there is no interval."""
        end = found.high if self.below else found.low
        return found.mean if end is None else end

    def excess(self, found: Estimate) -> float:
        """How far the bound lies outside; 0 or less: within."""
        return self.bound(found) - self.limit if self.below else self.limit - self.bound(found)

    def __str__(self) -> str:
        return f"{said(self.metric)} {'at most' if self.below else 'at least'} {number(self.limit, self.metric)}"


@dataclass(frozen=True)
class Advice:
    """`setting` is None where none will do; `sentence` says which and why."""

    setting: Group | None
    sentence: str


def condition(text: str) -> Condition:
    """`asr<=0.125`, `zeroshot/top1>=40%`. ValueError with the form wanted."""
    match = CONDITION.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        limit = float(match[3]) / (100 if match[4] else 1)
    except ValueError:
        raise ValueError(f"{text!r} is no condition: write a metric, <= or >=, and a number, such as 'asr<=0.125'.") from None
    return Condition(match[1], match[2].startswith("<"), limit)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (utility, harm) that no other beats: none has at least the utility at no more harm, and one of them better.

    In ascending harm; equal points are all kept.
    """
    front: list[int] = []
    best = -float("inf")  # utility reached with less harm
    ranked = sorted(range(len(points)), key=lambda i: (points[i][1], -points[i][0]))
    for i in ranked:
        same = bool(front) and points[front[-1]] == points[i]
        if points[i][0] > best or same:
            front.append(i)
            best = points[i][0]
    return front


def settings(runs: Sequence[Run]) -> list[Group]:
    """Runs that differ in nothing that one sets; the attack, the data and the seed may differ."""
    return group(runs, [path for path in varying(runs) if path.partition(".")[0] not in GIVEN])


def recommend(runs: Sequence[Run], conditions: Sequence[Condition], cost: str = measure.SECONDS) -> Advice:
    """The setting of least mean cost (of least loss, where `cost` is a utility) that meets every condition under every poison tried.

    A condition is met by the 95 % bound on its side, not by the mean. A setting that was not tried under all of it is passed over.
    """
    for metric in [c.metric for c in conditions] + [cost]:
        measure.check(metric, known(runs))
    given = [path for path in varying(runs) if path.partition(".")[0] in GIVEN]
    worst: list[tuple[float, Group]] = []
    fitting: list[tuple[float, float, Group]] = []
    everywhere = {c: _places(group(runs, given), c) for c in conditions}
    for setting in settings(runs):
        tried = {tuple(g.at.values()): g for g in group(setting.runs, given)}
        if any(not places <= tried.keys() for places in everywhere.values()) or (price := setting.estimate(cost)) is None:
            continue
        found = [(c, tried[place].estimate(c.metric)) for c, places in everywhere.items() for place in places]
        if not found or any(e is None for _, e in found):
            continue
        excess = max(c.excess(e) for c, e in found if e is not None)
        worst.append((excess, setting))
        if excess <= 0:
            up = setting.estimate("zeroshot/top1")
            least = price.mean if measure.lower_is_better(cost) else -price.mean
            fitting.append((least, -up.mean if up else 0.0, setting))
    if not fitting:
        return Advice(None, _none(worst, conditions))
    chosen = min(fitting, key=lambda one: one[:2])[2]
    return Advice(chosen, _reason(chosen, conditions, cost, given, len(fitting), len(worst)))


def caveats(runs: Sequence[Run]) -> list[str]:
    """What a low success may mean besides a defence that holds."""
    results = [run.result for run in runs]
    if not attacks(results):
        return []
    plain = [result for result in results if undefended(result) and attacked(result)]
    if not plain:
        return ["No undefended run is among these: whether the attack takes at all is not shown. Sweep clip-… beside it."]
    return list(dict.fromkeys(text for result in plain for text in doubts([result])))[:3]


def _places(groups: Sequence[Group], c: Condition) -> set[tuple[str, ...]]:
    """The kinds of poison under which any run measured what a condition asks for."""
    return {tuple(g.at.values()) for g in groups if g.estimate(c.metric) is not None}


def _reason(chosen: Group, conditions: Sequence[Condition], cost: str, given: Sequence[str], fit: int, tried: int) -> str:
    parts = []
    for c in conditions:
        bounds = [c.bound(e) for g in group(chosen.runs, given) if (e := g.estimate(c.metric))]
        end = max(bounds) if c.below else min(bounds)
        parts.append(
            f"whose {'upper' if c.below else 'lower'} 95 % bound of {said(c.metric)} ({number(end, c.metric)}) stays "
            f"{'under' if c.below else 'above'} {number(c.limit, c.metric)}"
        )
    price = chosen.estimate(cost)
    assert price is not None
    first = "cheapest" if measure.lower_is_better(cost) else f"best in {said(cost)}"
    paid = f"{duration(price.mean)} a run" if cost == measure.SECONDS else cell(price, cost)
    seeds = len({run.seed for run in chosen.runs})
    where = [f"{path}={','.join(sorted({r.at(path) for r in chosen.runs} - {MISSING}, key=order))}" for path in given]
    under = f" under every poison tried ({'; '.join(where)})" if where else ""
    up = chosen.estimate("zeroshot/top1")
    accuracy = f" Its zero-shot accuracy is {cell(up, 'zeroshot/top1')}." if up and cost != "zeroshot/top1" else ""
    return (
        f"Take {chosen.label}: of {tried} settings {fit} will do, and this is the {first} ({paid}) {' and '.join(parts)}{under}, "
        f"over {seeds} seed{'s' * (seeds > 1)}.{accuracy}"
    )


def _none(worst: Sequence[tuple[float, Group]], conditions: Sequence[Condition]) -> str:
    asked = " and ".join(map(str, conditions))
    if not worst:
        return f"No setting was measured for {asked} under every poison tried: let the sweep finish."
    excess, nearest = min(worst, key=lambda one: one[0])
    off = percent(excess) if all(is_share(c.metric) for c in conditions) else f"{excess:.4g}"
    return (
        f"No setting keeps {asked} by its 95 % bound. The nearest is {nearest.label}, off by {off}; "
        "more seeds or more attack trials narrow the bound, a stronger defence lowers it."
    )


def said(metric: str) -> str:
    return {"asr": "ASR", "zeroshot/top1": "zero-shot accuracy", "seconds": "time"}.get(metric, metric.replace("asr/", "ASR "))


def number(value: float, metric: str) -> str:
    return percent(value) if is_share(metric) else f"{value:.4g}"
