"""A cluster of several raylets on this machine, and the ways to strike at it."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read by Ray when it is imported: a raylet, its agents and its workers have so long to come up. Ray's own 30 to 60 s are too few where
# other work has the cores.
os.environ |= {
    "RAY_raylet_start_wait_time_s": "240",
    "RAY_agent_register_timeout_ms": "240000",
    "RAY_worker_register_timeout_seconds": "240",
}
import ray
from ray.cluster_utils import Cluster

from tests.ray.conftest import Antidote, kill, processes

TITLES = {
    "reader": "ray::MapBatches",
    "worker": "ray::RayTrainWorker",
    "actor": "ray::MapWorker",
    "controller": "ray::TrainController",
    "desk": "ray::Rounds",
}


class Desk:
    """The folder through which a test opens and closes the doors of held.py."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def close(self, phase: str) -> None:
        (self.folder / f"hold-{phase}").touch()

    def waiting(self, phase: str) -> list[int]:
        return [int(file.name.rpartition("-")[2]) for file in self.folder.glob(f"at-{phase}-*")]

    def offer(self, name: str) -> None:
        (self.folder / name).touch()

    def clear(self) -> None:
        """All doors open, nothing noted."""
        for file in self.folder.iterdir():
            file.unlink(missing_ok=True)


class Site:
    """A head without CPUs, so that all work lies on the other two nodes, each of which could do it alone."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.start()

    def start(self) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(2):
            self.add()

    def add(self) -> None:
        self.cluster.add_node(num_cpus=2)

    def stop(self) -> None:
        self.cluster.shutdown()

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def pids(self, who: str) -> list[int]:
        return processes(TITLES[who], os.getpid())

    def node_of(self, pid: int) -> Any:
        """The raylet's node that a process belongs to."""
        raylets = {
            node.all_processes[ray._private.ray_constants.PROCESS_TYPE_RAYLET][0].process.pid: node for node in self.cluster.worker_nodes
        }
        while pid not in raylets:
            pid = int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
            assert pid > 1, "the process is on no node of this site"
        return raylets[pid]

    def kill(self, who: str) -> None:
        """kill -9; fails where nobody of that kind lives."""
        found = self.pids(who)
        assert found, f"no {who} is alive"
        kill(found)

    def kill_node_of(self, pid: int) -> None:
        """Everything on the node dies at once, as where the power goes; another takes its place."""
        self.cluster.remove_node(self.node_of(pid), allow_graceful=False)
        self.add()

    def kill_head(self) -> None:
        self.cluster.remove_node(self.cluster.head_node, allow_graceful=False)

    @property
    def headless(self) -> bool:
        return self.cluster.head_node is None

    def replace(self) -> None:
        """What is left of a cluster without a head goes; a new cluster comes."""
        for node in list(self.cluster.worker_nodes):
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        self.cluster.worker_nodes.clear()
        self.start()


def until(ready: Callable[[], Any], what: str, seconds: float = 240, *, process: subprocess.Popen[str] | None = None) -> Any:
    """The first true value of `ready`; fails if the time is up, or the run that is to bring it (`process`) ends, before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended = process is not None and process.poll() is not None  # asked first: what it did last counts
        if value := ready():
            return value
        if process is not None and ended:
            raise AssertionError(f"waited for {what}, and the run ended with {process.returncode}:\n{process.communicate()[1]}")
        time.sleep(0.01)
    raise AssertionError(f"waited {seconds:g} s for {what}")


def elsewhere(antidote: Antidote) -> Antidote:
    """The same command line on another host: an empty folder, so nothing but the storage is left."""
    folder = antidote.folder / "elsewhere"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return Antidote(folder)
