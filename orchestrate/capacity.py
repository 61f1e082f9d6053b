"""Whether a recipe's workers, actors and readers find their places on given nodes: counting alone, no Ray.

A plan is `(cluster, matching, streaming)`, as `prepared.needs` makes it of a recipe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from orchestrate.recipe import Cluster


def demand(cluster: Cluster, matching: bool, streaming: bool) -> dict[str, float]:
    """CPUs and GPUs that a run needs at its peak. Reading comes before training, unless the set streams."""
    cpus = cluster.least * cluster.cpus + (cluster.match_actors * cluster.match_cpus if matching else 0)
    if streaming:
        cpus += 1  # at least one reader beside the training, or both wait for ever
    gpus = cluster.least * cluster.gpus + (cluster.match_actors * cluster.match_gpus if matching else 0)
    return {"CPU": cpus, "GPU": gpus}


def plan(cluster: Cluster, matching: bool, streaming: bool) -> str:
    """The resource plan in one line."""
    wanted = demand(cluster, matching, streaming)
    count = f"{cluster.least}–{cluster.workers}" if cluster.least < cluster.workers else f"{cluster.workers}"
    parts = [f"{count} training worker{'s' * (cluster.workers > 1)} × {cluster.cpus:g} CPU"]
    parts[0] += f" + {cluster.gpus:g} GPU" if cluster.gpus else ""
    if matching:
        parts.append(f"{cluster.match_actors} matching actor{'s' * (cluster.match_actors > 1)} × {cluster.match_cpus:g} CPU")
        parts[-1] += f" + {cluster.match_gpus:g} GPU" if cluster.match_gpus else ""
    if streaming:
        parts.append("readers × 1 CPU")
    return " + ".join(parts) + f" = {wanted['CPU']:g} CPU" + (f", {wanted['GPU']:g} GPU" if wanted["GPU"] else "")


def preflight(cluster: Cluster, matching: bool, streaming: bool, has: Mapping[str, float], verb: str = "has") -> None:
    """ValueError for a plan that could never be placed: Ray would wait for ever."""
    wanted = demand(cluster, matching, streaming)
    for kind in ("CPU", "GPU"):
        there = has.get(kind, 0.0)
        if wanted[kind] > there + 1e-6:
            where = f"the cluster at {cluster.address}" if cluster.address else "this machine"
            mend = _mend(cluster, matching, streaming, kind, there)
            raise ValueError(f"{plan(cluster, matching, streaming)}, but {where} {verb} {there:g} {kind}. {mend}")


def ceiling(config: Mapping[str, Any]) -> dict[str, float]:
    """What a cluster of this `ray up` configuration can grow to, infinite where a node type does not say what it has."""
    types, head = config.get("available_node_types") or {}, config.get("head_node_type")
    most = dict.fromkeys(("CPU", "GPU"), 0.0)
    for name, kind in types.items():
        nodes = 1 if name == head else min(kind.get("max_workers", 0), config.get("max_workers", math.inf))
        told = kind.get("resources") or {}
        for resource in most:
            each = told.get(resource, 0.0 if told else math.inf)
            most[resource] += nodes * each if nodes else 0.0
    return most


def slots(c: Cluster, matching: bool, streaming: bool, nodes: Sequence[Mapping[str, float]]) -> int:
    """How many runs the nodes (their resources) hold completely at once, largest pieces first, each piece on one node; at least 1.

    Runs that are all in place wait for nobody, so there is no deadlock; one too many could hold a worker and wait for its matching
    actor while another does the same.
    """
    wanted = pieces(c, matching, streaming)
    free = [[node.get("CPU", 0.0), node.get("GPU", 0.0)] for node in nodes]
    count = 0
    while all(_place(piece, free) for piece in wanted):
        count += 1
    return max(1, count)


def _place(piece: tuple[float, float], free: list[list[float]]) -> bool:
    for node in free:
        if all(has + 1e-6 >= wants for has, wants in zip(node, piece, strict=True)):
            node[0] -= piece[0]
            node[1] -= piece[1]
            return True
    return False


def placeable(c: Cluster, matching: bool, streaming: bool, nodes: Sequence[Mapping[str, float]]) -> bool:
    """Whether each worker and actor finds a node that holds it, all at once: sums over a cluster may hide that no single node does."""
    free = [[node.get("CPU", 0.0), node.get("GPU", 0.0)] for node in nodes]
    return all(_place(piece, free) for piece in pieces(replace(c, workers=c.least, min_workers=0), matching, streaming))


def pieces(c: Cluster, matching: bool, streaming: bool) -> list[tuple[float, float]]:
    """(CPUs, GPUs) of everything that must lie on one node each, the largest first."""
    found = [(c.cpus, c.gpus)] * c.workers + [(c.match_cpus, c.match_gpus)] * (c.match_actors if matching else 0)
    return sorted([*found, *([(1.0, 0.0)] if streaming else [])], key=lambda piece: piece[::-1], reverse=True)


def bundle(cpus: float, gpus: float) -> dict[str, float]:
    """A piece as Ray is asked for it: without what it does not want."""
    return {kind: amount for kind, amount in (("CPU", cpus), ("GPU", gpus)) if amount}


def _mend(cluster: Cluster, matching: bool, streaming: bool, kind: str, there: float) -> str:
    one = cluster.cpus if kind == "CPU" else cluster.gpus
    rest = demand(cluster, matching, streaming)[kind] - cluster.least * one
    fits = math.floor((there - rest) / one + 1e-6) if one else 0
    if fits >= 1:
        return f"At most cluster.{'min_workers' if cluster.min_workers else 'workers'}={fits} fit."
    key = kind.lower() + "s"
    each = {"workers": cluster.workers > 1 and one, key: one}
    if matching and (actor := getattr(cluster, f"match_{key}")):
        each |= {"match_actors": cluster.match_actors > 1, f"match_{key}": actor}
    names = [f"cluster.{name}" for name, helps in each.items() if helps]
    if kind == "GPU" and not there:
        return f"Set {' and '.join(f'{name}=0' for name in names if name.endswith('gpus'))} to run on CPUs."
    return f"Lower {' or '.join(names)}."
