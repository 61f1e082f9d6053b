"""A sweep on Ray Tune: every trial is a function that calls `fit`, which starts Ray Train inside the sweep's own session.

    driver    axes → trials → Tune; decodes each data set once and lends it; writes trials.jsonl, MLflow's parent run and the log
    trial × n a Tune actor that holds no CPU: fit(recipe) → Rounds, TrainController, workers, matching actors, as `antidote run` does

What a trial needs is taken by its own workers and actors, so Tune is told nothing of CPUs (a trial that held the CPU its worker waits
for would wait for ever). Instead only so many trials run at once as the nodes can hold completely, counted by `capacity.slots`.

Nothing is restored from Tune. A finished run is known by its result.json and a begun one by its checkpoint, so after kill -9 the same
sweep skips the first and `fit` goes on with the second. Only Optuna's memory is kept beside (search.Asked).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrate import axes, capacity, cluster, journal, mlflow_uri, prepared, reading, rundir, search, sweepdir, train
from orchestrate import recipe as recipes
from orchestrate.axes import Space, Trial
from orchestrate.board import Board
from orchestrate.recipe import Recipe
from orchestrate.sweepdir import DONE, FAILED, RUNNING, SKIPPED, STOPPED, Asking, Event
from orchestrate.track import Tracker

os.environ.update(cluster.TUNE)
import ray
from ray import tune
from ray.tune.search import Searcher

RETRIES = 2  # of a trial whose process or node died; what `fit` refuses is not tried again
LOCKED_S = 60  # a killed driver's trial may hold its directory for some seconds more
POLL_S = 0.5  # between two looks at metrics.jsonl for ASHA
MOST_LENT = 0.5  # share of the object store that decoded sets may fill; the trials read further ones themselves


def run_sweep(asking: Asking, space: Space, *, fresh: bool = True) -> Path:
    """Run every trial that is not finished; the sweep's directory. ValueError for what the user can mend.

    `fresh=False` wants a sweep that was begun before. Called again after any kind of death, it goes on.
    """
    options = asking.options
    trials = search.listed(space, options)
    parts = [t.recipe.identity for t in trials] or search.drawn_from(space, options)
    first = trials[0].recipe if trials else axes.sample(space, 1)[0].recipe
    identity = axes.identity(parts)
    folder = cluster.absolute(first.cluster.runs) / f"{asking.name}-sweep-{identity[:8]}"
    if not fresh and not sweepdir.is_sweep(folder):
        raise ValueError(f"there is no sweep to go on with: {folder} was never begun. Leave --resume out to begin it.")
    if options.asha and first.evaluate.every < 1:
        raise ValueError("--asha looks at trials while they train: say how often they are scored, such as evaluate.every=2.")
    with sweepdir.claimed(folder):
        sweepdir.begin(folder, asking, identity, trials)
        _Sweep(asking, space, trials, first, folder).run()
    return folder


class _Sweep:
    """The driver's side: what to run next, what came of it, and who is told."""

    def __init__(self, asking: Asking, space: Space, trials: Sequence[Trial], first: Recipe, folder: Path) -> None:
        self.asking, self.options, self.folder, self.first = asking, asking.options, folder, first
        self.space, self.trials = space, trials
        self.open: dict[str, Trial] = {}  # identity → a trial that Tune has
        self.past = sweepdir.events(folder)  # what an earlier driver of this sweep left
        self.uri = mlflow_uri.resolve(first.track.uri, folder.parent)
        self.experiment = first.track.experiment or asking.name
        self.board = Board(asking.name, len(trials), 1, self.options.maximize, self.options.minimize)

    def run(self) -> None:
        parameters = rundir.parameters(self.first) | {axis.path: str(axis).partition("=")[2] for axis in self.space.axes}
        parameters |= {f"sweep.{k}": v for k, v in self.asking.as_dict()["options"].items()}
        tags = {"mlflow.runName": self.folder.name, "antidote.sweep": self.folder.name, "antidote.kind": "sweep"}
        self.tracker = Tracker.start(self.folder, self.uri, self.experiment, parameters, tags)
        status = "failed"
        try:
            self._run()
            status = sweepdir.verdict(self.board.ended.values())
            self.board.total = len(self.board.ended)  # a search may end before it has drawn all samples
        except KeyboardInterrupt:
            status = "killed"
            raise
        finally:
            self.board.summary()
            self._page()
            names = (sweepdir.SWEEP, sweepdir.TRIALS, "report.html")
            self.tracker.finish(status, [self.folder / name for name in names if (self.folder / name).exists()])

    def _page(self) -> None:
        """report.html of what there is. A picture that cannot be drawn must not turn a finished sweep into a failed one."""
        from orchestrate import compare, compare_page

        try:
            if sweepdir.runs(self.folder):
                compare_page.write([self.folder], self.folder / "report.html", compare.load([self.folder]))
        except Exception as error:
            self.board.say(
                f"report.html could not be written ({type(error).__name__}: {error}); `antidote compare {self.folder}` tries again"
            )

    def _run(self) -> None:
        source, waiting = self._source()
        if not waiting:
            return
        self.board.say(f"sweep {self.asking.name}: {source.total} to run by {self.options.search}, in {self.folder}")
        with cluster.connected(self.first.cluster, dashboard=True):
            self.board.slots = self._slots(waiting)
            shared = _Shared([t.recipe for t in waiting])
            spec = {
                "cwd": os.getcwd(),
                "sets": shared.sets,
                "plans": shared.plans,
                "tags": {"mlflow.parentRunId": self.tracker.run_id, "antidote.sweep": self.folder.name} if self.tracker.run_id else {},
                "early": self.options.asha,
            }
            self._tune(source, spec)
        for event in sweepdir.events(self.folder).values():
            if event.state == STOPPED:
                Tracker.load(self.folder.parent / event.run, self.uri).finish("killed")

    def _source(self) -> tuple[search.Search, list[Trial]]:
        """Where trials come from, and (some of) those that are to run; the finished ones are noted at once."""
        if self.options.search == "optuna":
            asked = search.Asked(self.space, self.options, self.folder, self.known)
            self.board.total = asked.total
            return asked, axes.sample(self.space, 5)
        waiting = [trial for trial in self.trials if self.known(trial) is None and not self._given_up(trial)]
        return search.Listed(waiting), waiting

    def known(self, trial: Trial) -> Mapping[str, Any] | None:
        """The result of a finished trial, noted as skipped."""
        result = rundir.finished(trial.recipe)
        if result is not None and trial.recipe.identity not in self.board.ended:
            rundir.complete(trial.recipe, Path(str(result["run"])))  # a kill may have come between its result and the end of its MLflow run
            self.ended(trial, SKIPPED, result)
        return result

    def _given_up(self, trial: Trial) -> bool:
        """ASHA has stopped the trial before a kill: it stays stopped."""
        before = self.past.get(trial.recipe.identity)
        if not self.options.asha or before is None or before.state != STOPPED:
            return False
        self.board.end(before, None)
        return True

    def _slots(self, waiting: Sequence[Trial]) -> int:
        """Trials at once, printed with the reason."""
        has = ray.cluster_resources()
        plans = {prepared.needs(trial.recipe) for trial in waiting}
        for plan in plans:
            has = cluster.room(*plan, has)
        nodes = cluster.node_resources()
        counted = {plan: capacity.slots(*plan, nodes) for plan in plans}
        plan = min(counted, key=lambda plan: counted[plan])
        fit, limit = counted[plan], self.options.concurrent
        at_once = min(fit, limit) if limit else fit
        why = f"--concurrent {limit}" if at_once < fit else f"{len(nodes)} node{'s' * (len(nodes) > 1)}, {has.get('CPU', 0):g} CPU"
        self.threads = max(1, int(has.get("CPU", 1) / (at_once * plan[0].workers)))
        self.board.say(f"{at_once} trial{'s' * (at_once > 1)} at once ({why}); each takes {capacity.plan(*plan)}")
        return at_once

    def _tune(self, source: search.Search, spec: dict[str, Any]) -> None:
        store = self.folder / "tune"
        shutil.rmtree(store, ignore_errors=True)
        config = tune.TuneConfig(
            search_alg=_Source(self, source),
            num_samples=-1,
            max_concurrent_trials=self.board.slots,
            scheduler=self._scheduler(),
            reuse_actors=not self.options.asha,  # an actor whose trial was stopped in the middle cannot be used again
            trial_name_creator=lambda trial: str(trial.config["identity"]),
            trial_dirname_creator=lambda trial: str(trial.config["identity"]),
        )
        trainable = tune.with_resources(
            tune.with_parameters(run_trial, spec=spec),
            tune.PlacementGroupFactory([{_here(): 0.0001}]),  # where the sweep was started: one machine writes MLflow's file and the locks
        )
        run_config = tune.RunConfig(
            name="tune",
            storage_path=str(self.folder),
            verbose=0,
            callbacks=[_Ledger(self)],
            failure_config=tune.FailureConfig(max_failures=RETRIES),
        )
        tune.Tuner(trainable, tune_config=config, run_config=run_config).fit()
        shutil.rmtree(store, ignore_errors=True)

    def _scheduler(self) -> Any:
        if not self.options.asha:
            return tune.schedulers.FIFOScheduler()
        epochs, every = self.first.train.epochs, self.first.evaluate.every
        grace = max(every, -(-epochs // (4 * every)) * every)  # a quarter of the epochs, at an evaluation
        return tune.schedulers.ASHAScheduler(
            time_attr="epoch", metric="early", mode="max", max_t=epochs + 1, grace_period=grace, reduction_factor=2
        )

    def config(self, trial: Trial) -> dict[str, str]:
        """What Tune carries to the trial's process: plain text."""
        c, t = trial.recipe.cluster, trial.recipe.track
        recipe = replace(
            trial.recipe,
            cluster=replace(c, runs=str(self.folder.parent), threads=c.threads or self.threads),
            track=replace(t, uri=self.uri, experiment=self.experiment),
        )
        return {"identity": recipe.identity, "recipe": json.dumps(recipes.packed(recipe))}

    def began(self, identity: str) -> None:
        trial = self.open[identity]
        if identity not in self.board.running:
            sweepdir.note(self.folder, Event(identity, RUNNING, trial.recipe.directory, dict(trial.changed)))
        self.board.begin(identity)

    def ended(self, trial: Trial, state: str, result: Mapping[str, Any] | None, reason: str = "") -> None:
        """Written down, logged, shown."""
        identity = trial.recipe.identity
        run = Path(str(result["run"])).name if result else trial.recipe.directory
        now = time.monotonic()
        seconds = now - self.board.running.get(identity, now)
        event = Event(identity, state, run, dict(trial.changed), reason, round(seconds, 2))
        before = self.past.get(identity)
        if state != SKIPPED or before is None or before.state not in sweepdir.FINISHED:  # `done` by this sweep stays `done`
            sweepdir.note(self.folder, event)
        self.board.end(event, result)
        if state != SKIPPED:
            told = {k: sum(e.state == k for e in self.board.ended.values()) for k in (DONE, SKIPPED, FAILED, STOPPED)}
            best = {"best": self.board.best[0]} if self.board.best else {}
            self.tracker.log({"kind": "sweep", **told, **best, "seconds": event.seconds}, step=len(self.board.ended))


class _Source(Searcher):
    """Tune's view of a search."""

    def __init__(self, sweep: _Sweep, source: search.Search) -> None:
        super().__init__(metric="early", mode="max")
        self.sweep, self.source = sweep, source
        self.given: dict[str, Trial] = {}

    def set_search_properties(self, metric: Any, mode: Any, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        trial = self.source.next()
        if trial is None:
            return Searcher.FINISHED
        self.given[trial_id] = self.sweep.open[trial.recipe.identity] = trial
        return self.sweep.config(trial)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self.given.pop(trial_id)
        said = result or {}
        self.source.told(trial, json.loads(said["result"]) if said.get("state") == DONE else None)

    def save(self, checkpoint_path: str) -> None:
        """Nothing of Tune's is restored."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep goes on by itself: call run_sweep again")


class _Ledger(tune.Callback):
    """What Tune does, told to the sweep."""

    def __init__(self, sweep: _Sweep) -> None:
        self.sweep = sweep

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.sweep.board.tick()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.sweep.began(trial.config["identity"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        said, mine = trial.last_result, self.sweep.open[trial.config["identity"]]
        state = said.get("state", STOPPED)
        result = json.loads(said["result"]) if state == DONE else None
        reason = f"stopped by ASHA after epoch {said.get('epoch')}" if state == STOPPED else said.get("reason", "")
        self.sweep.ended(mine, state, result, reason)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = trial.get_error()
        text = str(error).strip().splitlines() or [f"its process died {RETRIES + 1} times"]
        self.sweep.ended(self.sweep.open[trial.config["identity"]], FAILED, None, text[-1])


# --- a trial's process -----------------------------------------------------------------------------------------------------------


def run_trial(config: dict[str, str], spec: dict[str, Any]) -> None:
    """One run, from whatever is there to its result. What `fit` refuses is an outcome; anything else Tune tries again."""
    os.chdir(spec["cwd"])  # a recipe's relative paths mean the user's directory
    recipe = recipes.unpacked(json.loads(config["recipe"]))
    reading.lend(spec["sets"], spec["plans"])
    end = {"epoch": recipe.train.epochs}
    try:
        with _early(recipe, spec["early"]):
            result = _unlocked(recipe, spec["tags"])
    except (ValueError, RuntimeError, OSError) as error:
        if isinstance(error, ray.exceptions.RayError):
            raise
        tune.report({**end, "state": FAILED, "reason": str(error)[-1000:]})
        return
    last = {"early": float(result[spec["early"]])} if spec["early"] in result else {}
    tune.report({**end, **last, "state": DONE, "result": json.dumps(result)})


def _unlocked(recipe: Recipe, tags: Mapping[str, str]) -> dict[str, Any]:
    """`fit`, once whoever was killed has let go of the run's directory and of its name."""
    until = time.monotonic() + LOCKED_S
    while True:
        try:
            return train.fit(recipe, tags=tags)
        except ValueError as error:
            if time.monotonic() > until or not any(sign in str(error) for sign in ("another process is running", "already taken")):
                raise
            time.sleep(1)


@contextlib.contextmanager
def _early(recipe: Recipe, metric: str) -> Iterator[None]:
    """While the block runs, a thread reports each evaluation to ASHA: the best so far of the metric.

    The best, and not the last: right after a robust epoch accuracy can dip for an epoch, which says nothing about the end.
    """
    if not metric:
        yield
        return
    stop = threading.Event()
    file = cluster.absolute(recipe.cluster.runs) / recipe.directory / journal.NAME

    def watch() -> None:
        best, seen = -math.inf, 0
        while not stop.wait(POLL_S):
            for record in journal.read(file):
                if record.get("kind") == "eval" and seen < record["epoch"] < recipe.train.epochs and metric in record:
                    best, seen = max(best, float(record[metric])), record["epoch"]
                    tune.report({"epoch": seen, "early": best})

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)


# --- what fits ---------------------------------------------------------------------------------------------------------------------


class _Shared:
    """Work that several trials share, done once by the driver and held by it to the sweep's end: decoded data sets, poisoned indices.

    Best effort: what cannot be prepared here (no room, unreadable) the trials prepare, or fail by, themselves.
    """

    def __init__(self, waiting: Sequence[Recipe]) -> None:
        self.sets: dict[Any, Any] = {}
        self.plans: dict[str, Any] = {}
        self.room = MOST_LENT * ray.cluster_resources().get("object_store_memory", 0.0) / max(1, len(ray.nodes()))
        by_data: dict[str, list[Recipe]] = {}
        for recipe in waiting:
            by_data.setdefault(json.dumps([recipe.as_dict()["data"], prepared.stored_side(recipe)]), []).append(recipe)
        for recipes_of in by_data.values():
            with contextlib.suppress(ValueError, OSError):
                self._prepare(recipes_of)

    def _prepare(self, alike: Sequence[Recipe]) -> None:
        """Recipes on one data set: its pixels, and each plan that more than one of them needs."""
        if self.room <= 0:
            return
        sets, dataset = reading.prepare(alike[0])
        for name, held in sets.items():
            if name not in self.sets:
                self.room -= ray.get(held[1][0]).nbytes
                self.sets[name] = held
        users: dict[str, list[Recipe]] = {}
        for recipe in alike:
            users.setdefault(prepared.plan_key(recipe, dataset), []).append(recipe)
        for key, some in users.items():
            if len(some) > 1 and self.room > 0:
                ready = prepared.plan(some[0], dataset)
                self.room -= ready.table.nbytes
                self.plans[key] = ray.put((ready.table, ready.manifest, ready.probes))


def _here() -> str:
    """The resource that only this node has: Ray gives every node one of its address."""
    me = cluster.node_id()
    [mine] = [node["Resources"] for node in ray.nodes() if node["NodeID"] == me]
    return next(name for name in mine if name.startswith("node:") and "__" not in name)
