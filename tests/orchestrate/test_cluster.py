"""Whether a recipe fits, said before anything starts, and what a job ships. No Ray is started."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from orchestrate import ROOT, capacity, cluster
from orchestrate.recipe import Cluster

AMOUNTS = st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0])
CLUSTERS = st.builds(
    Cluster,
    workers=st.integers(1, 64),
    cpus=AMOUNTS,
    gpus=st.just(0.0) | AMOUNTS,
    match_actors=st.integers(1, 8),
    match_cpus=AMOUNTS,
    match_gpus=st.just(0.0) | AMOUNTS,
)


@pytest.mark.parametrize(
    ("settings", "matching", "streaming", "wanted", "line"),
    [
        (Cluster(), False, False, (1, 0), "1 training worker × 1 CPU = 1 CPU"),
        (Cluster(), True, False, (1.5, 0), "1 training worker × 1 CPU + 1 matching actor × 0.5 CPU = 1.5 CPU"),
        (Cluster(workers=4, min_workers=2), False, False, (2, 0), "2–4 training workers × 1 CPU = 2 CPU"),
        (Cluster(workers=2, cpus=0.5), False, True, (2, 0), "2 training workers × 0.5 CPU + readers × 1 CPU = 2 CPU"),
        (
            Cluster(workers=8, cpus=8, gpus=1, match_actors=8, match_cpus=4, match_gpus=0.1),
            True,
            False,
            (96, 8.8),
            "8 training workers × 8 CPU + 1 GPU + 8 matching actors × 4 CPU + 0.1 GPU = 96 CPU, 8.8 GPU",
        ),
    ],
)
def test_the_plan_adds_up_what_is_held_at_once(settings, matching, streaming, wanted, line):
    assert tuple(capacity.demand(settings, matching, streaming).values()) == pytest.approx(wanted)
    assert capacity.plan(settings, matching, streaming) == line


@pytest.mark.parametrize(
    ("settings", "has", "matching", "message"),
    [
        (
            Cluster(workers=64),
            {"CPU": 2.0},
            False,
            "64 training workers × 1 CPU = 64 CPU, but this machine has 2 CPU. At most cluster.workers=2 fit.",
        ),
        (
            Cluster(workers=64),
            {"CPU": 2.0},
            True,
            "+ 1 matching actor × 0.5 CPU = 64.5 CPU, but this machine has 2 CPU. At most cluster.workers=1 fit.",
        ),
        (
            Cluster(gpus=1),
            {"CPU": 2.0},
            False,
            "1 training worker × 1 CPU + 1 GPU = 1 CPU, 1 GPU, but this machine has 0 GPU. Set cluster.gpus=0 to run on CPUs.",
        ),
        (
            Cluster(gpus=1, match_gpus=0.1),
            {"CPU": 2.0, "GPU": 0.0},
            True,
            "but this machine has 0 GPU. Set cluster.gpus=0 and cluster.match_gpus=0 to run on CPUs.",
        ),
        (
            Cluster(address="head:6379", workers=3, gpus=1, match_actors=2, match_gpus=0.5),
            {"CPU": 64.0, "GPU": 3.0},
            True,
            "but the cluster at head:6379 has 3 GPU. At most cluster.workers=2 fit.",
        ),
        (
            Cluster(match_actors=4, match_cpus=1),
            {"CPU": 2.0},
            True,
            "but this machine has 2 CPU. Lower cluster.cpus or cluster.match_actors or cluster.match_cpus.",
        ),
        (
            Cluster(cpus=4),
            {"CPU": 2.0},
            False,
            "1 training worker × 4 CPU = 4 CPU, but this machine has 2 CPU. Lower cluster.cpus.",
        ),
    ],
)
def test_what_cannot_be_placed_is_refused_with_what_would_fit(settings, has, matching, message):
    with pytest.raises(ValueError) as error:
        capacity.preflight(settings, matching, False, has)
    assert str(error.value).endswith(message)


@given(CLUSTERS, st.booleans(), st.booleans(), st.integers(1, 64), st.integers(0, 16))
def test_a_plan_is_refused_exactly_when_it_does_not_fit(settings, matching, streaming, cpus, gpus):
    wanted = capacity.demand(settings, matching, streaming)
    fits = wanted["CPU"] <= cpus and wanted["GPU"] <= gpus
    try:
        capacity.preflight(settings, matching, streaming, {"CPU": float(cpus), "GPU": float(gpus)})
    except ValueError:
        assert not fits
    else:
        assert fits


@given(CLUSTERS, st.booleans(), st.booleans(), st.integers(1, 64))
def test_the_number_of_workers_it_suggests_does_fit_and_one_more_does_not(settings, matching, streaming, cpus):
    settings = dataclasses.replace(settings, gpus=0.0, match_gpus=0.0)
    has = {"CPU": float(cpus)}
    try:
        capacity.preflight(settings, matching, streaming, has)
        assume(False)
    except ValueError as error:
        _, sign, rest = str(error).partition("At most cluster.workers=")
    assume(sign)
    count = int(rest.split()[0])
    assert 1 <= count < settings.workers
    capacity.preflight(dataclasses.replace(settings, workers=count), matching, streaming, has)
    with pytest.raises(ValueError):
        capacity.preflight(dataclasses.replace(settings, workers=count + 1), matching, streaming, has)


def test_fewer_workers_than_wanted_may_start_but_not_fewer_than_needed():
    elastic = Cluster(workers=8, min_workers=2)
    capacity.preflight(elastic, False, False, {"CPU": 2})
    with pytest.raises(ValueError, match=r"2–8 training workers.*has 1 CPU. At most cluster.min_workers=1 fit."):
        capacity.preflight(elastic, False, False, {"CPU": 1})
    with pytest.raises(ValueError, match=r"cluster.min_workers=3 is above cluster.workers=2"):
        Cluster(workers=2, min_workers=3)


def test_the_error_that_others_stand_around_is_found():
    inner = ValueError("here")
    middle = RuntimeError("middle")
    middle.__cause__ = inner
    outer = RuntimeError("outer")
    outer.cause = middle
    assert cluster.innermost(outer) is inner and cluster.innermost(inner) is inner


def test_a_streaming_run_leaves_a_core_for_a_reader():
    """Else the workers would wait for a reader that waits for the workers' cores."""
    capacity.preflight(Cluster(workers=2), False, False, {"CPU": 2.0})
    with pytest.raises(ValueError, match=r"readers × 1 CPU = 3 CPU, but this machine has 2 CPU. At most cluster.workers=1 fit"):
        capacity.preflight(Cluster(workers=2), False, True, {"CPU": 2.0})


