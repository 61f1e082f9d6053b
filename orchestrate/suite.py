"""Several recipes in one Ray session, as many at once as the machine holds: `antidote run demo`.

Each member is a `fit` in a process of its own, as a sweep's trials are, with its share of the cores as threads: small models gain little
from a second thread, and much from a second run beside them. Alone, or where only one fits, a member runs here and shows its own progress.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from orchestrate import capacity, cluster, prepared, reading, rundir, train
from orchestrate import recipe as recipes
from orchestrate.progress import Phase
from orchestrate.recipe import Recipe

Result = dict[str, Any]


def run(members: Sequence[Recipe], *, force: bool = False) -> list[Result]:
    """The members' results, in their order. Finished members are not run again, unless `force`.

    ValueError or RuntimeError with the members' reasons, once all have ended, where some could not be run.
    """
    waiting = [m for m in members if force or rundir.finished(m) is None]
    if len(waiting) < 2:
        return [train.fit(m, force=force) for m in members]
    with cluster.connected(waiting[0].cluster) as has:
        at_once = min(len(waiting), _at_once(waiting, has))
        if at_once < 2:
            return [train.fit(m, force=force) for m in members]
        failed = _together(waiting, at_once, force)
    if failed:
        raise RuntimeError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
    return [train.fit(m) for m in members]  # all finished: their results


def _at_once(members: Sequence[Recipe], has: dict[str, float]) -> int:
    """As many as the nodes hold completely."""
    plans = {prepared.needs(m) for m in members}
    for plan in plans:
        has = cluster.room(*plan, has)
    nodes = cluster.node_resources()
    return min(capacity.slots(*plan, nodes) for plan in plans)


def _together(members: Sequence[Recipe], at_once: int, force: bool) -> dict[str, str]:
    """Run them; the reasons of those that failed, by name."""
    sets = _lent(members)
    threads = max(1, (os.cpu_count() or 1) // at_once)
    spec = {"cwd": os.getcwd(), "sets": sets, "force": force}
    packed = [recipes.packed(replace(m, cluster=replace(m.cluster, threads=m.cluster.threads or threads))) for m in members]
    names, failed = [m.name for m in members], {}
    with Phase(f"{len(members)} members, {at_once} at once", unit="run") as phase:
        phase.at(0, total=len(members))
        look = lambda: phase.at(phase.done, "; ".join(f"{name}: {note}" for name, note in train.notes(members).items()))
        for count, (i, reason) in enumerate(cluster.parallel(member, [(one, spec) for one in packed], at_once, look), 1):
            phase.at(count)
            if reason:
                failed[names[i]] = reason
        phase.note = ""
    return failed


def _lent(members: Sequence[Recipe]) -> dict[Any, Any]:
    """The decoded set, where all members read the same one: read once, by the driver."""
    same = {(str(m.as_dict()["data"]), prepared.stored_side(m)) for m in members}
    if len(same) > 1:
        return {}
    sets, _ = reading.prepare(members[0])
    return sets


def member(packed: Any, spec: dict[str, Any]) -> str:
    """In a process of its own: one run to its end. "" or the reason why it could not be run."""
    os.chdir(spec["cwd"])
    reading.lend(spec["sets"], {})
    try:
        train.fit(recipes.unpacked(packed), force=spec["force"])
    except (ValueError, RuntimeError, OSError) as error:
        return str(error)[-2000:]
    return ""
