"""The one door to Ray: `ray.init`, what the job ships, and whether a recipe fits before anything starts."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrate import ROOT, capacity
from orchestrate.progress import Phase
from orchestrate.recipe import Cluster

if TYPE_CHECKING:
    from orchestrate.storage import Store

ATTEMPTS = 5  # more of an item whose actor or node died; what kills its actor each time does so for a reason
AGAIN = f"died again and again of the same item ({ATTEMPTS + 1} times or more), as where the system kills what takes too much memory"
PATIENCE_S = 30.0  # for all actors of a pool, before fewer do
# Processes that a small machine may start at once; where more than three times as many live, Ray warns on the terminal. A sweep's trials
# of a fraction of a core have half a dozen each.
STARTING, STARTING_SWEEP = 4, 16
PRESTART = "RAY_prestart_worker_first_driver"  # processes that Ray starts without the job's packages: none of ours can run in them
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")  # `ray up` leaves the configuration here, on the head
KUBERNETES = "KUBERNETES_SERVICE_HOST"
DEAD = "dead"  # the error of an `Answer` whose node has left
FREED_S = 30.0  # in which a cluster clears up after a driver that was killed
EXCLUDE = ["/.git", "/.venv", "/runs", "/tests", "/docs", "/benchmarks", "/deploy", "**/__pycache__", "*.parquet", "*.png", "*.tar"]
# Read by the driver and the train controller when ray.train is imported: a report is seen within 0.3 s instead of 2 s.
# The preemption watcher only tells the training function, which has no use for it: a process less for each run.
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray where this process is a submitted job

# Read by Tune in a sweep's driver: no files of its own beside ours, Ctrl-C is ours, a trial stays in the directory it is sent to.
TUNE = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def runtime_env() -> dict[str, Any]:
    """What every job ships: our four rooms, first on the path, so that no other `models` can be meant."""
    if IN_JOB in os.environ:  # `antidote submit` has shipped them with the job, and Ray refuses to be told twice
        return {}
    env: dict[str, Any] = {"env_vars": dict(ENVIRONMENT)}
    if (ROOT / "pyproject.toml").is_file():
        return {**env, "working_dir": str(ROOT), "excludes": EXCLUDE}
    return {**env, "py_modules": [str(ROOT / room) for room in ("orchestrate", "models", "attacks", "defenses")]}


@contextlib.contextmanager
def connected(cluster: Cluster, dashboard: bool = False) -> Iterator[dict[str, float]]:
    """A Ray session for the length of the block; yields the cluster's resources. An existing session is used and left.

    A sweep needs the `dashboard`: Ray Train asks it which placement groups have lost their owner, and frees a stopped trial's.
    """
    os.environ.update(ENVIRONMENT)
    logging.getLogger("ray").setLevel(logging.ERROR)
    import ray

    mine = not ray.is_initialized()
    if mine:
        starting = max(STARTING_SWEEP if dashboard else STARTING, os.cpu_count() or 1)
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(starting))
        os.environ.setdefault(PRESTART, "0")
        try:
            ray.init(
                address=cluster.address or "local",
                namespace="antidote",
                runtime_env=runtime_env(),
                include_dashboard=dashboard if not cluster.address else None,
                log_to_driver=bool(os.environ.get("ANTIDOTE_RAY_LOGS")),
                logging_level=logging.ERROR,
            )
        except Exception as error:  # Ray raises a bare Exception where a busy machine does not start its processes in time
            where = cluster.address or "this machine"
            mend = "Check cluster.address, or leave it empty." if cluster.address else "Try again when the machine is less busy."
            raise ValueError(f"no Ray session on {where}: {_first_line(error)} {mend}") from error
    try:
        with _interruptible() if mine else contextlib.nullcontext():
            yield ray.cluster_resources()
    finally:
        if mine:
            ray.shutdown()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, with KeyboardInterrupt: what is open is closed, MLflow is told, one line says how to go on.

    To be entered after `ray.init`, whose library in C++ answers the signal with a stack and an abort instead. Not SystemExit, as Ray's own
    Python handler: raised while Ray waits, it may come back as an error of Ray's; an interrupt stays one.
    """
    if threading.current_thread() is not threading.main_thread():  # only there Python sets handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


