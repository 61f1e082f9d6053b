"""Tracking against real MLflow stores: SQLite files and one real server that dies in the middle of a run."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrate import cli, journal, mlflow_uri, rundir, track
from orchestrate.recipe import from_dict
from orchestrate.track import Tracker

mlflow = pytest.importorskip("mlflow")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for the file: making its tables takes a second."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def points(tracker: Tracker, name: str) -> list[tuple[int, float]]:
    client = mlflow.MlflowClient(tracker.uri)
    return [(metric.step, metric.value) for metric in client.get_metric_history(tracker.run_id, name)]


def train(epoch: int, loss: float) -> dict[str, object]:
    return {"kind": "train", "epoch": epoch, "loss": loss, "robust": epoch % 2 == 0}


def test_a_whole_run(tmp_path: Path, store: str) -> None:
    parameters = {"defense.every": 2, "attack": None, "train.amp": True, "long": "x" * 2000, "odd+name": 1}
    parameters |= {f"p.{i}": i for i in range(250)}  # more than MLflow takes in a call
    tracker = Tracker.start(tmp_path / "run", store, "clip", parameters, {"mlflow.note.content": "hello"})
    tracker = pickle.loads(pickle.dumps(tracker))  # as it travels into the train controller
    tracker.log(train(1, 2.5) | {"lr": float("nan")}, step=10)
    tracker.log({"kind": "eval", "epoch": 1, "zeroshot/top1": 0.5, "asr/bad+nets": 1, "note": "text"}, step=10)
    (tmp_path / "run" / "result.json").write_text(json.dumps({"recipe": "clip", "asr/targeted": 0.25, "seed": 3}))
    (tmp_path / "run" / "recipe.json").write_text(json.dumps({"name": "clip", "seed": 3}))
    (tmp_path / "run" / "rounds").mkdir()
    (tmp_path / "run" / "rounds" / "2.parquet").write_bytes(b"table")
    paths = [tmp_path / "run" / name for name in ("recipe.json", "rounds", "model")]  # there is no model
    tracker.finish("finished", paths)

    client = mlflow.MlflowClient(store)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.tags["mlflow.note.content"] == "hello"
    logged = run.data.params
    assert len(logged) == 255 and logged["defense.every"] == "2" and logged["p.249"] == "249"
    assert (logged["attack"], logged["train.amp"], len(logged["long"])) == ("none", "true", 500)
    assert points(tracker, "train/loss") == [(10, 2.5)] and points(tracker, "train/robust") == [(10, 0.0)]
    assert points(tracker, "asr/bad_nets") == [(10, 1.0)] and points(tracker, "epoch")[0] == (10, 1.0)
    assert points(tracker, "asr/targeted") == [(10, 0.25)] and points(tracker, "seed") == [(10, 3.0)]
    assert {item.path for item in client.list_artifacts(tracker.run_id)} == {"recipe.json", "rounds"}
    assert track.load_recipe(store, tracker.run_id) == {"name": "clip", "seed": 3}
    place = client.get_experiment_by_name("clip").artifact_location
    assert place == (mlflow_uri.sqlite_path(store).parent / "mlartifacts" / "clip").as_uri()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["lr"] == "NaN" and lines[0]["step"] == 10 and lines[1]["note"] == "text"


def test_resume_takes_up_the_same_run_and_counts_nothing_twice(tmp_path: Path, store: str) -> None:
    first = Tracker.start(tmp_path / "run", store, "resumed", {"seed": 1})
    for epoch in (1, 2, 3):
        first.log(train(epoch, 1.0 / epoch), step=epoch)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "ep')  # killed while writing
    again = Tracker.start(tmp_path / "run", store, "resumed", {"seed": 1, "new": 2})
    assert again.run_id == first.run_id
    assert again.truncate_after(2) == 2  # epoch 3, and the torn line
    again.log(train(3, 0.9), step=3)
    records = journal.read(tmp_path / "run" / "metrics.jsonl")
    assert [(r["epoch"], r["loss"]) for r in records] == [(1, 1.0), (2, 0.5), (3, 0.9)]
    assert [step for step, _ in points(again, "train/loss")] == [1, 2, 3, 3] and points(again, "train/loss")[-1] == (
        3,
        0.9,
    )
    run = mlflow.MlflowClient(store).get_run(again.run_id)
    assert run.data.params == {"seed": "1"} and run.data.tags["antidote.resumed_after_epoch"] == "2"
    assert again.truncate_after(3) == 0 and again.replay() == 0
    mlflow.MlflowClient(store).delete_run(again.run_id)
    other = Tracker.start(tmp_path / "run", store, "resumed", {"seed": 1})  # deleted by hand: everything goes to a new one
    assert other.run_id != again.run_id and other.replay() == 3 and len(points(other, "train/loss")) == 3


@pytest.mark.parametrize("mend", ["run", "sync"])
def test_a_run_killed_between_its_result_and_the_end_of_its_mlflow_run_is_ended_later(tmp_path: Path, store: str, mend: str) -> None:
    """By the next `antidote run` of the finished identity, or by `antidote track sync`; once."""
    recipe = from_dict({"name": "r"}, {"cluster.runs": str(tmp_path), "track.uri": store}).recipe
    folder = tmp_path / recipe.directory
    tracker = Tracker.start(folder, store, "killed", {}, {})
    tracker.log(train(1, 2.5), step=10)
    rundir.write_json(folder / rundir.RESULT, {"identity": recipe.identity, "run": str(folder), "asr/targeted": 0.25})
    status = lambda: mlflow.MlflowClient(store).get_run(tracker.run_id).info.status
    assert status() == "RUNNING"
    for _ in range(2):
        if mend == "run":
            result = rundir.finished(recipe)
            assert result is not None
            rundir.complete(recipe, Path(result["run"]))
        else:
            assert cli.main(["track", "sync", str(folder)]) == 0
        assert status() == "FINISHED" and Tracker.load(folder).ended
        assert points(tracker, "asr/targeted") == [(10, 0.25)]


@pytest.mark.parametrize("way", ["environment", "option"])
def test_a_run_whose_address_holds_a_password_is_synced_with_the_whole_address(
    tmp_path: Path, store: str, way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A store in a file stands for the database: what is behind the ? is a password to us and nothing to SQLite."""
    whole, folder = f"{store}?password=hush", tmp_path / "run"
    tracker = Tracker.start(folder, store, "synced", {}, {})
    tracker.silent_until = time.time() + 1000
    tracker.log(train(1, 0.5), step=4)
    state = json.loads((folder / "mlflow.json").read_text())
    (folder / "mlflow.json").write_text(json.dumps({**state, "uri": mlflow_uri.masked(whole)}))
    asked: list[str] = []
    monkeypatch.setattr("orchestrate.track._client", lambda uri: asked.append(uri) or mlflow.MlflowClient(store))
    assert cli.main(["track", "sync", str(folder)]) == 1
    said = capsys.readouterr().err
    assert "MLFLOW_TRACKING_URI or with --uri" in said and "track.uri" not in said and not asked
    monkeypatch.setenv("MLFLOW_TRACKING_URI", whole if way == "environment" else "sqlite:////another.db?password=hush")
    assert cli.main(["track", "sync", str(folder), *(["--uri", whole] if way == "option" else [])]) == 0
    assert "1 lines sent" in capsys.readouterr().out and {uri.partition("?")[2] for uri in asked} <= {"password=hush", ""}
    assert points(tracker, "train/loss") == [(4, 0.5)]


