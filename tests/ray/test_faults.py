"""Killed anywhere, a run ends with the numbers of an undisturbed one."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import EXACT, TINY, Antidote, kill, processes

pytestmark = pytest.mark.ray
WORDS = ("roclip", *TINY, "track.uri=none")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    antidote = Antidote(tmp_path_factory.mktemp("undisturbed"))
    result = antidote.result(*WORDS)
    return {key: result[key] for key in EXACT}


def finished(antidote: Antidote) -> dict[str, float]:
    result = antidote.results()[-1]
    assert [r["epoch"] for r in antidote.records() if r["kind"] == "train"] == [1, 2, 3, 4], "an epoch is logged twice or not at all"
    return {key: result[key] for key in EXACT}


def test_a_killed_training_worker(antidote: Antidote, undisturbed: dict[str, float]) -> None:
    process = antidote.start("run", *WORDS)
    antidote.until(lambda: any(r.get("epoch") == 1 for r in antidote.records()), process)
    kill(antidote.until(lambda: processes("ray::RayTrainWorker", process.pid), process))
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert finished(antidote) == undisturbed


def test_a_killed_matching_actor(antidote: Antidote, undisturbed: dict[str, float]) -> None:
    process = antidote.start("run", *WORDS)
    antidote.until(lambda: any(r.get("epoch") == 1 for r in antidote.records()), process)
    kill(antidote.until(lambda: processes("ray::MapWorker", process.pid), process))
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert finished(antidote) == undisturbed


def test_a_killed_driver_goes_on_when_run_again(antidote: Antidote, undisturbed: dict[str, float]) -> None:
    process = antidote.start("run", *WORDS)
    antidote.until(lambda: any(r.get("epoch") == 2 for r in antidote.records()), process)
    kill([process.pid])
    process.communicate(timeout=60)
    assert not antidote.results()
    before = max(r["epoch"] for r in antidote.records())
    code, _, err = antidote.run("run", *WORDS)
    assert code == 0, err
    assert finished(antidote) == undisturbed
    assert before >= 2


def test_records_that_a_killed_controller_did_not_write_are_written_on_going_on(antidote: Antidote, undisturbed: dict[str, float]) -> None:
    """Killed after the checkpoint of an epoch and before its lines, as happens on a busy machine; here the lines are taken away."""
    process = antidote.start("run", *WORDS)
    antidote.until(lambda: any(r.get("epoch") == 2 and r["kind"] == "train" for r in antidote.records()), process)
    kill([process.pid])
    process.communicate(timeout=60)
    [journal] = antidote.runs.glob("*/metrics.jsonl")
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(line for line in lines if '"epoch": 1' in line))
    code, _, err = antidote.run("run", *WORDS)
    assert code == 0, err
    assert finished(antidote) == undisturbed
    assert [r["epoch"] for r in antidote.records() if r["kind"] == "match"] == [2, 4]


def test_what_the_user_can_mend_is_one_message(antidote: Antidote, tmp_path: Path) -> None:
    def refused(*words: str) -> str:
        code, _, err = antidote.run("run", *words, timeout=120)
        assert code == 1, err
        assert "Traceback" not in err
        return err

    assert "did you mean" in refused("roclip", "defense.evry=1").lower()
    text = refused("roclip", *TINY, "cluster.workers=64", "track.uri=none")
    assert "64 training workers" in text and "cluster.workers=1" in text
    assert "127.0.0.1:9" in refused("roclip", *TINY, "track.uri=http://127.0.0.1:9")
