"""`antidote submit` and `jobs` at the door of a cluster of one node, with a token, from a home and a directory of the user's own.

That a cluster grows for a job is not tested here: nothing on one machine starts nodes for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import ROOT, TINY

pytestmark = pytest.mark.ray
MARK = "ANTIDOTE_TEST_CLUSTER"
BIN = Path(sys.prefix) / "bin"


class Away:
    """A user outside the cluster: the command line with a home, a token and the dashboard's address."""

    def __init__(self, home: Path, door: str, env: dict[str, str]) -> None:
        self.home, self.door, self.env = home, door, env

    def run(self, *words: str, timeout: float = 300, token: str = "") -> subprocess.CompletedProcess[str]:
        env = {**self.env, "RAY_API_SERVER_ADDRESS": self.door, **({"RAY_AUTH_TOKEN": token} if token else {})}
        command = [sys.executable, "-m", "orchestrate", *words]
        return subprocess.run(command, cwd=self.home, env=env, capture_output=True, text=True, timeout=timeout)


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def living(mark: str, folder: str) -> list[int]:
    """The cluster's processes, whoever their parent is by now: the mark is in their environment, or they hold a file below the folder.

    Ray's workers write their title over their environment.
    """
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # gone meanwhile
            if entry.name.isdigit() and (
                f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0")
                or any(os.readlink(held).startswith(f"{folder}/") for held in (entry / "fd").iterdir())
            ):
                found.append(int(entry.name))
    return found


def end(mark: str, folder: str) -> None:
    """Kill them until none is left, also of what they started meanwhile: who still writes keeps its folder from being removed."""
    until = time.monotonic() + 60
    while alive := living(mark, folder):
        assert time.monotonic() < until, f"these outlive SIGKILL: {alive}"
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


@pytest.fixture
def away(tmp_path: Path) -> Iterator[Away]:
    mark, (port, client, dashboard) = uuid.uuid4().hex, free_ports(3)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "ANTIDOTE_"))}
    env |= {"HOME": str(tmp_path), "PATH": f"{BIN}:{env['PATH']}", "PYTHONPATH": str(ROOT)}
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(secrets.token_hex(32))
    theirs = env | {MARK: mark, "RAY_AUTH_MODE": "token", "ANTIDOTE_STORAGE": str(tmp_path / "far")}
    theirs.pop("PYTHONPATH")  # a cluster has no checkout: the code comes with the job
    with tempfile.TemporaryDirectory(prefix="r-") as short:  # Unix sockets want a short path
        command = ["ray", "start", "--head", f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
        command += ["--num-cpus=2", f"--temp-dir={short}", f"--ray-client-server-port={client}", "--node-ip-address=127.0.0.1"]
        try:
            started = subprocess.run(
                [*command, "--dashboard-agent-listen-port=0", "--disable-usage-stats"],
                cwd=tmp_path,
                env=theirs,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
            assert started.returncode == 0, started.stdout + started.stderr
            until = time.monotonic() + 120
            while not listens(dashboard):
                assert time.monotonic() < until, started.stdout + started.stderr
                time.sleep(0.2)
            yield Away(tmp_path, f"http://127.0.0.1:{dashboard}", env)
        finally:
            end(mark, os.path.realpath(short))


def listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def test_a_recipe_goes_to_a_cluster_and_its_results_come_back(away: Away) -> None:
    refused = away.run("jobs", "ls", token="0" * 64)
    assert refused.returncode == 1 and "wants its token" in refused.stderr

    (away.home / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom defenses.base import Defense\n\n"
        '@dataclass(frozen=True)\nclass Mine(Defense):\n    """x"""\n    strength: float = 1.0\n'
    )
    tiny = [word for word in TINY if not word.startswith(("defense.", "train.epochs="))]
    words = ["clip-smoke", *tiny, "train.epochs=1", "evaluate.probe=false", "track.uri=none", "defense=./mine.py:Mine"]
    slow = away.run("submit", "clip-small", "track.uri=none", "--no-wait")
    assert slow.returncode == 0, slow.stderr
    stopped = away.run("jobs", "stop", slow.stdout.strip())
    assert stopped.returncode == 0, stopped.stderr

    done = away.run("submit", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    [file] = (away.home / "runs").glob("*/result.json")
    result = json.loads(file.read_text())
    assert Path(result["run"]) == file.parent and result["epochs"] == 1 and result["defense"].endswith("/mine.py:Mine")
    assert (file.parent / "model").is_dir() and f"here: runs/{file.parent.name}" in done.stdout

    listed = away.run("jobs", "ls").stdout
    assert "SUCCEEDED" in listed and "STOPPED" in listed
