"""The part of an audit that looks at every image and caption: Ray Data actors that encode pairs and score them, a part at a time.

    driver ──weights, pool, table, pixels: by reference──▶ ScoreActor × n ──a part's columns──▶ driver ──▶ parts/00012.parquet

A part is a pure function of (weights, pool, its rows), so one that a killed actor left is done again, and one whose file is there is not.
Nobody ever holds more pixels or features than one part's; what stays is a few numbers a pair.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from defenses import detect, duplicates
from orchestrate import cluster
from orchestrate import recipe as recipes
from orchestrate.data.pixels import Pixels
from orchestrate.match import pack, unpack
from orchestrate.prepared import build_attack, pixels_of
from orchestrate.recipe import Recipe

TOGETHER = 4  # batches a part
NO_MEMORY = "lower the batch (--batch), or give the actors a node with more memory (cluster.match_actors=1 for fewer at once)."
NEAREST = 3  # captions of the pool that are kept for the page


@dataclass(frozen=True)
class Work:
    """What the actors need. `order`: (N,) rows of the table, part by part, in which neighbours are sought."""

    recipe: Recipe
    table: pa.Table
    images: tuple[Any, np.ndarray] | None  # (reference to the decoded array, place of each row in it); None: read from files
    order: np.ndarray
    weights: dict[str, np.ndarray]
    cfg: dict[str, Any]
    pool: list[str]
    tokens: bool  # whether the model has token features, for transport


def parts(count: int, size: int) -> list[dict[str, Any]]:
    """Items of work: the number of the part and the edges of its batches in the order."""
    whole = detect.batches(count, size)
    some = [whole[i : i + TOGETHER] for i in range(0, len(whole), TOGETHER)]
    return [{"part": number, "edges": [batch[0][0], *(stop for _, stop in batch)]} for number, batch in enumerate(some)]


class ScoreActor:
    """One actor: model and pool ready, pixels by reference. Every actor encodes the pool itself, once."""

    def __init__(self, desk: Any, spec: dict[str, Any]) -> None:
        import torch

        from defenses.token_pool import TokenPool
        from models import clip
        from orchestrate.encoder import Encoder

        torch.set_num_threads(spec["threads"])
        recipe = recipes.unpacked(spec["recipe"])
        refs = cluster.get(desk.refs.remote(), recipe.cluster.timeout_s)
        table, self.order, place = (cluster.get(refs[name]) for name in ("table", "order", "place"))
        self.pixels = pixels_of(recipe, build_attack(recipe, table), table, cluster.get(refs["images"]), place)
        self.captions = table.column("caption")
        model = clip.build(spec["cfg"], seed=0)
        if recipe.model.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        device = "cuda" if spec["gpus"] else "cpu"
        self.encoder = Encoder(model, spec["cfg"], device, recipe.evaluate.batch, recipe.evaluate.precision)
        self.encoder.load(cluster.get(refs["weights"]))
        self.tokens = spec["tokens"]
        self.pool = self.encoder.text_features(cluster.get(refs["pool"]), self.tokens)
        self.token_pool = TokenPool(self.pool.tokens, self.pool.mask, self.pool.pooled) if self.tokens else None  # type: ignore[arg-type]

    def __call__(self, item: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        edges = [int(x) for x in item["edges"][0]]
        rows = np.asarray(self.order[edges[0] : edges[-1]])
        images = self._read(rows)
        columns: list[dict[str, np.ndarray]] = []
        sums: dict[str, Any] = {"mean": 0.0, "square": 0.0}
        for start, stop in pairwise(edges):  # one batch at a time: pixels as float32 are large
            here = slice(start - edges[0], stop - edges[0])
            signs, thumbs = duplicates.prints(images[here])
            columns.append(self._scores(images[here], rows[here]) | {"signs": signs, "thumbs": thumbs})
            shades = images[here].astype(np.float32)
            sums = {name: total + (shades**power).sum(0, dtype=np.float64) for power, (name, total) in enumerate(sums.items(), 1)}
        found = {name: np.concatenate([c[name] for c in columns]) for name in columns[0]} | {"row": rows}
        found |= {name: total / len(rows) for name, total in sums.items()}
        return {"part": item["part"], "payload": np.array([pack(found)], dtype=object)}

    def _read(self, rows: np.ndarray) -> np.ndarray:
        """Pixels in the order of `rows`, read in the order of the table: each stretch of a file once."""
        sequence = np.argsort(rows, kind="stable")
        images = self.pixels.take(rows[sequence])
        out = np.empty_like(images)
        out[sequence] = images
        return out

    def _scores(self, pixels: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        images = self.encoder.image_features(pixels, self.tokens)
        captions = self.encoder.text_features(self.captions.take(pa.array(rows)).to_pylist(), self.tokens)
        scores = detect.outliers(images.pooled) | {"clip": detect.mismatch(images.pooled, captions.pooled)}
        soft = self.encoder.image_features(pixels, blur=detect.LOOK)
        scores["nearer"] = detect.nearer((images.pooled, soft.pooled), captions.pooled, self.pool.pooled)
        if self.token_pool is not None:
            scores["transport"] = detect.transport_excess(images, captions, self.token_pool)
        nearest = (images.pooled @ self.pool.pooled.T).topk(min(NEAREST, len(self.pool.pooled)), dim=1).indices
        return {name: x.float().cpu().numpy() for name, x in scores.items()} | {"nearest": nearest.cpu().numpy().astype(np.int32)}


def run(work: Work, folder: Path, items: list[dict[str, Any]]) -> Iterator[int]:
    """Score the items whose file is not in `folder` yet, and write it; yields the number of pairs done as they are."""
    todo = [item for item in items if not _file(folder, item["part"]).exists()]
    done = sum(item["edges"][-1] - item["edges"][0] for item in items) - sum(item["edges"][-1] - item["edges"][0] for item in todo)
    yield done
    if not todo:
        return
    c = work.recipe.cluster
    images, place = work.images if work.images else (cluster.put(None), None)
    refs: dict[str, Any] = {name: cluster.put(x) for name, x in (("table", work.table), ("order", work.order), ("place", place))}
    refs |= {"images": images, "weights": cluster.put(work.weights), "pool": cluster.put(work.pool)}
    spec = {
        "recipe": recipes.packed(work.recipe),
        "cfg": work.cfg,
        "tokens": work.tokens,
        "gpus": c.match_gpus,
        "threads": c.threads or max(1, (os.cpu_count() or 1) // c.match_actors),
    }
    desk = cluster.desk(refs)
    try:
        for found in cluster.through_actors(todo, ScoreActor, (desk, spec), c):
            arrays = unpack(found["payload"])
            _write(folder, int(found["part"]), arrays)
            yield (done := done + len(arrays["row"]))
    except Exception as error:
        if not cluster.died(error):
            raise
        raise RuntimeError(f"scoring actors {cluster.AGAIN}: {NO_MEMORY} What is scored is kept.") from error


def local_pixels(recipe: Recipe, table: pa.Table, images: tuple[Any, np.ndarray] | None) -> Pixels:
    """The pairs' pixels for this process, as the actors read them."""
    held, place = images if images else (None, None)
    return pixels_of(recipe, build_attack(recipe, table), table, None if held is None else cluster.get(held), place)


