"""An epoch's batches: which pairs come in which order, with which captions and keys. No Ray.

Order and keys depend on (seed, epoch, sample id) alone, and a worker takes its share of each global batch. So a run that goes on after a
kill sees what it would have seen, and several workers see together what one sees alone.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from attacks.base import ranks
from defenses.augment import mix

if TYPE_CHECKING:
    from orchestrate.step import Examples


def drawn(
    rows: np.ndarray, batch: int, seed: int, epoch: int, window: tuple[int, int] | None = None, safe: np.ndarray | None = None
) -> np.ndarray:
    """The global batches of an epoch, int64 (steps, batch), of the positions `rows`: each once, less a remainder that is another one each
    epoch. With `safe`, bool for every position, what is safe comes last (`ClipOutput.safe`). `window`: see `order`."""
    found = rows[order(len(rows), seed, epoch, window)][: len(rows) // batch * batch]
    if safe is not None:
        found = found[np.argsort(safe[found], kind="stable")]
    return found.reshape(-1, batch)


def share(batch: int, world: int, rank: int) -> slice:
    """Which rows of a global batch a worker takes. Shares differ by at most one row where the batch does not divide."""
    return slice(rank * batch // world, (rank + 1) * batch // world)


def order(rows: int, seed: int, epoch: int, window: tuple[int, int] | None = None) -> np.ndarray:
    """A permutation of range(rows), int64, fresh each epoch.

    With `window` = (rows shuffled together, consecutive rows read together) it is a local shuffle, so that a set that is read from
    files while training touches each part of a file once an epoch: chunks in random order, then rows at random inside windows of chunks.
    """
    rng = np.random.default_rng((seed, epoch))
    if window is None:
        return rng.permutation(rows)
    size, chunk = window
    starts = rng.permutation(-(-rows // chunk)) * chunk
    chunked = np.concatenate([np.arange(s, min(s + chunk, rows)) for s in starts])
    return np.concatenate([rng.permutation(chunked[i : i + size]) for i in range(0, rows, size)])


def sample_keys(table: pa.Table, seed: int) -> np.ndarray:
    """A random key for each pair, uint64 (rows,): by hash of (id, seed)."""
    return ranks(table.column("id").to_pylist(), seed, "sample")


def epoch_keys(keys: np.ndarray, epoch: int) -> np.ndarray:
    """Keys of this epoch: another, unrelated number for each sample and epoch."""
    return mix(keys ^ mix(np.full(1, epoch, np.uint64)))


def examples(rows: np.ndarray, pixels: np.ndarray, captions: np.ndarray, keys: np.ndarray, pairing: Mapping[str, Any]) -> Examples:
    """A share of a batch as the learner takes it: each pair's own caption, or what a round's `pairing` gives it.

    rows (n,): positions in captions and keys; pixels (n, S, S, 3). `pairing`: empty in a plain epoch; `index` (all,), the row of the pool
    that a pair learns from, below 0 its own caption; `safe` (all,) of a selection.
    """
    from orchestrate.step import Examples

    own, matched, moved, safe = list(captions[rows]), None, None, pairing.get("safe")
    if "index" in pairing:
        chosen = pairing["index"][rows]
        moved = chosen >= 0
        if pairing["matched"] == "embedding":
            matched = pairing["features"][chosen]
        own = [caption if i < 0 else pairing["captions"][i] for i, caption in zip(chosen, own, strict=True)]
    return Examples(pixels, own, keys[rows], matched, None if safe is None else safe[rows], moved)


def ahead(items: Iterator[Any], depth: int = 2) -> Iterator[Any]:
    """The same items, made in a thread that stays up to `depth` ahead; an error there is raised here."""
    waiting: queue.Queue[Any] = queue.Queue(depth)
    end = object()

    def fill() -> None:
        try:
            for item in items:
                waiting.put(item)
            waiting.put(end)
        except BaseException as error:
            waiting.put(error)

    threading.Thread(target=fill, daemon=True).start()
    while (item := waiting.get()) is not end:
        if isinstance(item, BaseException):
            raise item
        yield item
