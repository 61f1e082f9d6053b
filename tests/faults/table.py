"""The table of outcomes: a row for each case that ran, printed at the end and written to docs/faults.md by `make faults`.

Below it, by name, the cases that failed and those that were not run, so that a part of the matrix does not pass for the whole.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROWS: list[tuple[str, str, str, float, float | None]] = []
CASES: dict[str, str] = {}  # test → "not run", "passed", "failed"
HEAD = ("phase", "who", "outcome", "seconds", "largest difference")
BEGIN, END = "<!-- table: written by `make faults` -->", "<!-- /table -->"


def note(phase: str, who: str, outcome: str, seconds: float, difference: float | None) -> None:
    ROWS.append((phase, who, outcome, seconds, difference))


@contextlib.contextmanager
def timed() -> Iterator[Callable[[], float]]:
    started = time.monotonic()
    yield lambda: time.monotonic() - started


def markdown() -> str:
    lines = [f"| {' | '.join(HEAD)} |", "| --- | --- | --- | ---: | ---: |"]
    for phase, who, outcome, seconds, difference in ROWS:
        apart = "" if difference is None else f"{difference:.2g}"
        lines.append(f"| {phase} | {who} | {outcome} | {seconds:.0f} | {apart} |")
    for state in ("failed", "not run"):
        names = [f"`{name.rpartition('::')[2]}`" for name, found in CASES.items() if found == state]
        lines += ["", f"{state.capitalize()} ({len(names)}): {', '.join(names)}."] if names else []
    return "\n".join(lines)


def write(page: Path) -> None:
    """Replace the page's table."""
    text = page.read_text()
    page.write_text(re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: f"{BEGIN}\n{markdown()}\n{END}", text, flags=re.S))