def test_a_sync_that_nobody_answers_names_its_own_option(tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    Tracker.start(tmp_path / "run", store, "silent", {}, {}).log(train(1, 0.5), step=4)
    assert cli.main(["track", "sync", str(tmp_path / "run"), "--uri", "http://me:hush@127.0.0.1:9"]) == 1
    said = capsys.readouterr().err
    assert "give another with --uri" in said and "track.uri" not in said and "hush" not in said
    (tmp_path / "plain").mkdir()
    assert cli.main(["track", "sync", str(tmp_path / "plain"), "--uri", store]) == 1
    assert "track.uri=none: no MLflow knows it" in capsys.readouterr().err


def test_none_keeps_the_file_only_and_can_be_synced_later(tmp_path: Path, store: str) -> None:
    tracker = Tracker.start(tmp_path / "run", "none", "x", {})
    tracker.log(train(1, 0.5), step=4)
    tracker.finish("finished")
    assert tracker.run_id == "" and not (tmp_path / "run" / "mlflow.json").exists() and tracker.replay() == 0
    late = Tracker.start(tmp_path / "run", store, "x", {"seed": 1})
    assert late.replay() == 1 and points(late, "train/loss") == [(4, 0.5)]


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:9", "http://", "foo://x", "./mlruns", "postgresql://u:secret@127.0.0.1:9/db", "sqlite://"]
)
def test_an_address_where_nobody_answers_is_refused_at_once(tmp_path: Path, uri: str) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match="MLflow") as caught:
        Tracker.start(tmp_path / "run", uri, "x", {})
    text = str(caught.value)
    assert "track.uri=none" in text and "\n" not in text and "secret" not in text
    assert mlflow_uri.masked(uri) in text and time.monotonic() - began < 10


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database, " * 100)
    with pytest.raises(ValueError, match=r"track\.uri=none"):
        Tracker.start(tmp_path / "run", None, "x", {})


