"""Whole runs on a real Ray, each in a process of its own, as a user starts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "data.size=320",
    "data.heldout=140",
    "train.epochs=4",
    "train.batch=64",
    "train.warmup=4",
    "train.precision=fp32",
    "evaluate.precision=fp32",
    "evaluate.probe_size=200",
    "attack.targeted.copies=4",
    "attack=targeted+stripes",
    "attack.stripes.count=30",
    "defense.every=2",
    "defense.warmup=0",
    "defense.matched=embedding",
    "defense.move=1.0",
    "defense.pool_size=64",
    "cluster.threads=1",
)
EXACT = ("zeroshot/top1", "retrieval/r1", "asr/targeted/hits", "asr/stripes/hits", "probe/top1")


class Antidote:
    """The command line in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, folder / "runs"

    def start(self, *words: str) -> subprocess.Popen[str]:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        # A test's own override replaces that of TINY; an option's value may well be the verb's name again.
        last = {(word.partition("=")[0] if "=" in word else i): word for i, word in enumerate(words)}
        command = [sys.executable, "-m", "orchestrate", *last.values()]
        return subprocess.Popen(command, cwd=self.folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, *words: str, timeout: float = 600) -> tuple[int, str, str]:
        process = self.start(*words)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return process.returncode, out, err

    def result(self, *words: str) -> dict[str, Any]:
        """Run to the end; the one result in the runs folder that this made or found."""
        code, _, err = self.run("run", *words)
        assert code == 0, err
        return self.results()[-1]

    def results(self) -> list[dict[str, Any]]:
        files = sorted(self.runs.glob("*/result.json"), key=lambda f: f.stat().st_mtime)
        return [json.loads(f.read_text()) for f in files]

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for f in self.runs.glob("*/metrics.jsonl") for line in f.read_text().splitlines() if line]

    def until(self, ready: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 300) -> Any:
        """The first true value of `ready`; fails if the process ends or the time is up before."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := ready():
                return value
            assert process.poll() is None, f"the run ended early:\n{process.communicate()[1]}"
            time.sleep(0.05)
        process.kill()
        raise AssertionError("what the test waits for did not happen")


@pytest.fixture
def antidote(tmp_path: Path) -> Antidote:
    return Antidote(tmp_path)


def processes(title: str, root: int) -> list[int]:
    """Living processes below pid `root` whose command line begins with `title` (Ray renames its workers)."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                titles[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue

    def below(pid: int) -> bool:
        while pid in parents and pid != root:
            pid = parents[pid]
        return pid == root

    return [pid for pid, name in titles.items() if name.startswith(title) and below(pid)]


def kill(pids: Sequence[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
