"""What a finished run leaves, that it is not paid for twice, and that neither workers nor streaming change what it computes."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from .conftest import TINY, Antidote

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Antidote, dict[str, Any]]:
    """A run to its end with one worker, and its result."""
    antidote = Antidote(tmp_path_factory.mktemp("whole"))
    return antidote, antidote.result("roclip", *TINY)


def test_a_run_leaves_all_it_should_and_is_not_paid_for_twice(whole: tuple[Antidote, dict[str, Any]]) -> None:
    antidote, result = whole
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


def test_two_workers_compute_what_one_does(antidote: Antidote, whole: tuple[Antidote, dict[str, Any]]) -> None:
    shares = ("cluster.workers=2", "cluster.match_actors=2", "cluster.match_cpus=0.25", "cluster.cpus=0.5")
    (alone, one), two = whole, antidote.result("roclip", *TINY, "track.uri=none", *shares)
    assert two["workers"] == 2
    losses = [[r["loss"] for r in run.records() if r["kind"] == "train"] for run in (alone, antidote)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert two["zeroshot/top1"] == pytest.approx(one["zeroshot/top1"], abs=0.05)


def test_a_streamed_set_trains_poisoned_and_scored_alike(antidote: Antidote) -> None:
    result = antidote.result("roclip", *TINY, "train.epochs=2", "track.uri=none", "data.stream=always", "cluster.cpus=0.5")
    first = antidote.records()
    assert result["asr/stripes/total"] == 130
    assert [r["pairs"] for r in first if r["kind"] == "match"] == [384]


def test_members_of_a_suite_run_at_once_and_disturb_one_another_in_nothing(antidote: Antidote) -> None:
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
    results = {r["recipe"].removeprefix("demo-"): Path(r["run"]) for r in antidote.results()}
    assert len(results) == 4 and list(antidote.runs.glob("demo-????????/report.html"))
    lines = {name: [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for name, run in results.items()}
    losses = {name: [r["loss"] for r in some if r["kind"] == "train"] for name, some in lines.items()}
    # Four warm-up epochs on the same augmented views: what ran beside them was each time another member.
    assert losses["augmented"][:4] == losses["roclip"][:4] == losses["otcclip"][:4] != losses["clip"][:4]
    assert len({losses[name][4] for name in losses}) == 4
    assert [r["epoch"] for name in ("roclip", "otcclip") for r in lines[name] if r["kind"] == "match"] == [5, 5]
    prints = {json.loads((run / "data.json").read_text())["fingerprint"] for run in results.values()}
    assert len(prints) == 1
