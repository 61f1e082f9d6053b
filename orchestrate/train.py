"""Pre-training on Ray: `fit(recipe)`, the one entry for the command line, a sweep's trial, a test and a notebook.

    driver      index → decode once (Ray Data) → manifest → Rounds actor → TorchTrainer.fit() → export → result.json → report
    worker × W  restore → for each epoch: [publish weights, await pairing] → steps on the global batch → report(checkpoint)
    controller  each report → metrics.jsonl and MLflow (the only writer)

The order of samples, the augmentations and the pools depend on (recipe, epoch, sample id) alone, so a run that was killed anywhere goes
on from the last epoch's checkpoint to the numbers it would have had, and more workers change them by rounding only.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attacks.base import Probes, how_many
from orchestrate import batches, cluster, journal, prepared, reading, rundir
from orchestrate import recipe as recipes
from orchestrate.data.pixels import Pixels
from orchestrate.progress import Phase
from orchestrate.recipe import AUDIT, Recipe
from orchestrate.storage import CHECKPOINTS, Store
from orchestrate.track import STATE, Tracker

os.environ.update(cluster.ENVIRONMENT)
import ray
import ray.train
import ray.train.torch
from ray.train.v2._internal.execution.callback import ControllerCallback  # no public hook sees a group that waits for nodes
from ray.train.v2._internal.execution.controller.state import InitializingState, ReschedulingState, RestartingState

WINDOW = 4096  # rows shuffled together where a set streams
STREAM_CHUNK = 1024  # consecutive rows that a window is made of: near a Parquet row group
NOTE_S = 0.5  # seconds between two progress notes
LEARNT = "state.pt"  # in a checkpoint
RETRIES = 3  # of starting the workers, where nodes were lost


def fit(recipe: Recipe, *, force: bool = False, tags: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run a recipe to its end and return its result.json. A finished identity is returned as it is, unless `force`.

    Interrupted anywhere, the same call goes on from the last checkpoint. `tags` join the run's own in MLflow. ValueError for what
    the user can mend.
    """
    done = None if force else rundir.finished(recipe)
    if done:
        rundir.complete(recipe, Path(done["run"]))
        return done
    with rundir.claimed(recipe, fresh=force) as folder:
        told = rundir.tags(recipe) | dict(tags or {})
        tracker = Tracker.start(folder, recipe.track.uri, recipe.track.experiment or recipe.name, rundir.parameters(recipe), told)
        try:
            # An audit reads and plans what the run then reads and plans: in one session both are done once.
            with cluster.connected(recipe.cluster) if recipe.data.exclude == AUDIT else contextlib.nullcontext():
                result = _run(recipe, folder, tracker, _audited(recipe, folder))
        except BaseException as error:
            tracker.finish(
                "killed" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed"
            )  # SystemExit: Ray's answer to SIGTERM
            raise
        rundir.complete(recipe, folder)
        return result


def _audited(recipe: Recipe, folder: Path) -> str:
    """scores.parquet of the audit that this run makes first, "" where it makes none. It trains a model of its own, by `fit`."""
    if recipe.data.exclude != AUDIT:
        return ""
    from orchestrate.audit import beforehand

    scores = beforehand(recipe, folder / "audit")
    Store.of(recipe).push(folder, [file.relative_to(folder).as_posix() for file in (folder / "audit").iterdir() if file.is_file()])
    return str(scores)


def _run(recipe: Recipe, folder: Path, tracker: Tracker, scores: str) -> dict[str, Any]:
    started = time.monotonic()
    dataset = prepared.opened(recipe.data)
    with cluster.connected(recipe.cluster) as resources:
        streaming = prepared.streams(recipe, dataset)
        cluster.room(*prepared.needs(recipe, streaming), resources)
        cluster.check_storage(Store.of(recipe), recipe.cluster)
        dataset, images = reading.read_images(recipe, dataset, streaming)
        ready = reading.planned(recipe, dataset, images)
        ready = prepared.without_suspects(ready, scores, recipe.data.drop) if scores else ready
        prepared.check_size(recipe, ready.table)
        if journal.read(folder / journal.NAME):  # an epoch is done, and this goes on from it
            prepared.check_same_poison(folder, ready)
        prepared.write(folder, ready)
        inputs, pixels = _inputs(recipe, ready, images)
        rundir.write_gallery(folder, ready, pixels)
        Store.of(recipe).push(folder)
        seconds = time.monotonic() - started
        state = _train(recipe, folder, tracker, inputs)
    result = rundir.finish(recipe, folder, ready, state, seconds)
    if recipe.track.report:
        from orchestrate.report import write_report

        write_report([folder], folder / "report.html")
    return result


