"""A cluster of machines at hand, for real: `ray up deploy/local.yaml` over SSH, doctor, a training run over two nodes, `ray down`.

    make cluster-test            or: python -m pytest -s tests/cluster/on_premise.py

Makes its machines from namespaces on this box (hosts.py), needs root for it, and says what it lacks where it cannot. The name keeps it
out of `make test`: it takes minutes.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .hosts import Hosts, die_with_parent, lacking

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.prefix) / "bin"
LIMIT_S = 600.0  # for one command

pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking())


class Laptop:
    """The user's side: a home with the token and the key, a copy of deploy/local.yaml with its CHANGE-MEs changed, and a transcript."""

    def __init__(self, folder: Path, hosts: Hosts) -> None:
        self.hosts, self.home, self.shared, self.started = hosts, folder / "laptop", folder / "shared", time.monotonic()
        self.config = self.home / "local.yaml"
        (self.home / ".ssh").mkdir(parents=True)
        self.shared.mkdir()
        text = (ROOT / "deploy/local.yaml").read_text()
        changes = {
            "cluster_name: antidote": f"cluster_name: antidote-{os.getpid()}",
            "head_ip: CHANGE-ME": f"head_ip: {hosts.addresses[0]}",
            "worker_ips: [CHANGE-ME, CHANGE-ME]": f"worker_ips: [{', '.join(hosts.addresses[1:])}]",
            "ssh_user: ubuntu": "ssh_user: root",
            "~/.ssh/id_ed25519": str(hosts.key),
            "/CHANGE-ME/runs": f"{self.shared}/runs",
        }
        for old, new in changes.items():
            assert text.count(old) == 1
            text = text.replace(old, new)
        self.config.write_text(text)
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "ANTIDOTE_"))}
        self.env |= {
            "HOME": str(self.home),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_UP_enable_autoscaler_v2": "0",
            "RAY_TMPDIR": str(self.home),
        }

    def run(self, *words: str, code: int | None = 0) -> str:
        """A command in the repository's root, its output on the transcript."""
        print(f"\n[{time.monotonic() - self.started:6.1f} s] $ {' '.join(words)}", flush=True)
        began = time.monotonic()
        done = subprocess.run(
            words,
            cwd=ROOT,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_S,
        )
        shown = done.stdout if len(done.stdout) < 6000 else done.stdout[:3000] + "\n  …\n" + done.stdout[-3000:]
        print(f"{shown.rstrip()}\n({time.monotonic() - began:.1f} s, exit code {done.returncode})", flush=True)
        assert code is None or done.returncode == code
        return done.stdout

    def antidote(self, *words: str, code: int | None = 0) -> str:
        return self.run(str(BIN / "python"), "-m", "orchestrate", *words, code=code)

    def until(self, what: str, ready: object, seconds: float) -> float:
        """Seconds until `ready()`; fails after `seconds`."""
        began = time.monotonic()
        while not ready():  # type: ignore[operator]
            assert time.monotonic() - began < seconds, f"{what}: not within {seconds:g} s"
            time.sleep(1)
        print(f"[{time.monotonic() - self.started:6.1f} s] {what}: after {time.monotonic() - began:.1f} s", flush=True)
        return time.monotonic() - began


@pytest.fixture
def laptop(tmp_path: Path) -> Iterator[Laptop]:
    with Hosts(3, tmp_path / "hosts", seen=[ROOT, tmp_path]) as hosts:
        yield Laptop(tmp_path, hosts)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_machines_at_hand_train_together(laptop: Laptop) -> None:
    up = ["ray", "up", "-y", "--disable-usage-stats", str(laptop.config)]
    subprocess.run(["ray", "get-auth-token", "--generate"], env=laptop.env, check=True, stdout=subprocess.DEVNULL, timeout=LIMIT_S)
    laptop.run(*up)

    port = free_port()
    tunnel = subprocess.Popen(
        ["ray", "dashboard", "--port", str(port), str(laptop.config)],
        env=laptop.env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=die_with_parent,
        start_new_session=True,
    )
    try:
        door = f"http://127.0.0.1:{port}"
        laptop.until("the tunnel", lambda: _listens(port), 300)
        joined = laptop.until("both workers have joined", lambda: _nodes(laptop) == 3, 600)

        token = laptop.home / ".ray" / "auth_token"
        kept = token.read_text()
        token.write_text("0" * len(kept))
        refused = laptop.antidote("jobs", "ls", "--address", door, code=1)
        assert "wants its token" in refused
        token.write_text(kept)

        where = [f"data.cache={laptop.shared}/cache", "cluster.workers=2", "cluster.cpus=1.5", "cluster.match_cpus=0.5"]
        told = laptop.antidote("doctor", "roclip-smoke", *where, "--address", door)
        assert "3 alive" in told and "✗" not in told
        small = ["data.size=320", "data.heldout=140", "train.epochs=2", "train.batch=64", "defense.every=1", "defense.warmup=0"]
        here = laptop.home / "runs"
        said = laptop.antidote("submit", "roclip-smoke", *where, *small, "--address", door, "--runs", str(here))
        assert re.search(r"^run: /", said, re.MULTILINE) and list((laptop.shared / "runs").glob("*/result.json"))
        [file] = here.glob("*/result.json")
        result = json.loads(file.read_text())
        assert result["workers"] == 2 and result["epochs"] == 2 and Path(result["run"]) == file.parent
        assert (file.parent / "report.html").is_file() and (file.parent / "model").is_dir()
        placed = laptop.run("ray", "exec", str(laptop.config), "ray list actors --filter class_name=RayTrainWorker --format json --detail")
        nodes = {found for found in re.findall(r'"node_id": "(\w+)"', placed)}
        assert len(nodes) == 2, "both training workers lay on one node"
    finally:
        os.killpg(tunnel.pid, 9)
        laptop.run("ray", "down", "-y", str(laptop.config), code=None)
    left = laptop.until("no Ray process is left on any machine", lambda: laptop.hosts.ray_processes() == 0, 300)
    print(
        f"\nworkers joined after {joined:.0f} s, were gone {left:.0f} s after `ray down`; {time.monotonic() - laptop.started:.0f} s in all"
    )


def _listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def _nodes(laptop: Laptop) -> int:
    words = ["ray", "exec", str(laptop.config), "ray list nodes --filter state=ALIVE --format json"]
    done = subprocess.run(words, cwd=ROOT, env=laptop.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S)
    return done.stdout.count('"node_id"')
