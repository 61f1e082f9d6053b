"""`metrics.jsonl`, the logbook of a run: one JSON object a line, appended as things happen, readable while it runs.

Strict JSON, so that any tool reads it: what JSON has no number for is written as "NaN", "Infinity" or "-Infinity".
A kill may tear the last line: readers skip what is no whole JSON object, and the next record starts on a line of its own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

NAME, LOCK = "metrics.jsonl", ".lock"
NOT_FINITE = ("NaN", "Infinity", "-Infinity")
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what a file system without flock answers
logger = logging.getLogger(__name__)


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line, without a sync to disk: a killed process keeps it, a power cut may not."""
    line = json.dumps({key: plain(value) for key, value in record.items()}, allow_nan=False, ensure_ascii=False) + "\n"
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size and (file.seek(size - 1), file.read(1))[1] != b"\n":
            line = "\n" + line  # a kill tore the last line: do not lose this one with it
        file.write(line.encode())


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a logbook; none where there is no file."""
    return [record for _, records in chunks(path, 0, 1000) for record in records]


def chunks(path: Path, offset: int, size: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Whole lines from byte `offset` on, about `size` at a time: (offset after them, their records)."""
    if not path.exists():
        return
    with path.open("rb") as file:
        end = file.seek(offset if offset <= path.stat().st_size else 0)
        records, lines = list[dict[str, Any]](), 0
        for line in file:
            if not line.endswith(b"\n"):
                break  # still being written
            record, end, lines = parse(line), end + len(line), lines + 1
            records += [record] if record is not None else []
            if lines == size:
                yield end, records
                records, lines = [], 0
        if lines:
            yield end, records


def without_later(path: Path, epoch: int, offset: int) -> tuple[bytes, int, int]:
    """What is left without the lines after `epoch`, where byte `offset` then is, and how many lines go."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept, position, moved = list[bytes](), 0, 0
    for line in lines:
        position += len(line)
        record = parse(line)
        if record is not None and (number(record.get("epoch")) or 0) <= epoch:
            kept.append(line)
            moved += len(line) if position <= offset else 0
    return b"".join(kept), moved, len(lines) - len(kept)


@contextlib.contextmanager
def held(folder: Path, what: str = "") -> Iterator[None]:
    """A directory, made where there is none, held against a second process. ValueError where one has it; `what` it is goes into that.

    On a file system without locks (some network folders) nothing is held, and that is said once: there two processes may spoil a run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is running {what}{folder}. Wait for it, or stop it.") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            _unlocked(os.stat(folder).st_dev)
        yield


@cache
def _unlocked(device: int) -> None:
    """Said once for each file system."""
    logger.warning("The file system that runs are kept on has no locks: see to it yourself that no run or sweep is started twice at once.")


def replace(path: Path, content: bytes) -> None:
    """All or nothing: a reader, or a kill, finds the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def parse(line: bytes) -> dict[str, Any] | None:
    """The record of one line, or None where it is no JSON object."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def plain(value: Any) -> Any:
    """Numpy and torch scalars → Python's; numbers that JSON lacks → the words that `float` reads."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def number(value: Any) -> float | None:
    """A value of a record as a number (booleans count as 0 and 1), None where it is none."""
    if isinstance(value, (bool, int, float)) or value in NOT_FINITE:
        return float(value)
    return None
