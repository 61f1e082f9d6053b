"""What a matching round leaves: the pool, the pairing, and what it did to poisoned and clean pairs. No Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from attacks.base import class_names, how_many, pick
from orchestrate.data.nouns import SYNONYMS, mentions

if TYPE_CHECKING:  # the report asks here which classes a caption names, and does without torch
    from defenses.base import Features, Matcher, Selection

BESIDE = "beside/"  # before the name of a matcher that was tried for comparison


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


def choose(matcher: Matcher, images: Features, pool: Features, own: Features | None) -> dict[str, np.ndarray]:
    """A match as arrays, its fields by name; under "beside/<name>" the rows (N,) that each other matcher would have chosen."""
    fields = matcher.match(images, pool, own)._asdict()
    fields |= {BESIDE + name: other.match(images, pool).index for name, other in matcher.beside.items()}
    return {name: x.cpu().numpy() for name, x in fields.items() if x is not None}


def settled(match: Mapping[str, np.ndarray], move: float) -> dict[str, np.ndarray]:
    """A whole set's match, with `stays` (N,) bool where own captions were measured: who keeps them only all pairs together can tell."""
    if "nearer" not in match:
        return dict(match)
    from defenses.matching import staying

    return {**match, "stays": staying(match["nearer"], match["own_distance"] - match["distance"], move)}


def learned(match: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What each pair learns from: its row in the pool (N,), −1 where its own caption stays, and the distance to it (N,)."""
    if "stays" not in match:
        return match["index"], match["distance"]
    stays = match["stays"]
    return np.where(stays, -1, match["index"]), np.where(stays, match["own_distance"], match["distance"])


def save(folder: Path, epoch: int, table: pa.Table, pool: Pool, match: Mapping[str, np.ndarray]) -> list[Path]:
    """Writes `e002.parquet`, a row for each pair, and `e002-pool.parquet`, the pool's ids and captions; returns both.

    id; pool_row: the caption it learns from, −1 where its own stays; distance: to that caption; nearest: the pool's nearest all the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index, distance = learned(match)
    pairs = pa.table(
        {
            "id": table.column("id"),
            "pool_row": pa.array(index.astype(np.int32)),
            "distance": pa.array(distance.astype(np.float32)),
            "nearest": pa.array(match["index"].astype(np.int32)),
        }
    )
    files = [folder / f"e{epoch:03d}.parquet", folder / f"e{epoch:03d}-pool.parquet"]
    for file, rows in zip(files, (pairs, pa.table({"id": pool.ids, "caption": pool.captions})), strict=True):
        pq.write_table(rows, file, compression="zstd")
    return files


def save_selection(folder: Path, epoch: int, table: pa.Table, cosine: np.ndarray, selection: Selection) -> Path:
    """Writes `e007-safe.parquet`, a row for each pair: id, cosine, posterior (of agreeing), safe; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"id": table.column("id"), "cosine": cosine, "posterior": selection.posterior, "safe": selection.safe}
    file = folder / f"e{epoch:03d}-safe.parquet"
    pq.write_table(pa.table(columns), file, compression="zstd")
    return file


def selection_facts(table: pa.Table, cosine: np.ndarray, selection: Selection) -> dict[str, Any]:
    """What a selection did: `pairs`, `poisoned` and `safe` are counts, the rest shares and cosines.

    share          safe pairs, of all
    poison_in_safe poisoned pairs, of the safe ones
    poisoned_safe  safe pairs, of the poisoned ones
    """
    poison, safe = table.column("poison").to_numpy(zero_copy_only=False), selection.safe
    told: dict[str, Any] = {"pairs": len(safe), "poisoned": int(poison.sum()), "safe": int(safe.sum()), "share": selection.share}
    told |= {
        "poison_in_safe": float(poison[safe].mean()),
        "threshold": float(cosine[safe].min()),
        "cosine/clean": float(cosine[~poison].mean()),
    }
    if poison.any():
        told |= {"poisoned_safe": float(safe[poison].mean()), "cosine/poisoned": float(cosine[poison].mean())}
    return told


def named_classes(captions: Sequence[str], classes: Sequence[str]) -> list[frozenset[int]]:
    """Which classes each caption names: as a whole word, singular or plural, by name or by a synonym that made captions use."""
    words, owner = [], []
    for i, name in enumerate(classes):
        plain = name.replace("_", " ").lower()
        for word in (plain, *SYNONYMS.get(plain, ())):
            words.append(word)
            owner.append(i)
    return [frozenset(owner[k] for k in some) for some in mentions(captions, words)]


def facts(table: pa.Table, pool: Pool, match: Mapping[str, np.ndarray], matcher: str) -> dict[str, Any]:
    """What a round did, as shares:

    moved          pairs whose caption is another one now
    poisoned_kept  poisoned pairs whose new caption still names the adversary's class
    clean_kept     labelled clean pairs whose new caption still names their own class

    and how good the pool's nearest captions are, learned from or not, by `matcher` and by those tried beside it:

    quality/<matcher>/poisoned  poisoned pairs whose nearest caption does not name the adversary's class
    quality/<matcher>/clean     labelled clean pairs whose nearest caption names their own class
    """
    classes = class_names(table)
    index, distance = learned(match)
    captions = np.array(table.column("caption").to_pylist(), dtype=object)
    stays = index < 0
    told: dict[str, Any] = {
        "pairs": len(index),
        "pool": len(pool.ids),
        "moved": float(np.mean(~stays & (captions != np.array(pool.captions, dtype=object)[index]))),
        "distance": float(np.mean(distance)),
        "used": len(np.unique(index[~stays])) / len(pool.ids),
        "poisoned": int(table.column("poison").to_numpy(zero_copy_only=False).sum()),
    }
    if "solved" in match:
        told["solved"] = float(np.mean(match["solved"]))
    from_pool, from_own = named_classes(pool.captions, classes), iter(named_classes(captions[stays].tolist(), classes))
    named = [from_pool[k] if k >= 0 else next(from_own) for k in index]
    tried = {matcher: match["index"]} | {name.removeprefix(BESIDE): row for name, row in match.items() if name.startswith(BESIDE)}
    for kind, (rows, wanted) in _watched(table, classes).items():
        told[f"{kind}_kept"] = float(np.mean([k in named[i] for i, k in zip(rows, wanted, strict=True)]))
        for name, nearest in tried.items():
            naming = float(np.mean([k in from_pool[j] for j, k in zip(nearest[rows], wanted, strict=True)]))
            told[f"quality/{name}/{kind}"] = naming if kind == "clean" else 1 - naming
    return told


def _watched(table: pa.Table, classes: Sequence[str]) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Kind of pair → its rows, and the class to look for in each: the adversary's of a poisoned pair, a clean pair's own."""
    poison = table.column("poison").to_numpy(zero_copy_only=False)
    label = table.column("label").to_numpy()
    kinds = {}
    if poison.any() and classes:
        rows, number = np.flatnonzero(poison), {name: i for i, name in enumerate(classes)}
        adversary = table.column("adversary").to_pylist()
        kinds["poisoned"] = (rows, [number.get(adversary[i], -1) for i in rows])
    clean = np.flatnonzero(~poison & (label >= 0))
    if len(clean):
        kinds["clean"] = (clean, label[clean].tolist())
    return kinds
