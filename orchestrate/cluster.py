"""The one door to Ray: `ray.init`, what the job ships, and whether a recipe fits before anything starts."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrate import ROOT
from orchestrate.recipe import Cluster

EXCLUDE = ["/.git", "/.venv", "/runs", "/tests", "/docs", "/benchmarks", "/deploy", "**/__pycache__", "*.parquet", "*.png", "*.tar"]
# Read by the driver and the train controller when ray.train is imported: a report is seen within 0.3 s instead of 2 s.
ENVIRONMENT = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3", "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}

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
        try:
            ray.init(
                address=cluster.address or "local",
                namespace="antidote",
                runtime_env=runtime_env(),
                include_dashboard=dashboard if not cluster.address else None,
                log_to_driver=bool(os.environ.get("ANTIDOTE_RAY_LOGS")),
                logging_level=logging.ERROR,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            where = cluster.address or "this machine"
            raise ValueError(f"no Ray session on {where}: {_first_line(error)} Check cluster.address, or leave it empty.") from error
    try:
        yield ray.cluster_resources()
    finally:
        if mine:
            ray.shutdown()


def put(value: Any) -> Any:
    """A reference to `value`, which lives in the session's object store as long as this process holds the reference."""
    import ray

    return ray.put(value)


def get(ref: Any, timeout: float | None = None) -> Any:
    """What a reference stands for; arrays are read in place. Raises Ray's GetTimeoutError after `timeout` seconds."""
    import ray

    return ray.get(ref, timeout=timeout)


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


def nodes() -> list[dict[str, float]]:
    """The resources of each living node of the session."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def parallel(
    call: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], at_once: int, look: Callable[[], None]
) -> Iterator[tuple[int, Any]]:
    """`call(*arguments[i])`, each in a process of its own on this node that holds no CPU: (i, result) as they end; `look` once a second.

    What the calls start themselves must fit beside one another: see `slots`. An interrupt ends all of them.
    """
    import ray

    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(call).options(num_cpus=0, max_retries=0, scheduling_strategy=here)
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


def quiet_data(*, in_order: bool = False) -> Any:
    """ray.data, told to leave the terminal to us. `in_order`: results come in the order of their inputs."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = in_order
    for name in ("ray.data", "ray.data._internal.execution", "ray.data._internal.progress"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return ray.data


def _first_line(error: BaseException) -> str:
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return line.rstrip(".") + "."


def demand(cluster: Cluster, matching: bool, streaming: bool) -> dict[str, float]:
    """CPUs and GPUs that a run holds at its peak. Reading comes before training, unless the set streams."""
    cpus = cluster.workers * cluster.cpus + (cluster.match_actors * cluster.match_cpus if matching else 0)
    if streaming:
        cpus += 1  # at least one reader beside the training, or both wait for ever
    gpus = cluster.workers * cluster.gpus + (cluster.match_actors * cluster.match_gpus if matching else 0)
    return {"CPU": cpus, "GPU": gpus}


def plan(cluster: Cluster, matching: bool, streaming: bool) -> str:
    """The resource plan in one line."""
    wanted = demand(cluster, matching, streaming)
    parts = [f"{cluster.workers} training worker{'s' * (cluster.workers > 1)} × {cluster.cpus:g} CPU"]
    parts[0] += f" + {cluster.gpus:g} GPU" if cluster.gpus else ""
    if matching:
        parts.append(f"{cluster.match_actors} matching actor{'s' * (cluster.match_actors > 1)} × {cluster.match_cpus:g} CPU")
        parts[-1] += f" + {cluster.match_gpus:g} GPU" if cluster.match_gpus else ""
    if streaming:
        parts.append("readers × 1 CPU")
    return " + ".join(parts) + f" = {wanted['CPU']:g} CPU" + (f", {wanted['GPU']:g} GPU" if wanted["GPU"] else "")


def preflight(cluster: Cluster, matching: bool, streaming: bool, has: dict[str, float]) -> None:
    """ValueError for a plan that could never be placed: Ray would wait for ever."""
    wanted = demand(cluster, matching, streaming)
    for kind in ("CPU", "GPU"):
        there = has.get(kind, 0.0)
        if wanted[kind] > there + 1e-6:
            where = f"the cluster at {cluster.address}" if cluster.address else "this machine"
            mend = _mend(cluster, matching, streaming, kind, there)
            raise ValueError(f"{plan(cluster, matching, streaming)}, but {where} has {there:g} {kind}. {mend}")


def slots(c: Cluster, matching: bool, streaming: bool, nodes: Sequence[Mapping[str, float]]) -> int:
    """How many runs the nodes (their resources) hold completely at once, largest pieces first, each piece on one node; at least 1.

    Runs that are all in place wait for nobody, so there is no deadlock; one too many could hold a worker and wait for its matching
    actor while another does the same.
    """
    pieces = [(c.cpus, c.gpus)] * c.workers + [(c.match_cpus, c.match_gpus)] * (c.match_actors if matching else 0)
    pieces = sorted([*pieces, *([(1.0, 0.0)] if streaming else [])], reverse=True)
    free = [[node.get("CPU", 0.0), node.get("GPU", 0.0)] for node in nodes]
    count = 0
    while all(_place(piece, free) for piece in pieces):
        count += 1
    return max(1, count)


def _place(piece: tuple[float, float], free: list[list[float]]) -> bool:
    for node in free:
        if all(has + 1e-6 >= wants for has, wants in zip(node, piece, strict=True)):
            node[0] -= piece[0]
            node[1] -= piece[1]
            return True
    return False


def _mend(cluster: Cluster, matching: bool, streaming: bool, kind: str, there: float) -> str:
    one = cluster.cpus if kind == "CPU" else cluster.gpus
    rest = demand(cluster, matching, streaming)[kind] - cluster.workers * one
    fits = math.floor((there - rest) / one + 1e-6) if one else 0
    if fits >= 1:
        return f"At most cluster.workers={fits} fit."
    key = kind.lower() + "s"
    each = {"workers": cluster.workers > 1 and one, key: one}
    if matching and (actor := getattr(cluster, f"match_{key}")):
        each |= {"match_actors": cluster.match_actors > 1, f"match_{key}": actor}
    names = [f"cluster.{name}" for name, helps in each.items() if helps]
    if kind == "GPU" and not there:
        return f"Set {' and '.join(f'{name}=0' for name in names if name.endswith('gpus'))} to run on CPUs."
    return f"Lower {' or '.join(names)}."


def absolute(path: str) -> Path:
    """Workers run in folders of their own, so every path they are told is absolute."""
    return Path(os.path.abspath(os.path.expanduser(path)))
