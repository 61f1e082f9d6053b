"""A recipe's images, decoded once a session by Ray Data, and its poisoned index: read by this process, or lent by another. No Ray but the
door's (`cluster`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from orchestrate import cluster, prepared
from orchestrate.data import reader
from orchestrate.data.index import Dataset
from orchestrate.data.pixels import distinct
from orchestrate.progress import Phase
from orchestrate.recipe import Recipe

CHUNK = 512  # images a reading task decodes


def read_images(recipe: Recipe, dataset: Dataset, streaming: bool) -> tuple[Dataset, tuple[Any, dict[Any, int]] | None]:
    """Decode every image once, by Ray Data: (the readable data set, (reference to (images, S, S, 3) uint8, place by reference)).

    A set that streams is only checked (once: the outcome is kept in the cache), and None stands for its images. ValueError when more than
    the share `data.max_bad` cannot be read; then nothing is kept.
    """
    known = prepared.known_unreadable(recipe, dataset) if streaming else None
    if known is not None:
        return prepared.without_known(recipe, dataset, known), None
    rows = pa.concat_tables([dataset.train, dataset.heldout])
    first, place = distinct(rows)
    side = prepared.stored_side(recipe)
    key = (cluster.node_id(), prepared.fingerprint(dataset), side, recipe.data.max_pixels)
    if not streaming and key in _WARM:
        bad, held = _WARM[key]
        return prepared.without_unreadable(dataset, bad, recipe.data.max_bad), held
    images = None if streaming else np.zeros((first.num_rows, side, side, 3), np.uint8)
    failed = _decode(first, side, recipe, images)
    reasons = {i: why for i, why, _ in failed}
    ids = rows.column("id").to_pylist()
    bad = [(ids[i], reasons[int(p)]) for i, p in enumerate(place) if int(p) in reasons] if failed else []
    readable = prepared.without_unreadable(dataset, bad, recipe.data.max_bad)
    # A store that was away comes back: only what is wrong with the images themselves holds for good. Kept for streams, which are checked
    # once, and for `eval`, `poison` and `repair`, which leave the same images out.
    if (streaming or bad) and all(lasting for _, _, lasting in failed):
        prepared.remember_unreadable(recipe, dataset, bad)
    _WARM.clear()  # one set at a time: a session that goes on to another frees this one
    if images is None:
        return readable, None
    held = (cluster.put(images), prepared.places(first))
    _WARM[key] = (bad, held)
    return readable, held


_WARM: dict[Any, Any] = {}  # the last set decoded in this session: runs of one demo share it, and `lend` adds a sweep's


_PLANS: dict[str, Any] = {}  # plans that another process of this session has lent: key → reference
_LAST: dict[str, prepared.Prepared] = {}  # the last plan of this process: an audited run plans thrice, and some attacks train for it


def prepare(recipe: Recipe) -> tuple[dict[Any, Any], Dataset]:
    """Read a recipe's set in this process for others to be lent: (decoded sets, the readable data set).

    The pixels live as long as this process holds what is returned. No sets for one that streams: that one is checked now, so that
    nobody else has to.
    """
    dataset = prepared.opened(recipe.data)
    streaming = prepared.streams(recipe, dataset)
    readable, _ = read_images(recipe, dataset, streaming)
    return {} if streaming else dict(_WARM), readable


def lend(sets: Mapping[Any, Any], plans: Mapping[str, Any]) -> None:
    """Take over what another process of this session has prepared. Pixels and tables stay where they are, one copy a node."""
    here = cluster.node_id()
    _WARM.update({(here, *key[1:]): held for key, held in sets.items()})
    _PLANS.update(plans)


def planned(recipe: Recipe, dataset: Dataset, images: tuple[Any, dict[Any, int]] | None) -> prepared.Prepared:
    """The poisoned index: lent, where a sweep has made it for all trials of this data, attack and seed; or this process's last one."""
    key = prepared.plan_key(recipe, dataset)
    if key in _PLANS:
        table, manifest, probes = cluster.get(_PLANS[key])
        return prepared.Prepared(dataset, table, manifest, probes)
    if key not in _LAST:
        ready = prepared.plan(recipe, dataset, prepared.loader(recipe, None, cluster.get(images[0]), images[1]) if images else None)
        _LAST.clear()
        _LAST[key] = ready
    return replace(_LAST[key], dataset=dataset)


def _decode(rows: pa.Table, side: int, recipe: Recipe, images: np.ndarray | None) -> list[tuple[int, str, bool]]:
    """Fill `images` (n, S, S, 3) from `rows`; returns (position, reason, whether the image itself is at fault) of what failed."""
    data = cluster.quiet_data()
    blocks = [
        rows.slice(i, CHUNK).append_column("at", pa.array(np.arange(i, min(i + CHUNK, rows.num_rows))))
        for i in range(0, rows.num_rows, CHUNK)
    ]
    keep, max_pixels = images is not None, recipe.data.max_pixels

    def decode(block: pa.Table) -> dict[str, np.ndarray]:
        found, errors = reader.attempt(block, side, max_pixels)
        reasons, lasting = [""] * block.num_rows, np.zeros(block.num_rows, bool)
        for (i, error), (_, why) in zip(errors, reader.described(block, errors), strict=True):
            reasons[i], lasting[i] = why, isinstance(error, reader.BadImage)
        out = {"at": block.column("at").to_numpy(), "error": np.array(reasons), "lasting": lasting}
        return {**out, "image": found} if keep else out

    failed: list[tuple[int, str, bool]] = []
    with Phase("read", len(rows), "image") as phase:
        seen = 0
        dataset = data.from_arrow(blocks).map_batches(
            decode,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=1,
            compute=data.TaskPoolStrategy(size=min(recipe.cluster.readers, len(blocks))),
        )
        for batch in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2):
            if images is not None:
                images[batch["at"]] = batch["image"]
            found = zip(batch["at"], batch["error"], batch["lasting"], strict=True)
            failed += [(int(i), str(why), bool(lasting)) for i, why, lasting in found if why]
            phase.at(seen := seen + len(batch["at"]))
    return failed
