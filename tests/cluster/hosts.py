"""Machines made of namespaces on one Linux box: each its own addresses, processes, host name, home, /tmp/ray and /dev/shm, and an sshd.

    with Hosts(3, folder) as hosts: …       hosts.addresses, hosts.key

Needs root, iproute2, util-linux, openssh-server and rsync; `lacking` says what is missing. Everything goes when the block ends, and with
this process when it is killed: each machine's first process dies with it, and takes the machine's other processes along. What a killed
process leaves (names of networks, no processes) the next one removes.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

NET, BRIDGE, PREFIX = "10.77.0", "antidote0", "antidote-h"
TOOLS = {"ip": "iproute2", "unshare": "util-linux", "sshd": "openssh-server", "ssh": "openssh-client", "rsync": "rsync"}
UP_S = 30.0


def lacking() -> str:
    """What this machine lacks, in words; "" where hosts can be made."""
    if sys.platform != "linux":
        return "namespaces are Linux's"
    if os.geteuid() != 0:
        return "root is needed to make network namespaces"
    missing = [package for tool, package in TOOLS.items() if not which(tool)]
    if missing:
        return f"missing: {', '.join(missing)}"
    if sys.prefix == sys.base_prefix:
        return "run it from a virtual environment: the machines take theirs from it"
    probe = subprocess.run(["unshare", "--net", "--pid", "--mount", "--fork", "true"], capture_output=True, text=True)
    return "" if probe.returncode == 0 else f"namespaces are not allowed here: {probe.stderr.strip()}"


def which(tool: str) -> str | None:
    return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def run(*words: str, check: bool = True) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Hosts:
    """`count` machines below `folder`; the rest of the file system they share with this one, as over NFS."""

    def __init__(self, count: int, folder: Path, seen: Sequence[Path] = ()) -> None:
        """`seen`: directories that every machine must see although they may lie below the home, which each has of its own."""
        self.count, self.folder = count, folder
        self.seen = [*seen, Path(sys.base_prefix), Path(sys.prefix)]
        self.addresses = [f"{NET}.{i + 1}" for i in range(count)]
        self.key = folder / "ssh" / "id"
        self.processes: list[subprocess.Popen[bytes]] = []

    def home(self, i: int) -> Path:
        return self.folder / f"{i}" / "home"

    def __enter__(self) -> Hosts:
        try:
            self._begin()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _begin(self) -> None:
        clean()
        (self.folder / "ssh").mkdir(parents=True)
        os.makedirs("/run/sshd", exist_ok=True)
        for name in ("id", "hostkey"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "ssh" / name))
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "address", "add", f"{NET}.254/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        for i in range(self.count):
            self._machine(i)
        until = time.monotonic() + UP_S
        for i, address in enumerate(self.addresses):
            while not answers(address):
                if time.monotonic() > until or self.processes[i].poll() is not None:
                    raise RuntimeError(f"sshd of {address}: {(self.folder / str(i) / 'log').read_text()[-2000:]}")
                time.sleep(0.1)

    def _machine(self, i: int) -> None:
        name, link, here = f"{PREFIX}{i + 1}", f"antidote-v{i + 1}", self.folder / str(i)
        run("ip", "netns", "add", name)
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "link", "set", link, "master", BRIDGE, "up")
        # The route: Ray takes the address that would lead to the internet for the node's own, and 127.0.0.1 where there is none.
        route = ("route", "add", "default", "via", f"{NET}.254")
        up = [("link", "set", "eth0", "up"), ("link", "set", "lo", "up")]
        for words in (("address", "add", f"{self.addresses[i]}/24", "dev", "eth0"), *up, route):
            run("ip", "-n", name, *words)
        home = Path.home()
        mounts = []
        for path in dict.fromkeys(path.resolve() for path in self.seen):
            if path.is_relative_to(home):
                target = self.home(i) / path.relative_to(home)
                target.mkdir(parents=True, exist_ok=True)
                mounts.append(f"mount --rbind '{path}' '{target}'")
        (here / "ray").mkdir(parents=True)
        (self.home(i) / "antidote").mkdir(parents=True, exist_ok=True)
        (self.home(i) / "antidote" / "venv").symlink_to(sys.prefix)  # so the pins are there, and pip has only to find them
        keys = self.folder / "ssh"
        sshd = "\n".join(
            [
                f"ListenAddress {self.addresses[i]}:22",
                f"HostKey {keys}/hostkey",
                f"AuthorizedKeysFile {keys}/id.pub",
                "StrictModes no",
                "PermitRootLogin prohibit-password",
                "PasswordAuthentication no",
                "UsePAM no",
                "UseDNS no",
                "PidFile none",
                "SetEnv PIP_NO_INDEX=1 RAY_worker_niceness=0 OMP_NUM_THREADS=1",  # a pin that is not met is an error, not a download
            ]
        )
        (here / "sshd.conf").write_text(sshd + "\n")
        begin = [
            f"hostname antidote-{i + 1}",
            "mount --make-rprivate /",
            f"mkdir -p /tmp/ray; mount --bind '{here}/ray' /tmp/ray",
            *mounts,
            f"mount --rbind '{self.home(i)}' '{home}'",
            "mount -t tmpfs -o size=2g tmpfs /dev/shm",
            f"exec {which('sshd')} -D -e -f '{here}/sshd.conf'",
        ]
        (here / "begin.sh").write_text("set -e\n" + "\n".join(begin) + "\n")
        words = ["ip", "netns", "exec", name, "unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with (here / "log").open("wb") as log:
            command = [*words, "bash", str(here / "begin.sh")]
            self.processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die_with_parent))

    def inside(self, i: int, *words: str) -> str:
        """A command's output on a machine, over SSH as a person would have it."""
        options = ["-i", str(self.key), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
        return run("ssh", *options, f"root@{self.addresses[i]}", *words, check=False)

    def ray_processes(self) -> int:
        """Ray's daemons on all machines together."""
        return sum(len(self.inside(i, "pgrep -f '[r]aylet/raylet|[g]cs_server|[r]ay/dashboard'").split()) for i in range(self.count))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self.processes:
            process.kill()  # --kill-child: the first process of the machine, and with it all others
        for process in self.processes:
            process.wait(timeout=30)
        clean()


def answers(address: str) -> bool:
    try:
        with socket.create_connection((address, 22), timeout=1):
            return True
    except OSError:
        return False


def clean() -> None:
    """Remove what an earlier run left. RuntimeError where its machines still live."""
    names = [line.split()[0] for line in run("ip", "netns", "list", check=False).splitlines() if line.startswith(PREFIX)]
    alive = [name for name in names if run("ip", "netns", "pids", name, check=False).split()]
    until = time.monotonic() + 20
    while alive and time.monotonic() < until:  # a killed machine's processes take a moment
        time.sleep(0.2)
        alive = [name for name in names if run("ip", "netns", "pids", name, check=False).split()]
    if alive:
        raise RuntimeError(f"machines of another run are alive: {', '.join(alive)} (`ip netns pids {alive[0]}`)")
    for name in names:
        run("ip", "netns", "delete", name, check=False)
    run("ip", "link", "delete", BRIDGE, check=False)