@contextlib.contextmanager
def native_stderr(file: Path) -> Iterator[None]:
    """What libraries in C++ write to the terminal goes to `file` for the length of the block; what Python writes there stays.

    Where a driver makes actors that may start again, Ray's own library warns of it, at a level that only silence for all of Ray turns off.
    """
    terminal, shown = os.dup(2), sys.stderr
    with file.open("ab") as target, os.fdopen(terminal, "w", buffering=1, encoding="utf-8", errors="replace") as python:
        os.dup2(target.fileno(), 2)
        if shown is sys.__stderr__:
            sys.stderr = python
        try:
            yield
        finally:
            sys.stderr = shown
            os.dup2(terminal, 2)


def put(value: Any) -> Any:
    """A reference to `value`, which lives in the session's object store as long as this process holds the reference."""
    import ray

    return ray.put(value)


def get(ref: Any, timeout: float | None = None) -> Any:
    """What a reference stands for; arrays are read in place. Raises Ray's GetTimeoutError after `timeout` seconds."""
    import ray

    return ray.get(ref, timeout=timeout)


def jobs_client(address: str) -> Any:
    """Ray's client of the job server that a cluster's dashboard is; over HTTP, from outside the cluster. Asked once: PermissionError where
    the token is refused."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in ("ray", "ray.dashboard.modules.job.sdk"):  # the second sets a level of its own
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        client = JobSubmissionClient(address)
        client.list_jobs()
    except AuthenticationError as error:
        raise PermissionError(str(error)) from error
    return client


class Desk:
    """Hands out references: an actor that is started again asks for them anew, as its own arguments may be gone by then."""

    def __init__(self, refs: dict[str, Any]) -> None:
        self.held = refs

    def refs(self) -> dict[str, Any]:
        return self.held


def desk(refs: dict[str, Any]) -> Any:
    """A `Desk` in a process of its own; `desk.refs.remote()` asks it."""
    import ray

    return ray.remote(Desk).options(num_cpus=0).remote(refs)


def parallel(
    call: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], at_once: int, look: Callable[[], None]
) -> Iterator[tuple[int, Any]]:
    """`call(*arguments[i])`, each in a process of its own on this node that holds no CPU: (i, result) as they end; `look` once a second.

    What the calls start themselves must fit beside one another: see `slots`. An interrupt ends all of them.
    """
    import ray

    remote = ray.remote(call).options(num_cpus=0, max_retries=0, scheduling_strategy=on_node(node_id()))
    waiting, running = list(enumerate(arguments)), dict[Any, int]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                i, words = waiting.pop(0)
                running[remote.remote(*words)] = i
            ended, _ = ray.wait(list(running), timeout=1)
            look()
            for ref in ended:
                yield running.pop(ref), ray.get(ref)
    finally:
        for ref in running:
            ray.cancel(ref, force=True)


@contextlib.contextmanager
def reserved(bundle: Mapping[str, float], most: int, timeout_s: float) -> Iterator[Any]:
    """A placement group of up to `most` bundles for the length of the block: all of them where they find their places within `PATIENCE_S`,
    else half as many, and so on; None for an empty bundle. TimeoutError where not even one finds a place within `timeout_s`."""
    if not bundle:
        yield None
        return
    from ray.util.placement_group import placement_group, remove_placement_group

    count = most
    while not (group := placement_group([dict(bundle)] * count, strategy="SPREAD" if most > 1 else "PACK")).wait(
        timeout_s if count == 1 else PATIENCE_S
    ):
        remove_placement_group(group)
        if count == 1:
            wanted = " + ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())
            raise TimeoutError(f"waited {timeout_s:g} s (cluster.timeout_s) for a node with {wanted} free.")
        count //= 2
    try:
        yield group
    finally:
        remove_placement_group(group)


def quiet_data(*, in_order: bool = False, group: Any = None) -> Any:
    """ray.data, told to leave the terminal to us. `in_order`: results come in the order of their inputs. `group`: where its actors lie.

    Without a placement group Ray 2.60 gives each execution of a cluster the *whole* CPUs of a node that nobody has reserved, divided by
    the number of executions, rounded down (`_AutoscalingCoordinatorActor`): with fractions of CPUs, or two executions on a small node,
    that is none, and an execution without CPUs waits for ever while its own share is free.
    """
    import ray.data
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    context, fresh = ray.data.DataContext.get_current(), ray.data.DataContext()
    with warnings.catch_warnings():  # to be removed in 2027, in a later Ray than ours
        warnings.simplefilter("ignore", DeprecationWarning)
        where = PlacementGroupSchedulingStrategy(group) if group is not None else None  # a group of an earlier execution is gone
        context.scheduling_strategy = where or fresh.scheduling_strategy
        context.scheduling_strategy_large_args = where or fresh.scheduling_strategy_large_args
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = in_order
    for name in ("ray.data", "ray.data._internal.execution", "ray.data._internal.progress"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return ray.data


def through_actors(items: Sequence[Mapping[str, Any]], actor: type, arguments: tuple[Any, ...], c: Cluster) -> Iterator[dict[str, Any]]:
    """Work items through a pool of up to `c.match_actors` `actor(*arguments)`, each called with one item as a batch of one row: their
    answers, a row each as {name: value}, in the items' order, as they come. An actor that dies is started again, and its item done again,
    up to `ATTEMPTS` times more; then Ray's error is raised (`died`). TimeoutError where no actor finds its place within `c.timeout_s`.

    From blocks that are there: tasks that made the items would hand them on in the order they end in, and wait for CPUs of their own.
    `from_items` makes its blocks here; `from_arrow` asks tasks of a whole CPU each for their sizes, which training may leave to nobody.
    """
    most = min(c.match_actors, len(items))
    with reserved(capacity.bundle(c.match_cpus, c.match_gpus), most, c.timeout_s) as group:
        data = quiet_data(in_order=True, group=group)
        found = data.from_items(list(items), override_num_blocks=len(items)).map_batches(
            actor,
            fn_constructor_args=arguments,
            batch_size=None,
            batch_format="numpy",
            # One item at a time: of two that an actor holds when it dies, its successor may be given the later one first, and if that
            # waits for what the earlier one makes, both wait for each other.
            compute=data.ActorPoolStrategy(size=group.bundle_count if group else most, max_tasks_in_flight_per_actor=1),
            num_cpus=c.match_cpus,
            num_gpus=c.match_gpus or None,
            max_restarts=-1,
            max_task_retries=ATTEMPTS,
            # True, Ray Data's default, may run an item before an earlier one: on the one actor that should make what it waits for, both
            # wait for ever.
            allow_out_of_order_execution=False,
        )
        for batch in found.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"):
            for row in range(len(next(iter(batch.values())))):
                yield {name: column[row] for name, column in batch.items()}


def lost(error: BaseException) -> bool:
    """Whether an actor's node went, or what lay on it: the fault is not the item's."""
    from ray import exceptions

    gone = (exceptions.ActorUnavailableError, exceptions.NodeDiedError, exceptions.ObjectLostError)
    return any(isinstance(layer, gone) for layer in layers(error))


def died(error: BaseException) -> bool:
    """Whether an item's actor died of every attempt, or its node."""
    from ray.exceptions import ActorDiedError

    return lost(error) or any(isinstance(layer, ActorDiedError) for layer in layers(error))


