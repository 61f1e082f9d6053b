"""The one way pixels are read: image, side, and the attack's stamp where the row asks for it.

A set that fits in memory is decoded once into an array that everybody shares (`images`, `place`); a larger one is read from its files when
asked. Poisoned pixels exist only in what `take` returns, in training, in matching and in evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from orchestrate.data import reader

REFERENCE = ("path", "where", "row", "size")


@dataclass
class Pixels:
    """Pixels of `table`: image reference columns, `image_id`, `stamp` ("" = none), one row a pair."""

    table: pa.Table
    attack: Any | None  # anything with stamp(image, row)
    side: int
    max_pixels: int
    images: np.ndarray | None = None  # (distinct images, S, S, 3) uint8, read-only
    place: np.ndarray | None = None  # (rows,) where in `images` a row's pixels are

    def __post_init__(self) -> None:
        stamps = self.table.column("stamp").to_numpy(zero_copy_only=False)
        self._is_stamped = stamps != ""

    def take(self, positions: np.ndarray) -> np.ndarray:
        """Rows → (n, S, S, 3) uint8. ValueError names the file and row of an image that cannot be read."""
        positions = np.asarray(positions)
        if self.images is not None and self.place is not None:
            out = self.images[self.place[positions]]
        else:
            out, errors = reader.load(self.table.take(pa.array(positions)), self.side, self.max_pixels)
            if errors:
                raise ValueError(f"an image that could be read when the run began no longer can: {errors[0][1]}.")
        if self.attack is not None:
            for i in np.flatnonzero(self._is_stamped[positions]):
                row = self.table.slice(int(positions[i]), 1).to_pylist()[0]
                out[i] = self.attack.stamp(out[i], row)
        return out


def distinct(table: pa.Table) -> tuple[pa.Table, np.ndarray]:
    """The distinct images a table refers to (its first rows that show them), and for each row the position of its image among them."""
    keys = list(zip(*(table.column(name).to_pylist() for name in REFERENCE), strict=True))
    seen: dict[tuple[Any, ...], int] = {}
    place = np.fromiter((seen.setdefault(key, len(seen)) for key in keys), np.int64, len(keys))
    first = np.full(len(seen), -1, np.int64)
    first[place[::-1]] = np.arange(len(keys))[::-1]
    return table.take(pa.array(first)), place