# --- the driver's side of training -------------------------------------------------------------------------------------------


def _inputs(
    recipe: Recipe, ready: prepared.Prepared, images: tuple[Any, dict[Any, int]] | None
) -> tuple[dict[str, Any], dict[str, Pixels]]:
    """References for the workers and actors, and the driver's own view of the pixels."""
    attack = prepared.build_attack(recipe, ready.table)
    held, where = images if images else (ray.put(None), {})
    array = ray.get(held)
    inputs: dict[str, Any] = {}
    pixels: dict[str, Pixels] = {}
    for split, table in (("train", ready.table), ("heldout", prepared.as_clean(ready.dataset.heldout))):
        place = prepared.place_of(table, where) if where else None
        inputs[split] = [ray.put(table), held, ray.put(place)]
        pixels[split] = prepared.pixels_of(recipe, attack, table, array, place)
    probes = {"tables": ready.probes.tables, "how": ready.probes.how, "texts": ready.probes.texts}
    d = ready.dataset
    inputs["evaluation"] = [
        ray.put({"classes": d.classes, "templates": d.templates, "probes": probes, "clean": d.train, "where": where or None})
    ]
    return inputs, pixels


def _train(recipe: Recipe, folder: Path, tracker: Tracker, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """Training from the last checkpoint to the end; returns the final state (LEARNT's content)."""
    from orchestrate.match import Rounds

    c, store = recipe.cluster, Store.of(recipe)
    name = f"rounds-{recipe.identity}"
    most = 64 + 2 * c.match_actors + 2 * c.workers
    desk = ray.remote(Rounds).options(name=name, num_cpus=0, max_concurrency=most, scheduling_strategy=cluster.on_node(cluster.node_id()))
    rounds: Any = cluster.when_free(name, lambda: desk.remote(recipes.packed(recipe), str(folder), inputs))
    # How long workers may take to find their places, all RETRIES together: a lost node should be back by then.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = f"{max(30.0, c.timeout_s / (1 + RETRIES)):g}"
    trainer = ray.train.torch.TorchTrainer(
        work,
        train_loop_config={"recipe": recipes.packed(recipe), "rounds": name},
        scaling_config=ray.train.ScalingConfig(
            num_workers=(c.least, c.workers) if c.least < c.workers else c.workers,  # type: ignore[arg-type]
            use_gpu=c.gpus > 0,
            resources_per_worker={"CPU": c.cpus, **({"GPU": c.gpus} if c.gpus else {})},
        ),
        torch_config=ray.train.torch.TorchConfig(timeout_s=int(c.timeout_s)),
        run_config=ray.train.RunConfig(
            name=CHECKPOINTS,
            storage_path=store.home,
            storage_filesystem=store.filesystem,
            failure_config=ray.train.FailureConfig(max_failures=c.max_failures, controller_failure_limit=RETRIES),  # type: ignore[call-arg]
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            callbacks=[_Log(tracker, store), _Patience(c.least, c.timeout_s)],  # type: ignore[list-item]
        ),
    )
    try:
        with _watched(rounds, recipe):
            result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise RuntimeError(cluster.cause(error)) from error
    finally:
        ray.kill(rounds)
    return _load(result.checkpoint) if result.checkpoint else None


class _Log(ray.train.UserCallback):
    """In the controller: what rank 0 reports goes to metrics.jsonl and MLflow."""

    def __init__(self, tracker: Tracker, store: Store) -> None:
        self.tracker, self.store = tracker, store

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        try:
            records = json.loads(metrics[0]["records"])
            if metrics[0].get("again") and self._has(records):
                return
            self.tracker.truncate_after(records[0]["epoch"] - 1)  # an epoch done again after a failure replaces itself
            for record in records:
                self.tracker.log(record, record["epoch"])
            self.store.push(self.tracker.run_dir, (journal.NAME, STATE))
        except Exception:  # an exception here would end the run
            logging.getLogger(__name__).exception("a record was not logged")

    def _has(self, records: list[dict[str, Any]]) -> bool:
        lines = journal.read(self.tracker.run_dir / journal.NAME)
        return sum(line.get("epoch") == records[0]["epoch"] for line in lines) >= len(records)


class _Patience(ControllerCallback):
    """In the controller: the limit of waiting for nodes that Ray Train's elastic policy lacks."""

    def __init__(self, least: int, limit_s: float) -> None:
        self.least, self.limit_s, self.since = least, limit_s, 0.0

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if not isinstance(current_state, InitializingState | RestartingState | ReschedulingState):
            self.since = 0.0
            return
        self.since = self.since or time.monotonic()
        if time.monotonic() - self.since > self.limit_s:
            raise RuntimeError(
                f"waited {self.limit_s:g} s (cluster.timeout_s) for room for {self.least} training workers (cluster.min_workers): "
                "start more nodes and run again; it goes on from the last checkpoint."
            )
        time.sleep(0.1)  # Ray's own loop does not pause


class _watched:
    """Shows the training's progress while the block runs: a thread that asks the Rounds actor."""

    def __init__(self, rounds: Any, recipe: Recipe) -> None:
        self.rounds, self.stop = rounds, threading.Event()
        self.phase = Phase(f"train {recipe.name}", unit="step")
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self.stop.wait(NOTE_S):
            try:
                note = ray.get(self.rounds.progress.remote(), timeout=10)
            except Exception:
                continue
            if note:
                self.phase.at(note["step"], note["text"], note["steps"])

    def __enter__(self) -> None:
        self.phase.__enter__()
        self.thread.start()

    def __exit__(self, *error: Any) -> None:
        self.stop.set()
        self.thread.join(timeout=12)
        self.phase.__exit__(*error)


def notes(recipes: Sequence[Recipe]) -> dict[str, str]:
    """What the runs of these recipes that train now say of their progress, by name."""
    found: dict[str, str] = {}
    for recipe in recipes:
        with contextlib.suppress(ValueError, ray.exceptions.RayError):  # not begun, or just gone
            note: Any = ray.get(ray.get_actor(f"rounds-{recipe.identity}").progress.remote(), timeout=5)
            found |= {recipe.name: note["text"]} if note else {}
    return found


# --- a worker ----------------------------------------------------------------------------------------------------------------


def work(config: dict[str, Any]) -> None:
    """One training worker, from restoring to the last report."""
    worker = Worker(recipes.unpacked(config["recipe"]), ray.get_actor(config["rounds"]))
    if worker.rank == 0:
        ray.get(worker.rounds.begin.remote(worker.first, worker.rounds), timeout=worker.timeout)
    worker.report_again()
    for epoch in range(worker.first, worker.last + 1):
        records = worker.epoch(epoch)
        worker.report(records)


class Worker:
    def __init__(self, recipe: Recipe, rounds: Any) -> None:
        import torch

        from orchestrate.step import Learner

        context = ray.train.get_context()
        self.recipe, self.rounds, self.timeout = recipe, rounds, recipe.cluster.timeout_s
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        cores = os.cpu_count() or 1
        torch.set_num_threads(recipe.cluster.threads or max(1, cores // context.get_local_world_size()))
        self.inputs = ray.get(rounds.inputs.remote(), timeout=self.timeout)
        self.table, images, place = ray.get(self.inputs["train"], timeout=self.timeout)
        self.attack, self.defense = prepared.build_attack(recipe, self.table), prepared.build_defense(recipe)
        self.pixels = prepared.pixels_of(recipe, self.attack, self.table, images, place)
        self.captions = np.array(self.table.column("caption").to_pylist(), dtype=object)
        self.keys = batches.sample_keys(self.table, recipe.seed)
        self.rows, self.batch = np.arange(self.table.num_rows), recipe.train.batch
        self.steps = len(self.rows) // self.batch  # an epoch; the remainder is another one each epoch
        epochs = range(1, recipe.train.epochs + 1)
        self.repair = self.defense.repair()
        self.last = recipe.train.epochs + (self.repair.epochs if self.repair else 0)
        self.safe_share: float | None = None  # of the last selection
        queue = self.defense.queue_size
        self.learner = Learner(
            recipe.model,
            recipe.train,
            self.defense,
            seed=recipe.seed,
            total_steps=self.steps * recipe.train.epochs,
            device=ray.train.torch.get_device(),
            unused=any((m := self.defense.matcher(e)) is not None and m.matched == "embedding" for e in epochs),
            queue=max(2, how_many(queue, len(self.rows))) if queue else 0,  # of one, all pairs would have the same neighbour
        )
        self.first, self.noted, self.restored = 1, 0.0, ""
        if (checkpoint := ray.train.get_checkpoint()) is not None:
            state = _load(checkpoint)
            self.first, self.restored = state["epoch"] + 1, state.get("records", "")
            if state["epoch"] > recipe.train.epochs:
                self._begin_repair()
            self.learner.load_state_dict(state)
            self.safe_share = state.get("safe_share")

    def epoch(self, epoch: int) -> list[dict[str, Any]]:
        """One epoch; the records of what happened in it (rank 0's are logged)."""
        records = []
        pairing: dict[str, Any] = {}
        repairing = epoch > self.recipe.train.epochs
        if epoch == self.recipe.train.epochs + 1:
            self._begin_repair()
        if not repairing and epoch in self.defense.rounds(epoch):
            pairing, facts = self._round(epoch)
            self.safe_share = pairing.get("share", self.safe_share)
            records.append(facts)
        robust = "index" in pairing
        started, losses = time.monotonic(), []
        for examples in self._batches(epoch, pairing):
            losses.append(self.learner.step(examples, robust=robust, epoch=epoch))
            self._note(epoch, losses, started)
        seconds = time.monotonic() - started
        loss = float(sum(float(x) for x in losses) / len(losses))
        if not np.isfinite(loss):
            raise ValueError(
                f"the loss of epoch {epoch} is {loss}: lower train.lr (now {self.recipe.train.lr:g}) or use train.precision=fp32."
            )
        record = {"kind": "train", "epoch": epoch, "steps": self.learner.steps, "loss": loss, "robust": robust}
        record |= {"lr": self.learner.optimizer.param_groups[0]["lr"], "scale": float(self.learner.model.logit_scale.detach().exp())}
        record |= {"seconds": seconds, "samples_per_s": len(losses) * self.batch / seconds} | ({"repair": True} if repairing else {})
        records.append(record)
        every, last = self.recipe.evaluate.every, epoch in (self.recipe.train.epochs, self.last)
        if self.rank == 0 and (last or (every and epoch % every == 0)):
            records.append({"kind": "eval", "epoch": epoch, **self._evaluate(last)})
        return records

    def report(self, records: list[dict[str, Any]]) -> None:
        """Records and checkpoint to the controller; all workers meet here."""
        metrics = {"records": json.dumps(records)}
        if self.rank:
            ray.train.report(metrics)
            return
        import torch

        with tempfile.TemporaryDirectory() as folder:
            state = {**self.learner.state_dict(), "epoch": records[-1]["epoch"], "records": metrics["records"]}
            state["safe_share"] = self.safe_share
            torch.save(state, Path(folder) / LEARNT)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def report_again(self) -> None:
        """The records of the checkpoint gone on from: who was killed after it was saved may not have come to write them down."""
        if self.restored:
            ray.train.report({"records": self.restored, "again": True})

    def _round(self, epoch: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The pairing for this epoch, by reference; rank 0 hands out the weights."""
        if self.rank == 0:
            self.rounds.publish.remote(epoch, self.learner.weights(), self.safe_share)
        try:
            done = ray.get(self.rounds.pairing.remote(epoch), timeout=self.timeout)
        except ray.exceptions.GetTimeoutError:
            raise RuntimeError(
                f"waited {self.timeout:g} s for the matching round of epoch {epoch}: give it more actors (cluster.match_actors) "
                "or more time (cluster.timeout_s)."
            ) from None
        return ray.get(done["pairing"][0], timeout=self.timeout), done["facts"]

    def _begin_repair(self) -> None:
        """From here on: trusted pairs only, with an optimiser and a schedule of their own."""
        from orchestrate.repair import stage

        plan = self.repair
        assert plan is not None
        self.rows = prepared.trusted_positions(self.table, plan.clean, self.recipe.seed)
        self.batch, self.steps = plan.batch, len(self.rows) // plan.batch
        self.learner.restart(plan.method, stage(self.recipe.train, plan), self.steps * plan.epochs)

    def _batches(self, epoch: int, pairing: dict[str, Any]) -> Iterator[Any]:
        """This worker's rows of each global batch, read ahead of the model."""
        window = None if self.pixels.images is not None else (WINDOW, STREAM_CHUNK)
        order = batches.drawn(self.rows, self.batch, self.recipe.seed, epoch, window, pairing.get("safe"))
        order = order[:, batches.share(self.batch, self.world, self.rank)]
        keys = batches.epoch_keys(self.keys, epoch)
        images = (self.pixels.take(rows) for rows in order) if self.pixels.images is not None else self._stream(order)
        for rows, pixels in zip(order, batches.ahead(images), strict=True):
            yield batches.examples(rows, pixels, self.captions, keys, pairing)

    def _stream(self, order: np.ndarray) -> Iterator[np.ndarray]:
        """Pixels of (steps, n) rows through Ray Data, a window of steps a task, in order."""
        data = cluster.quiet_data(in_order=True)
        step = max(1, WINDOW // self.batch)
        items = [{"rows": order[i : i + step].ravel()} for i in range(0, len(order), step)]
        recipe, ref = recipes.packed(self.recipe), self.inputs["train"][0]

        def decode(item: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            known = recipes.unpacked(recipe)
            table = ray.get(ref)
            pixels = prepared.pixels_of(known, prepared.build_attack(known, table), table, None, None)
            return {"image": pixels.take(np.asarray(item["rows"][0]))}

        found = data.from_items(items, override_num_blocks=len(items)).map_batches(
            decode,
            batch_size=None,
            batch_format="numpy",
            num_cpus=1,
            compute=data.TaskPoolStrategy(size=min(len(items), max(1, self.recipe.cluster.readers // self.world))),
        )
        for batch in found.iter_batches(batch_size=order.shape[1], prefetch_batches=1, batch_format="numpy"):
            yield batch["image"]

    def _evaluate(self, last: bool) -> dict[str, Any]:
        from orchestrate.evaluate import evaluate
        from orchestrate.hardening import hardening

        started, e = time.monotonic(), self.recipe.evaluate
        told = ray.get(self.inputs["evaluation"][0], timeout=self.timeout)
        heldout, images, _ = ray.get(self.inputs["heldout"], timeout=self.timeout)
        metrics = evaluate(
            self.learner.model,
            self.learner.cfg,
            heldout=heldout,
            classes=told["classes"],
            templates=told["templates"],
            probes=Probes(**told["probes"]),
            load=prepared.loader(self.recipe, self.attack, images, told["where"]),
            probe_train=prepared.probe_rows(told["clean"], e.probe_size, self.recipe.seed) if e.probe and last else None,
            train=told["clean"],
            batch=e.batch,
            precision=e.precision,
            seed=self.recipe.seed,
            hardening=hardening(self.defense.hardener(), self.table, e.probe_size, self.recipe.seed) if e.probe and last else None,
        )
        return {**metrics, "seconds": time.monotonic() - started}

    def _note(self, epoch: int, losses: list[Any], started: float) -> None:
        now = time.monotonic()
        if self.rank == 0 and now - self.noted > NOTE_S:
            self.noted = now
            rate = len(losses) * self.batch / (now - started)
            text = f"epoch {epoch}/{self.last}, loss {float(losses[-1]):.3f}, {rate:,.0f} pairs/s"
            self.rounds.report.remote({"step": self.learner.steps, "steps": self.learner.total_steps, "text": text})


def _load(checkpoint: Any) -> dict[str, Any]:
    import torch

    with checkpoint.as_directory() as folder:
        return torch.load(Path(folder) / LEARNT, map_location="cpu", weights_only=True)