def test_addresses_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert mlflow_uri.resolve("", Path("runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert mlflow_uri.resolve("sqlite:///a.db", tmp_path) == f"sqlite:///{tmp_path}/a.db"
    assert mlflow_uri.resolve(f"sqlite:///{tmp_path}/a.db", Path("/")) == f"sqlite:///{tmp_path}/a.db"
    assert mlflow_uri.resolve("NONE", tmp_path) == "none"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000/")
    assert mlflow_uri.resolve(None, tmp_path) == "http://host:5000"


def test_ui_serves_the_database_locally(store: str) -> None:
    argv = track.ui(store, 5055)
    assert argv[argv.index("--backend-store-uri") + 1] == store and argv[argv.index("--host") + 1] == "127.0.0.1"
    with pytest.raises(ValueError, match="browser"):
        track.ui("http://host:5000", 1)


@contextlib.contextmanager
def server(store: str, port: int = 0) -> Iterator[str]:
    """MLflow's own server application in a thread: the real protocol, without the half minute its processes take to start."""
    from mlflow.server import app
    from werkzeug.serving import make_server

    http = make_server("127.0.0.1", port, app, threaded=True)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


@pytest.fixture
def served(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The database behind a `server`, with a place for artefacts."""
    monkeypatch.setenv("_MLFLOW_SERVER_FILE_STORE", store)
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", "mlflow-artifacts:/")
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_DESTINATION", str(tmp_path / "art"))
    monkeypatch.setenv("_MLFLOW_SERVER_SERVE_ARTIFACTS", "true")
    return store


def test_eight_runs_write_to_one_server_at_once_and_nothing_is_lost(tmp_path: Path, served: str) -> None:
    def write(i: int) -> Tracker:
        run = tmp_path / f"run-{i}"
        tracker = Tracker.start(run, uri, "crowd", {"seed": i}, {"antidote.identity": str(i)})
        for epoch in range(1, 6):
            tracker.log(train(epoch, i + epoch / 10), step=epoch)
        (run / "result.json").write_text(json.dumps({"seed": i, "zeroshot/top1": i / 8}))
        tracker.finish("finished", [run / "result.json"])
        return tracker

    with server(served) as uri:
        with ThreadPoolExecutor(8) as pool:
            trackers = list(pool.map(write, range(8)))
        client = mlflow.MlflowClient(uri)
        for i, tracker in enumerate(trackers):
            assert points(tracker, "train/loss") == [(epoch, i + epoch / 10) for epoch in range(1, 6)]
            run = client.get_run(tracker.run_id)
            assert (run.info.status, run.data.params["seed"], run.data.metrics["zeroshot/top1"]) == ("FINISHED", str(i), i / 8)
            assert [item.path for item in client.list_artifacts(tracker.run_id)] == ["result.json"]
    assert len({tracker.run_id for tracker in trackers}) == 8


def test_a_server_that_dies_mid_run_gets_everything_afterwards(tmp_path: Path, served: str, caplog: pytest.LogCaptureFixture) -> None:
    store, run = served, tmp_path / "run"
    with server(store) as uri:
        tracker = Tracker.start(run, uri, "served", {"seed": 1})
        tracker.log(train(1, 3.0), step=1)
    (run / "recipe.json").write_text('{"seed": 1}')
    began = time.monotonic()
    for epoch in (2, 3, 4):
        tracker.log(train(epoch, 1.0), step=epoch)
    tracker.finish("killed", [run / "recipe.json"])
    assert time.monotonic() - began < 12
    assert sum("track sync" in record.message for record in caplog.records) == 1  # warned once
    assert len(journal.read(run / "metrics.jsonl")) == 4
    with pytest.raises(ValueError, match="does not answer"):
        Tracker.load(run).replay()
    direct = Tracker.load(run, uri=store)  # the server's database, read without it: it has what came before the end
    assert points(direct, "train/loss") == [(1, 3.0)]
    with server(store, port=int(uri.rpartition(":")[2])):
        assert Tracker.load(run).replay() == 3
        assert track.load_recipe(uri, tracker.run_id) == {"seed": 1}
        with pytest.raises(ValueError, match="no run"):
            track.load_recipe(uri, "0" * 32)
    assert points(direct, "train/loss") == [(1, 3.0), (2, 1.0), (3, 1.0), (4, 1.0)]
    assert mlflow.MlflowClient(store).get_run(direct.run_id).info.status == "KILLED"


def test_journal_survives_torn_lines_and_stays_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    journal.append(path, {"a": float("inf"), "b": "ß"})
    path.write_bytes(path.read_bytes() + b'{"torn": ')
    journal.append(path, {"c": 1})
    assert journal.read(path) == [{"a": "Infinity", "b": "ß"}, {"c": 1}]
    assert float(journal.read(path)[0]["a"]) == float("inf")


def test_log_never_raises(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker.start(tmp_path / "run", "none", "x", {})
    tracker.log({"kind": "train", "thing": object()}, step=1)
    os.rmdir(tmp_path / "run")
    tracker.log(train(1, 1.0), step=1)
    assert len(caplog.records) == 2
