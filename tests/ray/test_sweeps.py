"""A sweep on a real Ray, killed with kill -9 in the middle and gone on with: no trial repeated, none lost."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from orchestrate import sweepdir

from .conftest import TINY, Antidote, kill

pytestmark = pytest.mark.ray
# One epoch without matching: the sweep is what is tested. A batch of 4,096 is more than there is: those trials fail.
KEPT = [word for word in TINY if not word.startswith(("attack", "defense.", "train.epochs", "train.batch"))]
WORDS = ("clip-stripes", *KEPT, "train.epochs=1", "attack.count=30", "evaluate.probe=false", "train.batch=64,4096", "seed=0..2")


def test_a_killed_sweep_goes_on_and_pays_nothing_twice(antidote: Antidote) -> None:
    process = antidote.start("sweep", *WORDS)

    def begun() -> list[dict[str, Any]]:
        return [json.loads(line) for f in antidote.runs.glob("*-sweep-*/trials.jsonl") for line in f.read_text().splitlines()]

    antidote.until(lambda: antidote.results() and begun()[-1]["state"] == "running", process)
    kill([process.pid])
    process.communicate(timeout=60)
    [folder] = antidote.runs.glob("*-sweep-*")
    before = {result["identity"]: Path(result["run"], "result.json").stat().st_mtime_ns for result in antidote.results()}
    assert 1 <= len(before) < 3

    code, out, err = antidote.run("sweep", str(folder), "--resume")
    assert code == 1 and "3 of 6 trials failed" in err, err
    assert str(folder) in out and re.search(r"\d trials? at once", err) and "best so far" in err
    states = {event.label: event.state.replace("skipped", "done") for event in sweepdir.events(folder).values()}
    assert states == {f"train.batch={b} seed={s}": "done" if b == 64 else "failed" for b in (64, 4096) for s in range(3)}
    failed = [event for event in sweepdir.events(folder).values() if event.state == "failed"]
    assert all("train.batch=4096" in event.label and "lower it, or use more data" in event.reason for event in failed)

    results = antidote.results()
    assert len(results) == 3 and {result["seed"] for result in results} == {0, 1, 2}
    for result in results:
        if result["identity"] in before:
            assert Path(result["run"], "result.json").stat().st_mtime_ns == before[result["identity"]], "a finished trial ran again"
        lines = [json.loads(line) for line in Path(result["run"], "metrics.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in lines if line["kind"] == "train"] == [1]

    store = sqlite3.connect(antidote.runs / "mlflow.db")
    [parent] = store.execute("select run_uuid from tags where key = 'antidote.kind' and value = 'sweep'").fetchall()
    children = store.execute("select run_uuid from tags where key = 'mlflow.parentRunId' and value = ?", parent).fetchall()
    assert len(children) == 6
    done = store.execute("select count(*) from runs where status = 'FINISHED' and run_uuid != ?", parent).fetchone()
    assert done == (3,)
    assert "train.batch" in (folder / "report.html").read_text()


def test_a_sweep_told_to_end_ends_as_by_ctrl_c(antidote: Antidote) -> None:
    process = antidote.start("sweep", *WORDS, "track.uri=none")
    antidote.until(lambda: any('"running"' in f.read_text() for f in antidote.runs.glob("*-sweep-*/trials.jsonl")), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "goes on from the last checkpoint" in err
    assert "SIGTERM received" not in err, "the stack of Ray's library in C++"
