"""`antidote doctor`: is this cluster fit to run, and if not, what mends it. Judges what `probe` found on each node.

Every check ends in one line: what is well, or what is not and what to do about it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrate import capacity, cluster, mlflow_uri, probe
from orchestrate.cluster import Answer
from orchestrate.recipe import Recipe
from orchestrate.secrets import masked

ANSWER_S = 180.0  # for the slowest node: a worker's start, the imports, a first computation on each GPU
MOST_SHIPPED = 100 << 20  # bytes; Ray itself refuses 500 MB, and every node unpacks it
LEAST_DISK = 0.05  # share of a node's disk: below it Ray stores no more objects
LEAST_SHM = 60 << 20  # bytes of /dev/shm; a container has 64 MB unless told
DASHBOARD = 8265


@dataclass(frozen=True)
class Finding:
    """`mend` is empty where all is well."""

    topic: str
    text: str
    mend: str = ""

    @property
    def well(self) -> bool:
        return not self.mend


def examine(recipe: Recipe | None, place: cluster.Cluster, uri: str | None) -> Iterator[Finding]:
    """Findings, one after the other as they are known. ValueError where there is no session to examine."""
    with cluster.connected(place) as has:
        yield _door(place)
        storage = _storage_of(place)
        paths = _paths(recipe)
        store = mlflow_uri.resolve(uri, cluster.absolute(place.runs))
        with _marked(storage) as (mark, failure):
            if failure:
                yield Finding(
                    "storage",
                    f"{masked(storage)}: {failure}",
                    "give cluster.runs= (or cluster.storage=) a place that this machine may write to.",
                )
            args = (probe.pins(), storage if not failure else "", mark, paths, "" if _is_file(store) else store)
            answers = cluster.on_every_node(probe.look, lambda node: (args[0], node["Resources"].get("GPU", 0) > 0, *args[1:]), ANSWER_S)
        yield from judge(answers, place, storage if not failure else "", store)
        if _is_file(store):
            yield file_store(store)
        yield _size()
        if recipe is not None:
            yield plan(recipe, place, has, [answer.resources for answer in answers if not answer.error], cluster.ceiling())


def judge(answers: Sequence[Answer], place: cluster.Cluster, storage: str, store: str) -> Iterator[Finding]:
    """What the nodes' answers mean together."""
    well = [answer for answer in answers if not answer.error]
    yield _nodes(answers)
    if not well:
        return
    yield from _gpus(well)
    yield _versions(well)
    yield _each(
        well, "packages", lambda facts: facts["shadowed"], "are those that are installed", "take the other one off the path, or rename it."
    )
    if storage:
        mend = "give cluster.storage= an address (s3://…), or cluster.runs= a folder that all nodes share, writable for Ray's user."
        yield _each(well, "storage", lambda facts: facts.get("storage"), f"{masked(storage)} is read and written", mend)
    if any("mlflow" in answer.facts for answer in well):
        mend = "start the server where all nodes reach it, open its port to them, or give another with track.uri=…."
        yield _each(well, "mlflow", lambda facts: facts.get("mlflow"), f"{masked(store)} answers", mend)
    yield _each(
        well, "data", lambda facts: facts["missing"], "is there", "copy it there, or give data= an address (s3://…) or a shared folder."
    )
    yield _each(well, "disk", _short, "has room", f"free it: Ray stores nothing more below {LEAST_DISK:.0%}; a container wants --shm-size.")
    if place.address:
        yield _each(
            well,
            "ports",
            _open_dashboard,
            "the dashboard is closed to the outside",
            "start the head with --dashboard-host=127.0.0.1 and use a tunnel.",
        )


def file_store(store: str) -> Finding:
    """A store in a file is this machine's: the driver writes it, and Ray Train's controller, which lies on the driver's node."""
    folder = mlflow_uri.sqlite_path(store).parent
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if there.is_dir() and os.access(there, os.W_OK):
        return Finding("mlflow", f"{store} is written by this machine alone")
    return Finding(
        "mlflow", f"{store}: {there} may not be written", "give track.uri= or cluster.runs= a place that this machine may write to."
    )


def plan(
    recipe: Recipe,
    place: cluster.Cluster,
    has: Mapping[str, float],
    nodes: Sequence[Mapping[str, float]],
    most: Mapping[str, float] | None = None,
) -> Finding:
    """Whether the recipe's workers and actors find their places, now or when a cluster that scales has grown to `most`."""
    from orchestrate import prepared

    needs = (place, *prepared.needs(recipe)[1:])
    text = f"{recipe.name}: {capacity.plan(*needs)}"
    if most and not capacity.placeable(*needs, nodes):
        has, nodes = most, [most]
        text += ", once the cluster has grown"
    try:
        capacity.preflight(*needs, dict(has))
    except ValueError as error:
        return Finding("plan", str(error).partition(", but ")[0], f"the cluster is too small: {str(error).partition(', but ')[2]}")
    if not capacity.placeable(*needs, nodes):
        sizes = ", ".join(f"{node.get('CPU', 0):g} CPU + {node.get('GPU', 0):g} GPU" for node in nodes)
        return Finding("plan", text, f"it fits in sum, but not node by node ({sizes}): lower cluster.cpus or cluster.match_cpus.")
    return Finding("plan", f"{text}, of {has.get('CPU', 0):g} CPU, {has.get('GPU', 0):g} GPU")


# --- single topics ----------------------------------------------------------------------------------------------------------------