def check_storage(store: Store, c: Cluster) -> None:
    """ValueError, before anything is read, where a node that may train does not see the storage: rank 0 may come to lie on any of them."""
    import ray

    here = node_id()
    trains = lambda n: n["NodeID"] != here and n["Resources"].get("CPU", 0) >= c.cpus and n["Resources"].get("GPU", 0) >= c.gpus
    if not any(node["Alive"] and trains(node) for node in ray.nodes()):
        return
    mark = f"{store.home}/.seen-{os.urandom(4).hex()}"
    with store.filesystem.open_output_stream(mark) as file:
        file.write(b"x")
    seen = lambda: {"seen": store.filesystem.get_file_info(mark).size == 1}
    try:
        answers = [answer for answer in on_every_node(seen, lambda _: (), c.timeout_s, trains) if answer.error != DEAD]
    finally:
        store.filesystem.delete_file(mark)
    for answer in answers:
        if answer.error:
            raise ValueError(f"{answer.host} could not say whether it reaches {store.root}: {answer.error}")
    blind = {answer.host for answer in answers if not answer.facts["seen"]}
    if blind:
        raise ValueError(
            f"{store.root} is not the same folder on {', '.join(sorted(blind)[:5])}: give cluster.storage= a folder or an address "
            "(s3://bucket/path) that all nodes reach. Checkpoints go there."
        )