def test_shares_that_add_up_to_the_whole_fit_whatever_the_rounding():
    capacity.preflight(Cluster(workers=10, cpus=0.1, match_actors=10, match_cpus=0.1), True, False, {"CPU": 2.0})


# --- what a job ships --------------------------------------------------------------------------------------------------------


def test_a_job_ships_the_four_rooms_from_a_checkout():
    env = cluster.runtime_env()
    assert env["working_dir"] == str(ROOT)
    assert all((ROOT / room / "__init__.py").is_file() for room in ("orchestrate", "models", "attacks", "defenses"))
    assert env["env_vars"]["TOKENIZERS_PARALLELISM"] == "false"


def test_what_is_shipped_is_small():
    """Ray refuses 500 MB, and every worker unpacks it: nothing but code goes, runs and virtual environments stay."""
    for folder in (".git", ".venv", "runs", "tests", "docs"):
        assert f"/{folder}" in cluster.EXCLUDE
    rooms = sum(
        f.stat().st_size
        for room in ("orchestrate", "models", "attacks", "defenses")
        for f in (ROOT / room).rglob("*.*")
        if f.suffix != ".pyc"
    )
    assert rooms < 2_000_000


def test_an_installed_package_ships_its_rooms_as_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cluster, "ROOT", tmp_path)  # site-packages: no pyproject.toml beside the rooms, and much else
    env = cluster.runtime_env()
    assert "working_dir" not in env
    assert env["py_modules"] == [str(tmp_path / room) for room in ("orchestrate", "models", "attacks", "defenses")]


def test_paths_for_workers_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert cluster.absolute("runs/../out") == tmp_path / "out"
    assert cluster.absolute("~/runs") == Path(os.path.expanduser("~")) / "runs"
    assert cluster.absolute("/data/runs") == Path("/data/runs")


def test_planning_needs_no_ray():
    code = "import sys; from orchestrate import cluster; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)


