"""Small synthetic tables: a training index and a held-out index that share six classes."""

import json

import numpy as np
import pyarrow as pa
import pytest

CLASSES = ["cat", "dog", "fox", "traffic light", "cherry", "car"]
WAYS = (
    "a {c} on grass",
    "{C}, close",
    "two {c}s and a {o}",
    "old photo: {c}!",
    "the {c} number {n}",
    "nothing to see here",
)


def build_index(rows: int, split: str = "train", label: bool = True, seed: int = 0) -> pa.Table:
    """`rows` pairs; captions name the class, some name another beside it, some none; every tenth label is unknown."""
    rng = np.random.default_rng((seed, rows))
    classes = rng.integers(len(CLASSES), size=rows)
    captions = [
        WAYS[rng.integers(len(WAYS))].format(c=CLASSES[c], C=CLASSES[c].upper(), o=CLASSES[(c + 1) % 6], n=n) for n, c in enumerate(classes)
    ]
    labels = [int(c) if label and n % 10 else -1 for n, c in enumerate(classes)]
    table = pa.table(
        {
            "id": [f"{split}-{n:05d}" for n in range(rows)],
            "path": [f"{split}/part-{n // 100}.parquet" for n in range(rows)],
            "row": pa.array([n % 100 for n in range(rows)], pa.int64()),
            "caption": captions,
            "label": pa.array(labels, pa.int32()),
        }
    )
    return table.replace_schema_metadata({"classes": json.dumps(CLASSES)})


@pytest.fixture(scope="session")
def index() -> pa.Table:
    return build_index(1200)


@pytest.fixture(scope="session")
def heldout() -> pa.Table:
    return build_index(150, "heldout")


@pytest.fixture(scope="session")
def scraped() -> pa.Table:
    """Training pairs without labels or class names, as they come from the web."""
    table = build_index(600, "web", label=False)
    return table.replace_schema_metadata(None)
