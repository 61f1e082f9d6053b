"""Matching rounds: Ray Data actors encode a pool of captions and every image, and say which caption each image learns from.

A defence that selects pairs instead (`Defense.selector`) has rounds without a pool: the actors give each pair's own cosine.

A Ray Data execution costs seconds to start (actors, imports), a round on a small set takes one. So a run has *one* execution for all its
rounds: its input is the list of work items (round, which captions or images), its operator is a pool of actors, and an actor that
reaches an item whose round has not begun waits for the weights. Ray Data restarts a killed actor and gives its item to another; items
are pure functions of (weights, pool, positions), so a repeated one changes nothing.

    training worker 0 ──publish(epoch, weights)──▶ Rounds (one per run) ──weights, then the encoded pool, by reference──▶ MatchActor × n
    every worker ◀────── pairing(epoch), by reference ────── Rounds ◀────── items as they finish ─────────────────────────┘

Nothing of size images × pool exists: an actor holds `match_batch` images at a time against the pool, in the matcher's own tiles. Of an
item it hands on a few numbers an image.
"""

from __future__ import annotations

import io
import os
import threading
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import ray

from defenses.base import Defense, Features, Matcher
from orchestrate import cluster
from orchestrate import recipe as recipes
from orchestrate.pairing import Pool, assemble, choose, draw_pool, facts, learned, save, save_selection, selection_facts, settled
from orchestrate.prepared import build_attack, build_defense, pixels_of
from orchestrate.storage import Store

CAPTIONS, IMAGES = 0, 1  # kinds of work items
SHARES = 8  # items an actor gets of a large set's images: actors end within an eighth of each other, and one driver hands out all items
KEPT = 2  # finished rounds held for workers that start again from a checkpoint
IDLE = 2  # executions in a row that may be lost without a finished item
NO_MEMORY = "lower cluster.match_batch or the pool, or give matching actors a node with more memory."


