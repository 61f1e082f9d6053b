"""What a finished run leaves, that it is not paid for twice, and that neither workers nor streaming change what it computes."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from .conftest import EXACT, TINY, Antidote

pytestmark = pytest.mark.ray


def test_a_run_leaves_all_it_should_and_is_not_paid_for_twice(antidote: Antidote) -> None:
    result = antidote.result("roclip", *TINY)
    folder = Path(result["run"])
    # 140 held-out scenes are 10 of each of 14 classes; the target's own 10 do not count.
    assert (result["asr/targeted/total"], result["asr/stripes/total"]) == (16, 130)
    assert result["poison/count"] == 16 * 4 + 30
    assert result["poison/rate"] == pytest.approx(94 / (320 + 64))
    rounds = [r for r in antidote.records() if r["kind"] == "match"]
    assert [r["epoch"] for r in rounds] == [2, 4]
    assert all(r["pool"] == 64 and r["pairs"] == 384 and r["poisoned"] == 94 for r in rounds)
    assert pq.read_table(folder / "rounds" / "e002.parquet").num_rows == 384
    assert pq.read_table(folder / "manifest.parquet").num_rows == 94
    page = (folder / "report.html").read_text()
    assert "RoCLIP" in page and "<script src" not in page

    stored = sqlite3.connect(antidote.runs / "mlflow.db")
    assert stored.execute("select count(*) from runs where status = 'FINISHED'").fetchone() == (1,)
    assert stored.execute("select value from params where key = 'defense.every'").fetchone() == ("2",)

    written = (folder / "result.json").stat().st_mtime_ns
    code, out, _ = antidote.run("run", str(folder / "recipe.json"))
    assert code == 0 and "RoCLIP" in out
    assert (folder / "result.json").stat().st_mtime_ns == written, "a finished identity ran again"


def test_two_workers_compute_what_one_does(antidote: Antidote, tmp_path: Path) -> None:
    words = ("roclip", *TINY, "train.epochs=2", "track.uri=none", "cluster.match_cpus=0.25", "cluster.cpus=0.5")
    one = antidote.result(*words)
    losses = [r["loss"] for r in antidote.records() if r["kind"] == "train"]
    two_folder = tmp_path / "two"
    two_folder.mkdir()
    other = Antidote(two_folder)
    two = other.result(*words, "cluster.workers=2", "cluster.match_actors=2")
    assert two["workers"] == 2
    assert [r["loss"] for r in other.records() if r["kind"] == "train"] == pytest.approx(losses, rel=2e-3)
    assert two["zeroshot/top1"] == pytest.approx(one["zeroshot/top1"], abs=0.05)


def test_a_streamed_set_trains_poisoned_and_scored_alike(antidote: Antidote) -> None:
    result = antidote.result("roclip", *TINY, "train.epochs=2", "track.uri=none", "data.stream=always", "cluster.cpus=0.5")
    first = antidote.records()
    assert result["asr/stripes/total"] == 130
    assert [r["pairs"] for r in first if r["kind"] == "match"] == [384]


def test_members_of_a_suite_run_at_once_and_get_the_numbers_they_get_alone(antidote: Antidote, tmp_path: Path) -> None:
    words = [w for w in TINY if not w.startswith("defense.")] + [
        "train.epochs=5",
        "track.uri=none",
        "cluster.cpus=0.7",  # the machine to its last share: nothing is left for what would ask for a CPU beside these
        "cluster.match_cpus=0.3",
    ]
    code, out, err = antidote.run("run", "demo", *words)
    assert code == 0, err
    assert "4 members, 2 at once" in err and "4/4 run" in err
    assert all(name in out for name in ("No defence", "Augmentation only", "RoCLIP", "OTCCLIP"))
    assert len(antidote.results()) == 4 and list(antidote.runs.glob("demo-????????/report.html"))
    (tmp_path / "alone").mkdir()
    alone = Antidote(tmp_path / "alone")
    [member] = [r for r in antidote.results() if r["recipe"] == "demo-otcclip"]
    again = alone.result(str(Path(member["run"]) / "recipe.json"), "track.uri=none", f"cluster.runs={alone.runs}")
    assert {k: member[k] for k in EXACT if k in member} == {k: again[k] for k in EXACT if k in again}
    losses = [[r["loss"] for r in one.records() if r["kind"] == "train"] for one in (antidote, alone)]
    assert len(losses[0]) == 20 and set(losses[1]) <= set(losses[0])
    prints = {json.loads((Path(r["run"]) / "data.json").read_text())["fingerprint"] for r in (member, again)}
    assert len(prints) == 1