def _door(place: cluster.Cluster) -> Finding:
    where = place.address or "this machine"
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        return Finding("session", f"{where}, requests carry a token")
    return Finding(
        "session", f"{where}, without a token: who reaches a port may run code", "set RAY_AUTH_MODE=token on every node (docs/security.md)."
    )


def _nodes(answers: Sequence[Answer]) -> Finding:
    bad = [f"{a.host} ({a.error})" for a in answers if a.error and a.error != cluster.DEAD]
    well = [a for a in answers if not a.error]
    parts = [
        f"{a.host} {a.resources.get('CPU', 0):g} CPU" + (f" {a.resources['GPU']:g} GPU" if a.resources.get("GPU") else "") for a in well
    ]
    gone = sum(a.error == cluster.DEAD for a in answers)
    text = f"{len(well)} alive: {_some(parts)}" + (f"; {gone} have left" if gone else "")
    if bad or not well:
        return Finding("nodes", text, f"no answer from {_some(bad) or 'any'}: look at `ray status`, and at raylet.err on the node.")
    return Finding("nodes", text)


def _gpus(answers: Sequence[Answer]) -> Iterator[Finding]:
    holders = [a for a in answers if a.resources.get("GPU")]
    if not holders:
        yield Finding("gpus", "none; training runs on CPUs")
        return
    wrong = []
    for a in holders:
        seen = a.facts["gpus"]
        if "error" in seen:
            wrong.append(f"{a.host}: {seen['error']}")
        elif seen["count"] < a.resources["GPU"]:
            wrong.append(f"{a.host}: torch sees {seen['count']} of {a.resources['GPU']:g}")
    names = {name for a in holders for name in a.facts["gpus"].get("names", [])}
    text = f"{sum(a.resources['GPU'] for a in holders):g} on {len(holders)} nodes: {', '.join(sorted(names)) or 'unknown'}"
    mend = f"{_some(wrong)}. Install a torch build for the node's driver, or a newer driver; check `nvidia-smi` there." if wrong else ""
    yield Finding("gpus", text, mend)


def _versions(answers: Sequence[Answer]) -> Finding:
    names = list(answers[0].facts["versions"])
    unlike = []
    for name in names:
        held: dict[str, list[str]] = {}
        for a in answers:
            held.setdefault(a.facts["versions"].get(name, "missing"), []).append(a.host)
        if len(held) > 1 or "missing" in held:
            unlike.append(f"{name} is " + ", ".join(f"{version} on {_some(hosts)}" for version, hosts in held.items()))
    main = {name: answers[0].facts["versions"][name] for name in ("python", "ray", "torch", "open_clip_torch") if name in names}
    text = f"{', '.join(f'{name} {version}' for name, version in main.items())}; {len(names)} compared"
    return Finding("versions", text, f"{'; '.join(unlike)}: run deploy/setup.sh there, or build one image for all." if unlike else "")


def _each(answers: Sequence[Answer], topic: str, wrong: Callable[[Mapping[str, Any]], Any], well: str, mend: str) -> Finding:
    """A topic that is judged node by node."""
    bad = [f"{a.host}: {', '.join(what) if isinstance(what, list) else what}" for a in answers if (what := wrong(a.facts))]
    nodes = f"on {'all ' if len(answers) > 1 else ''}{len(answers)} node{'s' * (len(answers) > 1)}"
    return Finding(topic, f"{well} {nodes}" if not bad else _some(bad), mend if bad else "")


def _short(facts: Mapping[str, Any]) -> list[str]:
    low = [f"/tmp has {facts['disk_free']:.0%} free"] if facts["disk_free"] < LEAST_DISK else []
    return low + ([f"/dev/shm holds {facts['shm'] >> 20} MB"] if 0 < facts["shm"] < LEAST_SHM else [])


def _open_dashboard(facts: Mapping[str, Any]) -> list[str]:
    return [a for a in facts["open"] if a.endswith(f":{DASHBOARD}") and not a.startswith(("127.", "::1:"))]


def _size() -> Finding:
    bytes_ = cluster.shipped_bytes()
    mend = "something large lies in the checkout: put it elsewhere, or name it in .gitignore." if bytes_ > MOST_SHIPPED else ""
    return Finding("working_dir", f"{bytes_ / 1e6:.1f} MB go to each node with a job", mend)


def _paths(recipe: Recipe | None) -> list[str]:
    """Local paths that every node must have."""
    if recipe is None or recipe.data.path == "scenes" or "://" in recipe.data.path or any(sign in recipe.data.path for sign in "*?["):
        return []
    return [str(cluster.absolute(recipe.data.path))]


def _storage_of(place: cluster.Cluster) -> str:
    return place.storage or str(cluster.absolute(place.runs))


def _is_file(store: str) -> bool:
    return mlflow_uri.scheme(store) == "sqlite"


def _some(words: Iterable[str], most: int = 4) -> str:
    listed = list(words)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


class _marked:
    """A file in the storage for the length of the block: (its name, why it could not be written)."""

    def __init__(self, storage: str) -> None:
        self.storage, self.mark, self.failure = storage, f".doctor-{secrets.token_hex(6)}", ""

    def __enter__(self) -> tuple[str, str]:
        try:
            filesystem, path = probe.opened(self.storage)
            filesystem.create_dir(path, recursive=True)
            with filesystem.open_output_stream(f"{path}/{self.mark}") as file:
                file.write(self.mark.encode())
        except Exception as error:
            self.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return self.mark, self.failure

    def __exit__(self, *error: Any) -> None:
        if not self.failure:
            filesystem, path = probe.opened(self.storage)
            filesystem.delete_file(f"{path}/{self.mark}")
