"""An audit's table: a few numbers a pair → scores.parquet; what they are worth where the poison is known; what they leave out. No Ray.

scores.parquet, a row for each pair in the order of the set: id; each score; `adds_<score>`, what it adds; suspicion, their sum; rank,
1 = the most suspicious. Larger is more suspicious throughout. The schema's metadata say which audit made it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from attacks.base import how_many, ranks

FORMAT = "antidote-scores-1"
REMOVED = 0.01  # share at which recall is told


def table(ids: pa.ChunkedArray, scores: Mapping[str, np.ndarray], header: Mapping[str, Any], group: np.ndarray | None = None) -> pa.Table:
    """Scores (N,) by name → the table. Equal suspicions are ranked by a hash of the id. group: as in `detect.tails`."""
    from defenses.detect import SCORES, combine

    known = {name: scores[name] for name in SCORES if name in scores}
    added = combine(known, group=group)
    suspicion = np.sum(list(added.values()), axis=0)
    order = np.lexsort((ranks(ids.to_pylist(), 0, "suspicion"), -suspicion))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(1, len(order) + 1)
    columns: dict[str, Any] = {"id": ids}
    columns |= {name: pa.array(values.astype(np.float32), from_pandas=True) for name, values in known.items()}
    columns |= {f"adds_{name}": values.astype(np.float32) for name, values in added.items()}
    columns |= {"suspicion": suspicion, "rank": rank}
    return pa.table(columns).replace_schema_metadata({b"antidote": json.dumps({"format": FORMAT, **header}, sort_keys=True).encode()})


def read(path: str | Path) -> pa.Table:
    """id and rank of a scores.parquet. ValueError for anything else."""
    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} is no readable scores.parquet: {error}. `antidote audit` writes them.") from error
    header = json.loads((schema.metadata or {}).get(b"antidote", b"{}"))
    if header.get("format") != FORMAT or not {"id", "rank"} <= set(schema.names):
        raise ValueError(f"{path} is no table of scores: give the scores.parquet that `antidote audit` wrote.")
    return pq.read_table(path, columns=["id", "rank"])


def budget(drop: int | float, count: int) -> int:
    """How many of `count` pairs go: a count or a share. ValueError when none would be left."""
    try:
        many = how_many(drop, count)
    except ValueError as error:
        raise ValueError(f"drop: {error}") from None
    if many >= count:
        raise ValueError(f"drop={drop} of {count:,} pairs leaves none: lower it.")
    return many


def without(pairs: pa.Table, path: str, drop: int | float) -> pa.Table:
    """The training pairs less the share (or count) `drop` of the audited ones that ranks highest. ValueError where a pair has no rank."""
    scores = read(path)
    found = pc.index_in(pairs["id"], value_set=scores["id"].combine_chunks().cast(pa.string()))
    if found.null_count:
        first = pairs["id"].filter(pc.is_null(found))[0].as_py()
        raise ValueError(
            f"data.exclude={path} has no rank for {found.null_count:,} of {pairs.num_rows:,} training pairs (the first: {first!r}): "
            "it was made of other data, another poison or another seed. Audit this very recipe, or plant no poison "
            "(a recipe like clip-clean, or attack=none)."
        )
    rank = scores["rank"].take(found.combine_chunks())
    return pairs.filter(pc.greater(rank, budget(drop, scores.num_rows)))


def round_files(run: Path) -> list[Path]:
    """The matching rounds of a run. ValueError where it has none."""
    files = sorted((run / "rounds").glob("e[0-9][0-9][0-9].parquet"))
    if not files:
        raise ValueError(f"{run} has no matching rounds (rounds/e001.parquet, …): give the directory of a run whose defence matches.")
    return files


def moved(run: Path, ids: pa.ChunkedArray, captions: Sequence[str]) -> np.ndarray:
    """Share of a run's matching rounds that gave the pair another caption (N,), NaN for pairs that the run did not have.

    ValueError where the run has no rounds, or where none of its pairs is one of these.
    """
    own = np.array(captions, dtype=object)
    times, rounds = np.zeros(len(own)), np.zeros(len(own))
    for file in round_files(run):
        pairs = pq.read_table(file, columns=["id", "pool_row"])
        pool = np.array(pq.read_table(file.with_name(f"{file.stem}-pool.parquet"))["caption"].to_pylist(), dtype=object)
        at = pc.fill_null(pc.index_in(ids, value_set=pairs["id"].combine_chunks()), -1).to_numpy()
        here = np.flatnonzero(at >= 0)
        row = pairs["pool_row"].to_numpy()[at[here]]
        times[here] += (row >= 0) & (pool[row] != own[here])
        rounds[here] += 1
    if not rounds.any():
        raise ValueError(f"{run} was trained on other pairs: none of its ids is in the audited set.")
    return np.divide(times, rounds, out=np.full(len(own), np.nan), where=rounds > 0)


def measured(scores: pa.Table, poison: np.ndarray, part: np.ndarray) -> dict[str, dict[str, dict[str, float]]]:
    """What each score alone, and all together, are worth: poisoned part ("all" first) → score → AUROC, average precision, recall, …

    poison (N,) bool; part (N,): name of the attack's part, "" for clean pairs. A part is told from the clean pairs only.
    recall: share of the poison among the 1 % of the pairs that score highest (ties in proportion); ceiling: what is possible there.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    kinds = sorted({str(p) for p in part[poison]})
    found: dict[str, dict[str, dict[str, float]]] = {}
    for kind in ["all", *(kinds if len(kinds) > 1 else [])]:
        rows = np.flatnonzero(~poison | (poison if kind == "all" else part == kind))
        truth = poison[rows]
        found[kind] = {}
        for name in ("suspicion", *score_names(scores)):
            values = np.nan_to_num(scores[name].to_numpy().astype(np.float64), nan=-np.inf)[rows]
            values = np.where(np.isneginf(values), np.min(values[np.isfinite(values)], initial=0.0) - 1, values)
            many = max(1, round(REMOVED * len(rows)))
            found[kind]["combined" if name == "suspicion" else name] = {
                "auroc": float(roc_auc_score(truth, values)),
                "average_precision": float(average_precision_score(truth, values)),
                "recall": recall(values, truth, many),
                "ceiling": min(1.0, many / truth.sum()),
                "poison": int(truth.sum()),
                "pairs": len(rows),
            }
    return found


def recall(values: np.ndarray, truth: np.ndarray, many: int) -> float:
    """Share of the true among the `many` highest values; of values equal to the last one, in proportion."""
    bar = np.partition(values, -many)[-many]
    above, level = values > bar, values == bar
    return float((truth[above].sum() + truth[level].sum() * (many - above.sum()) / level.sum()) / truth.sum())


def score_names(scores: pa.Table) -> list[str]:
    return [name.removeprefix("adds_") for name in scores.column_names if name.startswith("adds_")]
