"""Progress on stderr: a bar a phase on a terminal, one line a phase without."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO


class Phase:
    """`with Phase("train", total=480, unit="step") as p: p.at(17, "loss 2.31")`."""

    def __init__(self, name: str, total: int = 0, unit: str = "it", stream: TextIO | None = None) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.stream = stream or sys.stderr
        self.started, self.done, self.note = time.monotonic(), 0, ""
        self.bar: Any = None

    def __enter__(self) -> Phase:
        if self.stream.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.total or None, desc=self.name, unit=self.unit, file=self.stream, leave=True, dynamic_ncols=True)
        return self

    def at(self, done: int, note: str = "", total: int | None = None) -> None:
        """So far `done` of `total`; a resumed phase may begin above 0, a restarted worker may go back."""
        self.note = note or self.note
        self.total = self.total if total is None else total
        if self.bar is not None:
            if self.done == 0 and done:
                self.bar.initial = done
            self.bar.total, self.bar.n = self.total or None, done
            self.bar.set_postfix_str(self.note, refresh=True)
        self.done = done

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        seconds = time.monotonic() - self.started
        if self.bar is not None:
            self.bar.close()
            return
        much = f" {self.done:,}/{self.total:,} {self.unit}" if self.total else ""
        end = "" if kind is None else f" stopped: {kind.__name__}"
        print(f"{self.name}:{much} {seconds:.1f} s{', ' + self.note if self.note else ''}{end}", file=self.stream, flush=True)
