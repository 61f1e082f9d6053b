"""The clean set: a Parquet set with image bytes is written again without the suspicious rows; of any other the ids of what is kept."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrate.data.files import is_uri

FOLDER, IDS = "clean", "kept.parquet"
CLASS_FILES = ("classnames.json", "classes.json", "classnames.txt", "classes.txt")


def write(out: Path, pairs: pa.Table, kept: np.ndarray, heldout: pa.Table, limit_gb: float, planted: bool) -> dict[str, Any]:
    """`clean/`, to be used as data=OUT/clean, or `kept.parquet` (id); returns {"clean": which, "why": why no copy, "" where there is one}.

    pairs: the audited ones, with the columns path, where and row; kept (N,) bool. Held-out files of the set's own come along as they are.
    """
    for old in (out / FOLDER, out / IDS):
        if old.is_dir():
            shutil.rmtree(old)
        old.unlink(missing_ok=True)
    why = _why_not(pairs, heldout, limit_gb, planted)
    if why:
        pq.write_table(pairs.select(["id"]).filter(pa.array(kept)), out / IDS, compression="zstd")
        return {"clean": IDS, "why": why}
    root = os.path.commonpath([os.path.dirname(path) for path in {*pairs["path"].to_pylist(), *heldout["path"].to_pylist()}])
    part = out / f"{FOLDER}.writing"
    shutil.rmtree(part, ignore_errors=True)
    paths = np.array(pairs["path"].to_pylist(), dtype=object)
    rows = pairs["row"].to_numpy()
    for path in sorted(set(paths)):
        _copy(path, part / os.path.relpath(path, root), np.sort(rows[kept & (paths == path)]))
    own = [*sorted(set(heldout["path"].to_pylist()) - set(paths)), *(os.path.join(root, name) for name in CLASS_FILES)]
    for path in filter(os.path.isfile, own):
        target = part / os.path.relpath(path, root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    part.rename(out / FOLDER)
    return {"clean": FOLDER, "why": ""}


def _why_not(pairs: pa.Table, heldout: pa.Table, limit_gb: float, planted: bool) -> str:
    """Why no copy is written; "" where one is."""
    if planted:
        return "the poison is planted as the set is read, so no file holds it"
    if not all(where.startswith("parquet:") for where in set(pairs["where"].to_pylist())):
        return "only Parquet files with image bytes are written again"
    if any(is_uri(path) for path in set(pairs["path"].to_pylist())):
        return "the set lies in an object store"
    if pairs.group_by(["path", "row"]).aggregate([]).num_rows < pairs.num_rows:
        return "some rows are several pairs, one a caption"
    size = sum(os.path.getsize(path) for path in {*pairs["path"].to_pylist(), *heldout["path"].to_pylist()})
    return f"its files take {size / 1e9:.1f} GB, above --copy-gb {limit_gb:g}" if size > limit_gb * 1e9 else ""


def _copy(source: str, target: Path, rows: np.ndarray) -> None:
    """The rows (ascending) of a Parquet file, one row group at a time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetFile(source) as file, pq.ParquetWriter(target, file.schema_arrow, compression="zstd") as writer:
        start = 0
        for number in range(file.metadata.num_row_groups):
            group = file.read_row_group(number)
            here = rows[(rows >= start) & (rows < start + group.num_rows)] - start
            if len(here):
                writer.write_table(group.take(pa.array(here)))
            start += group.num_rows