@pytest.mark.parametrize(
    ("settings", "matching", "streaming", "nodes", "at_once"),
    [
        (Cluster(), False, False, [{"CPU": 2}], 2),
        (Cluster(), True, False, [{"CPU": 2}], 1),  # two workers would hold the CPU that each other's actor needs
        (Cluster(), True, False, [{"CPU": 3}], 2),
        (Cluster(), True, True, [{"CPU": 5}], 2),
        (Cluster(cpus=2), False, False, [{"CPU": 3}, {"CPU": 3}], 2),  # not 3: no worker is spread over two nodes
        (Cluster(workers=2, cpus=1, match_actors=2), True, False, [{"CPU": 4}, {"CPU": 2}], 2),
        (Cluster(gpus=1), False, False, [{"CPU": 16, "GPU": 2}, {"CPU": 16}], 2),
        (Cluster(gpus=0.5, match_gpus=0.5), True, False, [{"CPU": 16, "GPU": 2}], 2),
        (Cluster(workers=4), False, False, [{"CPU": 2}], 1),  # `preflight` refuses it; nobody divides by 0
    ],
)
def test_so_many_runs_at_once(settings, matching, streaming, nodes, at_once):
    assert capacity.slots(settings, matching, streaming, nodes) == at_once


def test_a_cluster_that_ray_up_started_says_how_far_it_grows(tmp_path, monkeypatch):
    types = {
        "head": {"resources": {"CPU": 0}},
        "train": {"max_workers": 4, "resources": {"CPU": 8, "GPU": 1}},
        "off": {"resources": {"CPU": 9}},
    }
    config = {"max_workers": 3, "head_node_type": "head", "available_node_types": types}
    assert capacity.ceiling(config) == {"CPU": 24, "GPU": 3}
    types["train"]["resources"] = {}  # on-premise: machines are asked when they join
    assert capacity.ceiling(config) == {"CPU": math.inf, "GPU": math.inf}
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(cluster.KUBERNETES, raising=False)
    assert cluster.ceiling() is None
    (tmp_path / "ray_bootstrap_config.yaml").write_text(
        "max_workers: 2\nhead_node_type: h\navailable_node_types: {h: {resources: {CPU: 1}}}"
    )
    assert cluster.ceiling() == {"CPU": 1, "GPU": 0}


@given(CLUSTERS, st.booleans(), st.lists(st.integers(1, 64), min_size=1, max_size=4))
def test_runs_at_once_never_ask_for_more_than_there_is(settings, matching, cpus):
    nodes = [{"CPU": float(n), "GPU": float(n)} for n in cpus]
    wanted = capacity.demand(settings, matching, False)
    at_once = capacity.slots(settings, matching, False, nodes)
    for kind in ("CPU", "GPU"):
        assert at_once == 1 or at_once * wanted[kind] <= sum(cpus) + 1e-3


@pytest.mark.parametrize("inner", [False, True])
def test_sigterm_ends_a_session_as_ctrl_c_does(monkeypatch, inner):
    """Ray's init takes the signal for itself; a session within another one leaves it as it is."""
    said, before = [], signal.getsignal(signal.SIGTERM)
    for name in (*cluster.ENVIRONMENT, "RAY_worker_maximum_startup_concurrency"):
        monkeypatch.setenv(name, "")  # so that what `connected` sets is put back

    def init(**_: object) -> None:
        signal.signal(signal.SIGTERM, lambda *_: said.append("Ray's own"))

    ray = SimpleNamespace(is_initialized=lambda: inner, init=init, cluster_resources=dict, shutdown=lambda: said.append("shut down"))
    monkeypatch.setitem(sys.modules, "ray", ray)
    try:
        if inner:
            init()
        with contextlib.suppress(KeyboardInterrupt), cluster.connected(Cluster()):
            os.kill(os.getpid(), signal.SIGTERM)
            said.append("went on")
        assert said == (["Ray's own", "went on"] if inner else ["shut down"])
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_session_in_a_thread_leaves_signals_alone():
    before, failed = signal.getsignal(signal.SIGTERM), []

    def enter() -> None:
        try:
            with cluster._interruptible():
                pass
        except ValueError as error:  # what Python says to a handler set in a thread
            failed.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert not failed and signal.getsignal(signal.SIGTERM) is before


def test_what_libraries_write_to_the_terminal_goes_to_a_file_and_what_python_writes_does_not(tmp_path):
    script = f"""
import os, sys
from pathlib import Path
from orchestrate.cluster import native_stderr
with native_stderr(Path({str(tmp_path / "log")!r})):
    os.write(2, b"from a library\\n")
    print("from Python", file=sys.stderr)
os.write(2, b"afterwards\\n")
print("and after", file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == "from Python\nafterwards\nand after\n", done.stderr
    assert (tmp_path / "log").read_text() == "from a library\n"