def when_free(name: str, make: Callable[[], Any]) -> Any:
    """A named actor, once a driver that was killed has let go of the name. ValueError where another one lives and keeps it."""
    until = time.monotonic() + FREED_S
    while True:
        try:
            return make()
        except ValueError as error:
            if "already taken" not in str(error):
                raise
            if time.monotonic() > until:
                raise ValueError(
                    f"another process is running this recipe on this cluster (actor {name}): wait for it, or stop it."
                ) from None
            time.sleep(0.5)


def cause(error: BaseException) -> str:
    """The worker's own words, without the layers above."""
    causes = getattr(error, "worker_failures", None) or {}
    inner: BaseException = next(iter(causes.values()), getattr(error, "controller_failure", error))
    inner = innermost(inner)
    return f"training stopped: {type(inner).__name__}: {str(inner).strip()[-2000:]}"


def layers(error: BaseException) -> list[BaseException]:
    """An error and those that Ray has wrapped in it, outermost first."""
    found = [error]
    while (below := getattr(found[-1], "cause", None) or found[-1].__cause__) is not None and below not in found:
        found.append(below)
    return found


def innermost(error: BaseException) -> BaseException:
    """The error that Ray's layers stand around."""
    return layers(error)[-1]


def _first_line(error: BaseException) -> str:
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return line.rstrip(".") + "."


def ceiling() -> dict[str, float] | None:
    """What the session's cluster can grow to; None where it does not scale by itself, or not that we know of.

    Ray 2.60 keeps no record of it for drivers. What `ray up` started can be read on its head, where jobs run (`BOOTSTRAP`); a cluster on
    Kubernetes may grow, nobody here knows how far.
    """
    if BOOTSTRAP.expanduser().is_file():
        import yaml

        return capacity.ceiling(yaml.safe_load(BOOTSTRAP.expanduser().read_text()))
    return dict.fromkeys(("CPU", "GPU"), math.inf) if KUBERNETES in os.environ else None


def room(c: Cluster, matching: bool, streaming: bool, has: dict[str, float]) -> dict[str, float]:
    """What the session has, once a plan (`prepared.needs`) fits it: a cluster that scales grows first. ValueError where it does not fit."""
    has = _grown(c, matching, streaming, has)
    capacity.preflight(c, matching, streaming, has)
    return has