def _file(folder: Path, part: int) -> Path:
    return folder / f"{part:05d}.parquet"


def _write(folder: Path, part: int, arrays: dict[str, np.ndarray]) -> None:
    """The part's pairs as a table, its mean image beside it; the table last, as it says that the part is done."""
    np.savez(folder / f"{part:05d}.npz", count=len(arrays["row"]), mean=arrays.pop("mean"), square=arrays.pop("square"))
    columns = {name: pa.array(list(x)) if x.ndim > 1 else pa.array(x) for name, x in arrays.items()}
    target = _file(folder, part)
    pq.write_table(pa.table(columns), target.with_suffix(".writing"), compression="zstd")
    target.with_suffix(".writing").replace(target)


def read(folder: Path, items: list[dict[str, Any]], count: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """All parts, put together: columns (count, …) in the table's order, and {"mean", "square"}: of all images (S, S, 3)."""
    columns: dict[str, np.ndarray] = {}
    sums: dict[str, Any] = {"mean": 0.0, "square": 0.0}
    for item in items:
        table = pq.read_table(_file(folder, item["part"]))
        rows = table.column("row").to_numpy()
        for name in table.column_names:
            values = table.column(name).combine_chunks()
            array = values.flatten().to_numpy().reshape(len(rows), -1) if pa.types.is_list(values.type) else values.to_numpy()
            if name not in columns:
                columns[name] = np.empty((count, *array.shape[1:]), array.dtype)
            columns[name][rows] = array
        with np.load(folder / f"{item['part']:05d}.npz", allow_pickle=False) as whole:
            sums = {name: sums[name] + whole[name] * (int(whole["count"]) / count) for name in sums}
    del columns["row"]
    return columns, sums
