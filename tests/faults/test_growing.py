"""A cluster without workers, which starts a node when a run asks for one: Ray's own autoscaler with its provider of made-up nodes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.ray.conftest import Antidote

from . import table
from .numbers import WORDS, Numbers
from .site import until

PORT = 6379  # Ray's provider of made-up nodes knows no other port of a head


def taken() -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", PORT)) == 0


class Growing:
    """A head without CPUs, and an autoscaler that may add one node of two. Its processes are known by their folder in /tmp."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ag"))  # short: it holds sockets
        kinds = {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 1},
        }
        provider = {"type": "fake_multinode", "use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True}
        self.config = {"cluster_name": "growing", "max_workers": 1, "provider": provider, "available_node_types": kinds}
        self.config |= {
            "head_node_type": "ray.head.default",
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": 5,
            "auth": {},
            "file_mounts": {},
        }
        self.config |= {"head_node": {}, "worker_nodes": {}, "cluster_synced_files": [], "initialization_commands": []}
        self.config |= {f"{kind}setup_commands": [] for kind in ("", "head_", "worker_")}
        self.config |= {f"{kind}_start_ray_commands": [] for kind in ("head", "worker")}
        (self.folder / "cluster.yaml").write_text(yaml.safe_dump(self.config))
        self.address = f"127.0.0.1:{PORT}"
        words = [str(Path(sys.prefix) / "bin" / "ray"), "start", "--head", "--block", "--num-cpus=0", "--include-dashboard=false"]
        words += [f"--port={PORT}", f"--temp-dir={self.folder}"]
        words += [f"--autoscaling-config={self.folder / 'cluster.yaml'}", "--disable-usage-stats"]
        self.auth = "token" if (Path.home() / ".ray" / "auth_token").is_file() else "disabled"  # said on both sides, or they guess apart
        env = {**os.environ, "RAY_AUTH_MODE": self.auth, "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
        self.log = (self.folder / "start.log").open("wb")
        self.process = subprocess.Popen(words, env=env, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True)
        until(lambda: b"Ray runtime started" in (self.folder / "start.log").read_bytes(), "the head", 240)

    def raylets(self) -> int:
        return sum("raylet/raylet" in words for _, words in self.processes())

    def processes(self) -> list[tuple[int, str]]:
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if str(self.folder) in words and int(entry.name) != os.getpid():
                    found.append((int(entry.name), words))
        return found

    def stop(self) -> None:
        for pid, _ in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture
def growing() -> Iterator[Growing]:
    if taken():
        pytest.skip(f"port {PORT} is taken, by another Ray?")
    cluster = Growing()
    yield cluster
    cluster.stop()


@pytest.mark.faults
def test_a_run_on_a_cluster_without_workers_starts_a_node_and_ends(
    growing: Growing, undisturbed: Numbers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver knows how far the cluster grows by what `ray up` leaves on a head."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(growing.config))
    if growing.auth == "token":
        shutil.copytree(Path.home() / ".ray", tmp_path / "home" / ".ray")
    monkeypatch.setenv("RAY_AUTH_MODE", growing.auth)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    antidote = Antidote(tmp_path)
    words = (*WORDS, f"cluster.address={growing.address}", f"cluster.storage={tmp_path / 'shared'}")
    assert growing.raylets() == 1
    with table.timed() as seconds:
        code, _, err = antidote.run("run", *words, timeout=400)
    assert code == 0 and "nodes: " in err, err
    assert growing.raylets() == 2
    found = Numbers.of(antidote)
    table.note("start", "nobody: a cluster without workers", "started a node, and ended there", seconds(), found.distance(undisturbed))
    assert found == undisturbed

    code, _, err = antidote.run("run", *words, "seed=1", "cluster.cpus=3", timeout=100)
    assert code == 1 and "may grow to" in err and "Traceback" not in err, err