def _grown(c: Cluster, matching: bool, streaming: bool, has: dict[str, float]) -> dict[str, float]:
    """What the session has once a cluster that scales has grown to the plan; at once where the plan has its place, or nothing scales.

    ValueError where the cluster may never become so large, or has not within `cluster.timeout_s`. The request is taken back when the nodes
    are there, so that a driver that dies leaves no machines running: the work itself keeps them.
    """
    most = ceiling() if c.address else None
    if most is None or capacity.placeable(c, matching, streaming, node_resources()):
        return has
    import ray
    from ray.autoscaler.sdk import request_resources

    capacity.preflight(c, matching, streaming, {kind: max(most[kind], has.get(kind, 0.0)) for kind in most}, "may grow to")
    request_resources(bundles=[capacity.bundle(*piece) for piece in capacity.pieces(c, matching, streaming)])
    until, nodes = time.monotonic() + c.timeout_s, len(node_resources())
    try:
        with Phase("nodes", unit="node") as phase:
            while not capacity.placeable(c, matching, streaming, now := node_resources()):
                if time.monotonic() > until:
                    raise ValueError(
                        f"waited {c.timeout_s:g} s for the cluster to grow to {capacity.plan(c, matching, streaming)}: `ray status` on the "
                        "head says why no node starts. Give it more time with cluster.timeout_s, or ask for less."
                    )
                time.sleep(1)
            phase.at(len(now), f"{len(now) - nodes} started")
    finally:
        request_resources(bundles=[])
    return dict(ray.cluster_resources())


def node_id() -> str:
    """The node that this process is on."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def on_node(node: str) -> Any:
    """The scheduling strategy of what must lie on that node."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def node_resources() -> list[dict[str, float]]:
    """What each living node of the session has."""
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def on_every_node(
    call: Callable[..., dict[str, Any]],
    args: Callable[[Mapping[str, Any]], tuple[Any, ...]],
    timeout_s: float,
    which: Callable[[Mapping[str, Any]], bool] = lambda node: True,
) -> list[Answer]:
    """`call(*args(node))` on each such node of the session, at once, without asking for a CPU. A node that is silent, or fails, says so."""
    import ray

    nodes = [node for node in ray.nodes() if which(node)]
    refs = {}
    for node in nodes:
        if node["Alive"]:
            there = ray.remote(call).options(num_cpus=0, max_retries=0, scheduling_strategy=on_node(node["NodeID"]))
            refs[node["NodeID"]] = there.remote(*args(node))
    ready, _ = ray.wait(list(refs.values()), num_returns=len(refs), timeout=timeout_s)
    answers = []
    for node in nodes:
        ref, facts, error = refs.get(node["NodeID"]), {}, ""
        if ref is None:
            error = DEAD
        elif ref not in ready:
            error = f"no answer within {timeout_s:g} s"
        else:
            try:
                facts = ray.get(ref)
            except ray.exceptions.RayError as failure:
                left = not any(other["Alive"] and other["NodeID"] == node["NodeID"] for other in ray.nodes())
                error = DEAD if left else str(failure).strip().splitlines()[-1][:300]
        answers.append(Answer(node["NodeManagerHostname"], node["NodeManagerAddress"], dict(node["Resources"]), facts, error))
    return answers


@dataclass(frozen=True)
class Answer:
    """A node and what it said: `facts`, or the `error` that kept it from answering (`DEAD`: it has left)."""

    host: str
    address: str
    resources: Mapping[str, float]
    facts: Mapping[str, Any]
    error: str = ""


def shipped_bytes() -> int:
    """Bytes of the package that Ray makes of the working directory, packed by Ray itself with our exclude list."""
    from ray._private.runtime_env.packaging import create_package

    env = runtime_env()
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        for i, source in enumerate([env["working_dir"]] if "working_dir" in env else env.get("py_modules", [])):
            target = Path(folder) / f"{i}.zip"
            create_package(source, target, include_gitignore=True, include_parent_dir=False, excludes=env.get("excludes", []))
            total += target.stat().st_size
    return total


def absolute(path: str) -> Path:
    """Workers run in folders of their own, so every path they are told is absolute."""
    return Path(os.path.abspath(os.path.expanduser(path)))
