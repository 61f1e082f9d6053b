"""A small real set on disk: random pictures of four classes, each with a caption that names its class."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from orchestrate.recipe import Recipe, resolve

CLASSES = ["dog", "cat", "ship", "truck"]
SIDE = 32


def png(number: int, side: int = SIDE) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def write(folder: Path, train: int = 120, heldout: int = 40, broken: tuple[int, ...] = ()) -> Path:
    """train.parquet and test.parquet; of the training rows those in `broken` hold no picture."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classnames.json").write_text(json.dumps(CLASSES))
    for name, count, first in (("train", train, 0), ("test", heldout, 10_000)):
        rows = {
            "id": [f"{name}{i:04d}" for i in range(count)],
            "image": [b"no picture" if name == "train" and i in broken else png(first + i) for i in range(count)],
            "caption": [f"a {CLASSES[i % 4]}, number {i}" for i in range(count)],
            "label": [i % 4 for i in range(count)],
        }
        pq.write_table(pa.table(rows), folder / f"{name}.parquet", row_group_size=50)
    return folder


def recipe(folder: Path, **overrides: object) -> Recipe:
    """A recipe on the set: two attacks, small enough for it."""
    base = {
        "data": str(folder),
        "data.heldout": 40,
        "data.side": SIDE,
        "data.cache": str(folder / "cache"),
        "train.batch": 16,
        "attack": "targeted+stripes",
        "attack.targeted.targets": 4,
        "attack.targeted.copies": 3,
        "attack.stripes.count": 20,
    }
    given = {key.replace("__", "."): value for key, value in overrides.items()}
    if "attack" in given:
        base = {key: value for key, value in base.items() if not key.startswith("attack")}
    return resolve("small", [("test", {**base, **given})]).recipe
