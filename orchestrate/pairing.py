"""What a matching round leaves: the pool, the pairing, and what it did to poisoned and clean pairs. No Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from attacks.base import class_names, how_many, pick
from orchestrate.data.nouns import SYNONYMS, mentions


@dataclass(frozen=True)
class Pool:
    """A round's captions: the sample ids they come from and their text, in rank order."""

    ids: list[str]
    captions: list[str]


def draw_pool(table: pa.Table, size: int | float, seed: int, epoch: int) -> Pool:
    """A fresh random sample of the training captions (poisoned ones among them), by hash of (id, seed, epoch)."""
    ids = table.column("id").to_pylist()
    count = min(len(ids), max(2, how_many(size, len(ids))))
    chosen = pa.array(pick(ids, count, seed, f"pool/{epoch}"))
    return Pool(table.column("id").take(chosen).to_pylist(), table.column("caption").take(chosen).to_pylist())


def assemble(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Results of consecutive items, joined row by row; token sets of differing length are padded with zeros."""
    joined = {}
    for name in parts[0]:
        arrays = [part[name] for part in parts]
        if arrays[0].ndim > 1:
            longest = max(a.shape[1] for a in arrays)
            arrays = [np.pad(a, [(0, 0), (0, longest - a.shape[1]), *[(0, 0)] * (a.ndim - 2)]) for a in arrays]
        joined[name] = np.concatenate(arrays)
    return joined


def save(folder: Path, epoch: int, table: pa.Table, pool: Pool, match: dict[str, np.ndarray]) -> None:
    """`e002.parquet`: id, pool_row (−1: the own caption stays) and distance of every pair; `e002-pool.parquet`: the pool's captions."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = pa.table(
        {
            "id": table.column("id"),
            "pool_row": pa.array(match["index"].astype(np.int32)),
            "distance": pa.array(match["distance"].astype(np.float32)),
        }
    )
    pq.write_table(pairs, folder / f"e{epoch:03d}.parquet", compression="zstd")
    pq.write_table(pa.table({"id": pool.ids, "caption": pool.captions}), folder / f"e{epoch:03d}-pool.parquet", compression="zstd")


def named_classes(captions: Sequence[str], classes: Sequence[str]) -> list[frozenset[int]]:
    """Which classes each caption names: as a whole word, singular or plural, by name or by a synonym that made captions use."""
    words, owner = [], []
    for i, name in enumerate(classes):
        plain = name.replace("_", " ").lower()
        for word in (plain, *SYNONYMS.get(plain, ())):
            words.append(word)
            owner.append(i)
    return [frozenset(owner[k] for k in some) for some in mentions(captions, words)]


def facts(table: pa.Table, pool: Pool, match: dict[str, np.ndarray]) -> dict[str, Any]:
    """What a round did, as shares:

    moved          pairs whose caption is another one now
    poisoned_kept  poisoned pairs whose new caption still names the adversary's class
    clean_kept     labelled clean pairs whose new caption still names their own class
    """
    index, classes = match["index"], class_names(table)
    poison = table.column("poison").to_numpy(zero_copy_only=False)
    captions = np.array(table.column("caption").to_pylist(), dtype=object)
    stays = index < 0
    told: dict[str, Any] = {
        "pairs": len(index),
        "pool": len(pool.ids),
        "moved": float(np.mean(~stays & (captions != np.array(pool.captions, dtype=object)[index]))),
        "distance": float(np.mean(match["distance"])),
        "used": len(np.unique(index[~stays])) / len(pool.ids),
        "poisoned": int(poison.sum()),
    }
    if "solved" in match:
        told["solved"] = float(np.mean(match["solved"]))
    from_pool, from_own = named_classes(pool.captions, classes), iter(named_classes(captions[stays].tolist(), classes))
    named = [from_pool[k] if k >= 0 else next(from_own) for k in index]
    if poison.any() and classes:
        number = {name: i for i, name in enumerate(classes)}
        adversary = [number.get(a, -1) for a in table.column("adversary").to_pylist()]
        told["poisoned_kept"] = float(np.mean([adversary[i] in named[i] for i in np.flatnonzero(poison)]))
    label = table.column("label").to_numpy()
    clean = np.flatnonzero(~poison & (label >= 0))
    if len(clean):
        told["clean_kept"] = float(np.mean([label[i] in named[i] for i in clean]))
    return told
