"""How a sweep goes on, as lines that read well in a log: one a trial that ends, and now and then one that sums up."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TextIO

from orchestrate import measure
from orchestrate.measure import Result
from orchestrate.report_text import duration, percent
from orchestrate.sweepdir import DONE, FAILED, SKIPPED, STOPPED, Event

HEARTBEAT_S = 60.0  # between two summaries while nothing ends
WIDEST = 60  # characters of a trial's label


@dataclass
class Board:
    """Counts and the best so far. `slots`: trials at once; `maximize`, `minimize`: the two objectives."""

    name: str
    total: int
    slots: int
    maximize: str
    minimize: str
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    ended: dict[str, Event] = field(default_factory=dict)
    running: dict[str, float] = field(default_factory=dict)  # identity → when it began
    best: tuple[float, str, Result] | None = None
    started: float = field(default_factory=time.monotonic)
    spoke: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        print(text, file=self.stream, flush=True)
        self.spoke = time.monotonic()

    def begin(self, identity: str) -> None:
        self.running.setdefault(identity, time.monotonic())

    def end(self, event: Event, result: Result | None) -> None:
        """A trial has ended: its line, with its numbers or the reason."""
        self.running.pop(event.identity, None)
        self.ended[event.identity] = event
        if result is not None:
            self._compare(event.label, result)
        self.total = max(self.total, len(self.ended))
        place = f"{len(self.ended):>{len(str(self.total))}}/{self.total}"
        what = self.numbers(result) if result is not None else " ".join(event.reason.split())[:200]
        took = f"  {duration(event.seconds)}" if event.state != SKIPPED else ""
        self.say(f"{place}  {event.state:<8}{event.label[:WIDEST]:<{self._width()}}  {what}{took}")

    def tick(self) -> None:
        """A summary, when nothing was said for a while."""
        if time.monotonic() - self.spoke > HEARTBEAT_S:
            self.summary()

    def summary(self) -> None:
        count = {state: sum(e.state == state for e in self.ended.values()) for state in (DONE, SKIPPED, FAILED, STOPPED)}
        parts = [f"{count[DONE]} done", f"{len(self.running)} running"]
        parts += [f"{n} {what}" for what, n in (("finished before", count[SKIPPED]), ("failed", count[FAILED])) if n]
        parts += [f"{count[STOPPED]} stopped early"] if count[STOPPED] else []
        parts += [f"{max(0, self.total - len(self.ended) - len(self.running))} to go"]
        left = self.left()
        clock = duration(time.monotonic() - self.started) + (f", about {duration(left)} left" if left else "")
        best = f"; best so far: {self.best[1]} ({self.numbers(self.best[2])})" if self.best else ""
        self.say(f"sweep {self.name}: {', '.join(parts)}; {clock}{best}")

    def left(self) -> float | None:
        """Seconds to the end, by the trials that have run to theirs; None while there is none, or nothing is left."""
        took = [e.seconds for e in self.ended.values() if e.state == DONE]
        todo = self.total - len(self.ended)
        if not took or not todo:
            return None
        mean, now = sum(took) / len(took), time.monotonic()
        spent = sum(min(mean, now - since) for since in self.running.values())
        return max(0.0, todo * mean - spent) / max(1, min(self.slots, todo))

    def numbers(self, result: Result) -> str:
        """The two objectives in words."""
        parts = []
        for metric in (self.maximize, self.minimize):
            if (value := measure.value(result, metric)) is not None:
                name = {"zeroshot/top1": "zero-shot", "asr": "ASR"}.get(metric, metric.replace("asr/", "ASR "))
                parts.append(f"{name} {percent(value)}" if 0 <= value <= 1 else f"{name} {value:.4g}")
        return ", ".join(parts)

    def _compare(self, label: str, result: Result) -> None:
        """The best is the largest difference of the two objectives: a word for the log, the Pareto front is the report's."""
        up, down = measure.value(result, self.maximize), measure.value(result, self.minimize)
        if up is not None and (self.best is None or up - (down or 0.0) > self.best[0]):
            self.best = (up - (down or 0.0), label, result)

    def _width(self) -> int:
        return min(WIDEST, max((len(e.label) for e in self.ended.values()), default=0))
