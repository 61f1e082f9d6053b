"""Who dies in which phase: every run ends with the numbers of an undisturbed one, on its own or when it is run again.

`make faults` runs it and prints the table of docs/faults.md; `make test` kills a worker, an auditor and drivers in tests/ray.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.ray.conftest import kill

from . import table
from .conftest import Runs
from .numbers import Numbers
from .site import elsewhere, until

LIMIT_S = 400  # of a whole run; one that takes longer hangs
SMALL = 4 << 20  # bytes that an actor out of memory may still take; a batch of the images here takes more
PHASES = ("read", "train", "match", "evaluate", "log")
VICTIM = {"read": "reader", "train": "worker", "match": "actor", "evaluate": "worker"}


def cases() -> list[object]:
    """(phase, who)."""
    found = [(phase, who) for phase in ("read", "train", "match", "evaluate") for who in ("process", "node", "driver", "head")]
    found += [("match", "worker"), ("train", "actor"), ("log", "driver"), ("log", "head"), ("log", "controller")]
    return [pytest.param(*case, marks=pytest.mark.faults, id="-".join(case)) for case in found]


def reach(runs: Runs, phase: str, process: subprocess.Popen[str]) -> list[int]:
    """Wait until the run is in the phase, where it stays; the processes that are at work there."""
    site, antidote = runs.site, runs.antidote
    if phase == "read":
        return until(lambda: site.pids("reader"), "a reading task", process=process)
    if phase == "log":
        until(lambda: list(antidote.runs.glob("*/result.json")), "a result", process=process)
        return []
    if phase == "train":
        until(lambda: any(r.get("epoch") == 2 for r in antidote.records()), "the second epoch", process=process)
        site.desk.close("train")
    return until(lambda: site.desk.waiting(phase), f"somebody in phase {phase}", process=process)


@pytest.mark.parametrize(("phase", "who"), cases())
def test_a_death_changes_no_number(runs: Runs, undisturbed: Numbers, phase: str, who: str) -> None:
    site, desk = runs.site, runs.site.desk
    for door in ("match", "evaluate"):
        if phase == door:
            desk.close(door)
    with table.timed() as seconds:
        process = runs.antidote.start("run", *runs.words())
        try:
            if who == "controller":
                desk.close("match")
                until(lambda: desk.waiting("match"), "a matching round", process=process)
                site.kill("controller")
            else:
                there = reach(runs, phase, process)
                strike(runs, phase, who, there, process)
            desk.clear()
            _, err = process.communicate(timeout=LIMIT_S)
        finally:
            process.kill()
            desk.clear()
            if site.headless:  # the next case needs a site, whatever becomes of this one
                site.replace()
        last, outcome = runs.antidote, "went on by itself"
        if who in ("driver", "head", "controller"):
            done = phase == "log" and not process.returncode  # its result was written: a head's death may come too late to matter
            assert done or process.returncode, f"a run whose {who} died ended as if nothing had been:\n{err}"
            if who == "head":
                last = elsewhere(last)  # nothing is left but the storage
            last.result(*runs.words())
            outcome = ("was done, and fetched" if done else "went on when run again") + (" on another host" if who == "head" else "")
        else:
            assert process.returncode == 0, err
        found = Numbers.of(last)
    table.note(phase, who if who != "process" else VICTIM[phase], outcome, seconds(), found.distance(undisturbed))
    assert found == undisturbed


def strike(runs: Runs, phase: str, who: str, there: list[int], process: subprocess.Popen[str]) -> None:
    if who == "process":
        kill(there)
    elif who == "node":
        runs.site.kill_node_of(there[0])
    elif who == "driver":
        kill([process.pid])
    elif who == "head":
        runs.site.kill_head()
    else:
        runs.site.kill(who)


@pytest.mark.faults
def test_records_that_a_killed_controller_did_not_write_are_written_on_going_on(runs: Runs, undisturbed: Numbers) -> None:
    """Killed after the checkpoint of an epoch and before its lines, as happens on a busy machine; here the lines are taken away."""
    antidote = runs.antidote
    with table.timed() as seconds:
        process = antidote.start("run", *runs.words("cluster.storage="))
        reach(runs, "train", process)
        kill([process.pid])
        process.communicate(timeout=60)
        runs.site.desk.clear()
        [journal] = antidote.runs.glob("*/metrics.jsonl")
        lines = journal.read_text().splitlines(keepends=True)
        journal.write_text("".join(line for line in lines if '"epoch": 1' in line))
        antidote.result(*runs.words("cluster.storage="))
    found = Numbers.of(antidote)
    table.note("log", "the driver, between checkpoint and lines", "went on when run again", seconds(), found.distance(undisturbed))
    assert found == undisturbed


@pytest.mark.faults
def test_a_straggler_delays_and_changes_nothing(runs: Runs, undisturbed: Numbers) -> None:
    runs.site.desk.offer("straggle-5")
    with table.timed() as seconds:
        runs.antidote.result(*runs.words("cluster.match_actors=2", "cluster.match_batch=64"))
    found = Numbers.of(runs.antidote)
    assert list(runs.site.desk.folder.glob("straggler-*")), "nobody was late"
    table.note("match", "an actor 5 s late at each call", "waited for it", seconds(), found.distance(undisturbed))
    assert found.distance(undisturbed) < 1e-6  # a part of 64 images is another matrix product than one of all


@pytest.mark.faults
def test_a_straggler_beyond_the_limit_is_named(runs: Runs) -> None:
    runs.site.desk.offer("straggle-60")
    with table.timed() as seconds:
        code, _, err = runs.antidote.run("run", *runs.words("cluster.timeout_s=15", "cluster.max_failures=0"), timeout=LIMIT_S)
    assert code == 1 and "waited 15 s for the matching round of epoch 2" in err and "cluster.match_actors" in err, err
    assert "Traceback" not in err
    table.note("match", "an actor 60 s late, cluster.timeout_s=15", "refused: says what it waited for", seconds(), None)


@pytest.mark.faults
def test_an_actor_out_of_memory_is_named_or_replaced(runs: Runs, undisturbed: Numbers) -> None:
    """Its address space is bounded while it stands at the door, so that no large allocation succeeds, as on a full machine. (A bound below
    what it holds leaves it unable even to say so: then the workers' own wait, `cluster.timeout_s`, ends the run.)"""
    import resource

    runs.site.desk.close("match")
    with table.timed() as seconds:
        process = runs.antidote.start("run", *runs.words())
        try:
            [actor] = reach(runs, "match", process)
            bound = address_space(actor) + SMALL
            resource.prlimit(actor, resource.RLIMIT_AS, (bound, bound))
            runs.site.desk.clear()
            _, err = process.communicate(timeout=LIMIT_S)
        finally:
            process.kill()
    if process.returncode == 0:  # it died of it, as where a library gives up instead of saying so: its successor has no bound
        found = Numbers.of(runs.antidote)
        table.note("match", "an actor out of memory", "its successor went on", seconds(), found.distance(undisturbed))
        assert found == undisturbed
        return
    assert process.returncode == 1 and "memory" in err and "cluster.match_batch" in err, err
    table.note("match", "an actor out of memory", "refused: names cluster.match_batch", seconds(), None)


def address_space(pid: int) -> int:
    """Bytes."""
    return 1024 * int(next(line for line in (Path("/proc") / str(pid) / "status").read_text().splitlines() if "VmSize" in line).split()[1])


@pytest.mark.faults
def test_an_actor_that_dies_of_every_attempt_is_given_up(runs: Runs) -> None:
    """What the system's out-of-memory killer does to an item that is too large: SIGKILL, again and again."""
    desk = runs.site.desk
    desk.close("match")
    with table.timed() as seconds:
        process, dead = runs.antidote.start("run", *runs.words()), set[int]()

        def another() -> bool:
            for pid in set(desk.waiting("match")) - dead:
                kill([pid])
                dead.add(pid)
            return process.poll() is not None

        try:
            until(another, "the end of the run", LIMIT_S)
        finally:
            process.kill()
        err = process.communicate()[1]
    assert process.returncode == 1 and "matching" in err and "memory" in err, err
    table.note("match", f"an actor killed at every attempt ({len(dead)})", "refused: names the item and memory", seconds(), None)


def test_numbers_are_compared_to_the_last_digit() -> None:
    one = Numbers({"loss/1": 1.0, "asr/stripes/hits": 3.0})
    assert one.distance(Numbers(json.loads(json.dumps(one.found)))) == 0.0
    assert one.distance(Numbers({"loss/1": 1.0 + 1e-9, "asr/stripes/hits": 3.0})) == pytest.approx(1e-9)