def work_items(epochs: Iterable[int], pools: dict[int, int], images: int, batch: int, actors: int) -> list[dict[str, int]]:
    """All rounds' items in the order they run: a round's captions before its images. Large sets get larger items, not more.

    Items of images are whole multiples of `batch`, which is what an actor holds at a time.
    """
    step = batch * max(1, -(-images // (batch * SHARES * actors)))
    items = []
    for epoch in epochs:
        part = max(256, -(-pools[epoch] // (2 * actors)))
        for kind, total, size in ((CAPTIONS, pools[epoch], part), (IMAGES, images, step)):
            items += [{"epoch": epoch, "kind": kind, "start": i, "stop": min(i + size, total)} for i in range(0, total, size)]
    return items


class MatchActor:
    """One actor of the pool: holds the model and reads pixels by reference. Called by Ray Data with one work item."""

    def __init__(self, rounds: Any, spec: dict[str, Any]) -> None:
        import torch

        from orchestrate.evaluate import Encoder
        from orchestrate.step import architecture

        torch.set_num_threads(spec["threads"])
        self.rounds, self.timeout, self.batch = rounds, spec["timeout_s"], spec["batch"]
        recipe = recipes.unpacked(spec["recipe"])
        self.defense = build_defense(recipe)
        inputs = ray.get(rounds.inputs.remote(), timeout=self.timeout)
        table, images, place = ray.get(inputs["train"], timeout=self.timeout)
        self.pixels = pixels_of(recipe, build_attack(recipe, table), table, images, place)
        self.own = self.pixels.table.column("caption").to_pylist()
        model, cfg = architecture(recipe)
        device = "cuda" if spec["gpus"] else "cpu"
        self.encoder = Encoder(model, cfg, device, batch=recipe.evaluate.batch, precision=recipe.evaluate.precision)
        self.epoch = -1
        self.matcher: Matcher | None = None
        self.pool: Features | None = None

    def __call__(self, item: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        epoch, kind, start, stop = (int(item[k][0]) for k in ("epoch", "kind", "start", "stop"))
        self._enter(epoch)
        try:
            arrays = self._captions(start, stop) if kind == CAPTIONS else self._images(epoch, start, stop)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "memory" not in str(error):  # torch's own are RuntimeErrors
                raise
            many = stop - start if kind == CAPTIONS else min(stop - start, self.batch)
            raise MemoryError(f"matching {many} images or captions at once does not fit: {NO_MEMORY} ({error})") from None
        return {**item, "payload": np.array([pack(arrays)], dtype=object)}

    def _images(self, epoch: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """An item's images, one batch at a time."""
        edges = range(start, stop, self.batch)
        return assemble([self._batch(epoch, i, min(i + self.batch, stop)) for i in edges])

    def _batch(self, epoch: int, start: int, stop: int) -> dict[str, np.ndarray]:
        return self._agreement(start, stop) if self.matcher is None else self._match(self.matcher, epoch, start, stop)

    def _agreement(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Cosine of each image and its own caption."""
        shown = self.encoder.images(self.pixels.take(np.arange(start, stop)))
        return {"cosine": (shown * self.encoder.texts(self.own[start:stop])).sum(1).cpu().numpy()}

    def _captions(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Features of a part of the pool."""
        assert self.matcher is not None, "a selection has no pool"
        matcher = self.matcher
        encoded = self.encoder.text_features(self.captions[start:stop], matcher.tokens)
        return {name: x.cpu().numpy() for name, x in encoded._asdict().items() if x is not None}

    def _match(self, matcher: Matcher, epoch: int, start: int, stop: int) -> dict[str, np.ndarray]:
        self.pool = self.pool or self._encoded_pool(epoch)
        images = self.encoder.image_features(self.pixels.take(np.arange(start, stop)), matcher.tokens, matcher.look)
        own = self.encoder.text_features(self.own[start:stop], matcher.tokens) if matcher.move < 1 else None
        return choose(matcher, images, self.pool, own)

    def _enter(self, epoch: int) -> None:
        """Take up a round: wait (without limit: the training must get there) for its weights, and load them."""
        if epoch == self.epoch:
            return
        weights, captions = ray.get(self.rounds.weights.remote(epoch))
        self.encoder.load(ray.get(weights, timeout=self.timeout))
        self.captions = ray.get(captions, timeout=self.timeout)
        self.matcher, self.pool, self.epoch = self.defense.matcher(epoch), None, epoch

    def _encoded_pool(self, epoch: int) -> Any:
        [ref] = ray.get(self.rounds.encoded.remote(epoch), timeout=self.timeout)
        return self.encoder.features_from(ray.get(ref, timeout=self.timeout))


class Rounds:
    """The run's desk: hands out inputs, weights, pools and pairings; drives the execution in a thread of its own.

    Whoever waits here for another process does so with a limit of its own; a failed execution is raised to everybody who waits.
    """

    def __init__(self, recipe: dict[str, Any], run_dir: str, inputs: dict[str, Any]) -> None:
        self.recipe, self.run_dir, self._inputs = recipes.unpacked(recipe), Path(run_dir), inputs
        self.defense, self.store = build_defense(self.recipe), Store.of(self.recipe)
        self.change = threading.Condition()
        self.pools: dict[int, Pool] = {}
        self.states: dict[int, list[Any]] = {}
        self.encodings: dict[int, list[Any]] = {}
        self.parts: dict[int, dict[tuple[int, int], dict[str, np.ndarray]]] = {}
        self.done: dict[int, dict[str, Any]] = {}
        self.wanted: dict[tuple[int, int], list[int]] = {}  # (epoch, kind) → where its items start, in order
        self.taken: set[tuple[int, int, int]] = set()  # items that are done, by `_place`
        self.started: dict[int, float] = {}
        self.safe_share: dict[int, float | None] = {}
        self.error = ""
        self.note: dict[str, Any] = {}
        self.execution: threading.Thread | None = None

    def inputs(self) -> dict[str, Any]:
        """References: "train" and "heldout", each [table, images, place]."""
        return self._inputs

    def begin(self, first_epoch: int, me: Any) -> None:
        """Start the execution for the robust epochs from `first_epoch` on; a second call (a restarted worker) changes nothing."""
        with self.change:
            if self.execution is not None:
                return
            self.table = ray.get(self._inputs["train"][0])
            epochs = [e for e in self.defense.rounds(self.recipe.train.epochs) if e >= first_epoch]
            self.pools = {e: self._pool(e) for e in epochs}
            self.execution = threading.Thread(target=self._guarded, args=(epochs, me), daemon=True)
            self.execution.start()

    def _pool(self, epoch: int) -> Pool:
        matcher = self.defense.matcher(epoch)
        assert matcher is None or self.defense.selector(epoch) is None, f"epoch {epoch} is matched and selected"
        return Pool([], []) if matcher is None else draw_pool(self.table, matcher.pool_size, self.recipe.seed, epoch)

    def publish(self, epoch: int, weights: dict[str, Any], safe_share: float | None = None) -> None:
        """Weights for a round, by value: put by this actor, they outlive the worker that sent them. `safe_share`: `Selection.share` so far.

        A worker that repeats an epoch repeats its weights, so the first stand.
        """
        with self.change:
            if epoch not in self.states:
                self.started[epoch], self.safe_share[epoch] = time.monotonic(), safe_share
                self.states[epoch] = [ray.put(weights), ray.put(self.pools[epoch].captions)]
                self.change.notify_all()

    def weights(self, epoch: int) -> list[Any]:
        return self._wait(lambda: self.states.get(epoch))

    def encoded(self, epoch: int) -> list[Any]:
        return self._wait(lambda: self.encodings.get(epoch))

    def pairing(self, epoch: int) -> dict[str, Any]:
        """{"pairing": [reference], "facts": {…}} once the round is done; of a selection, the pairing holds `safe` (N,) and `share`."""
        return self._wait(lambda: self.done.get(epoch))

    def report(self, note: dict[str, Any]) -> None:
        """The training's progress, for whoever shows it."""
        self.note = note

    def progress(self) -> dict[str, Any]:
        return self.note

    def _wait(self, ready: Any) -> Any:
        with self.change:
            while (value := ready()) is None:
                if self.error:
                    raise RuntimeError(f"a matching round failed:\n{self.error}")
                self.change.wait(1)
            return value

    def _guarded(self, epochs: list[int], me: Any) -> None:
        try:
            if epochs:
                self._run(epochs, me)
        except BaseException as error:  # whatever it is, the workers that wait must hear of it
            with self.change:
                self.error = _told(error)
                self.change.notify_all()

    def _run(self, epochs: list[int], me: Any) -> None:
        """Every round's items, in one execution; what a lost node left undone in another one."""
        c = self.recipe.cluster
        items = work_items(epochs, {e: len(p.ids) for e, p in self.pools.items()}, self.table.num_rows, c.match_batch, c.match_actors)
        for item in items:
            self.wanted.setdefault((item["epoch"], item["kind"]), []).append(item["start"])
        idle = 0  # executions in a row that were lost before they finished anything: not the nodes' fault for ever
        for attempt in range(cluster.ATTEMPTS + 1):
            done = len(self.taken)
            try:
                return self._execute([item for item in items if _place(item) not in self.taken], me)
            except Exception as error:
                idle = idle + 1 if len(self.taken) == done else 0
                if attempt == cluster.ATTEMPTS or idle == IDLE or not cluster.lost(error):
                    raise

    def _execute(self, items: list[dict[str, int]], me: Any) -> None:
        """Items through one pool of actors, in order: an actor that met a round's images before its captions would wait for the encoded
        pool, and the captions for the actor."""
        c = self.recipe.cluster
        spec = {
            "recipe": recipes.packed(self.recipe),
            "timeout_s": c.timeout_s,
            "batch": c.match_batch,
            "gpus": c.match_gpus,
            "threads": max(1, (os.cpu_count() or 1) // c.match_actors),
        }
        for found in cluster.through_actors(items, MatchActor, (me, spec), c):
            self._take({k: int(found[k]) for k in ("epoch", "kind", "start", "stop")}, unpack(found["payload"]))

    def _take(self, item: dict[str, int], arrays: dict[str, np.ndarray]) -> None:
        """One finished item; the last of a kind completes the encoded pool, or the pairing."""
        epoch, kind = item["epoch"], item["kind"]
        self.taken.add(_place(item))
        parts = self.parts.setdefault(epoch, {})
        parts[kind, item["start"]] = arrays
        wanted = self.wanted[epoch, kind]
        if len([at for at in parts if at[0] == kind]) < len(wanted):
            return
        whole = assemble([parts.pop((kind, start)) for start in wanted])
        if kind == CAPTIONS:
            with self.change:
                self.encodings[epoch] = [ray.put(whole)]
                self.change.notify_all()
        else:
            self._finish(epoch, whole)

    def _finish(self, epoch: int, found: dict[str, np.ndarray]) -> None:
        pairing, told = self._selected(epoch, found["cosine"]) if "cosine" in found else self._paired(epoch, found)
        with self.change:
            told |= {"epoch": epoch, "seconds": time.monotonic() - self.started[epoch]}
            self.done[epoch] = {"pairing": [ray.put(pairing)], "facts": told}
            for old in sorted(self.done)[:-KEPT]:  # a worker may start again one epoch back, not more
                for held in (self.done, self.states, self.encodings, self.parts):
                    held.pop(old, None)
            self.change.notify_all()

    def _keep(self, files: list[Path]) -> None:
        """Files of a round, in the run's storage before anybody learns from it."""
        self.store.push(self.run_dir, [file.relative_to(self.run_dir).as_posix() for file in files])

    def _selected(self, epoch: int, cosine: np.ndarray) -> tuple[dict[str, Any], dict[str, Any]]:
        selector = self.defense.selector(epoch)
        assert selector is not None
        selection = selector.split(cosine, self.safe_share[epoch])
        self._keep([save_selection(self.run_dir / "rounds", epoch, self.table, cosine, selection)])
        told = selection_facts(self.table, cosine, selection)
        return {"safe": selection.safe, "share": selection.share}, {"kind": "select", **told}

    def _paired(self, epoch: int, match: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, Any]]:
        pool, matcher = self.pools[epoch], matcher_at(self.defense, epoch)
        match = settled(match, matcher.move)
        self._keep(save(self.run_dir / "rounds", epoch, self.table, pool, match))
        pairing: dict[str, Any] = {"index": learned(match)[0], "captions": pool.captions, "matched": matcher.matched}
        if matcher.matched == "embedding":
            pairing["features"] = ray.get(self.encodings[epoch][0])["pooled"]
        return pairing, {"kind": "match", **facts(self.table, pool, match, matcher.name)}


def _place(item: dict[str, int]) -> tuple[int, int, int]:
    return item["epoch"], item["kind"], item["start"]


def _told(error: BaseException) -> str:
    """What went wrong, as a user can use it; a traceback where it is ours to mend."""
    inner = cluster.innermost(error)
    if isinstance(inner, MemoryError):
        return str(inner)
    if cluster.died(error):
        return f"matching actors {cluster.AGAIN}: {NO_MEMORY}"
    return traceback.format_exc(limit=20)


def matcher_at(defense: Defense, epoch: int) -> Matcher:
    matcher = defense.matcher(epoch)
    assert matcher is not None, f"epoch {epoch} is not robust"
    return matcher


def pack(arrays: dict[str, np.ndarray]) -> bytes:
    """Named arrays → bytes: results of differing shapes travel in one column."""
    out = io.BytesIO()
    np.savez(out, **arrays)  # type: ignore[arg-type]
    return out.getvalue()


def unpack(raw: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
