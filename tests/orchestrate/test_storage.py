"""Storage against real file systems: a folder, and an S3 server that is stopped and started."""

from __future__ import annotations

import json
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs

from orchestrate import journal, rundir
from orchestrate.recipe import Recipe, from_dict
from orchestrate.storage import CHECKPOINTS, PART, Patient, Store, patiently
from tests.s3 import KEYS, S3


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    server = S3()
    yield server
    server.stop()


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The server with an empty bucket."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    server.empty()
    return server


def recipe(tmp_path: Path, storage: str, retry_s: float = 20.0) -> Recipe:
    return from_dict(
        {"name": "r"}, {"cluster.runs": str(tmp_path / "runs"), "cluster.storage": storage, "cluster.storage_retry_s": retry_s}
    ).recipe


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    root = str(tmp_path / "shared") if request.param == "folder" else request.getfixturevalue("s3").uri()
    return Store.of(recipe(tmp_path, root))


def run_of(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        file = folder / name.replace("__", "/").replace("_json", ".json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_a_run_pushed_by_one_host_is_pulled_by_another(store: Store, tmp_path: Path) -> None:
    one = run_of(tmp_path / "one", recipe_json="{}", rounds__e002="pairs", checkpoints__state="big")
    (one / journal.LOCK).touch()
    store.push(one)
    there = run_of(tmp_path / "two", recipe_json="old")
    store.pull(there)
    assert {f.relative_to(there).as_posix(): f.read_text() for f in there.rglob("*") if f.is_file()} == {
        "recipe.json": "{}",
        "rounds/e002": "pairs",
    }
    store.push(one, ["recipe.json", "missing"])
    assert store.read("recipe.json") == b"{}" and store.read("missing") is None
    store.remove("rounds")
    assert store.read("rounds/e002") is None and store.read("recipe.json") == b"{}"
    store.remove()
    store.remove()
    assert store.read("recipe.json") is None


def test_what_ray_train_does_with_a_storage_works_after_pickling(store: Store, tmp_path: Path) -> None:
    """Marker, directory, checkpoint by `copy_files`, snapshot, download, deletion: in another process, which gets it pickled."""
    files, home = pickle.loads(pickle.dumps(store.filesystem)), f"{store.home}/{CHECKPOINTS}"
    assert files == store.filesystem
    files.create_dir(f"{home}/one")
    fs.copy_files(str(run_of(tmp_path / "ckpt", state="x" * 100_000)), f"{home}/one", destination_filesystem=files)
    with files.open_output_stream(f"{home}/snapshot.json") as file:
        file.write(b"[1]")
    assert files.get_file_info(f"{home}/snapshot.json").size == 3
    (tmp_path / "back").mkdir()
    fs.copy_files(f"{home}/one", str(tmp_path / "back"), source_filesystem=files)
    assert (tmp_path / "back" / "state").read_text() == "x" * 100_000
    files.delete_dir(f"{home}/one")
    assert files.get_file_info(f"{home}/one/state").type == fs.FileType.NotFound


def test_a_file_half_written_is_not_seen(tmp_path: Path) -> None:
    files = fs.PyFileSystem(Patient(str(tmp_path), 1.0))
    file = files.open_output_stream(f"{tmp_path}/a")
    file.write(b"half")
    del file
    assert not list(tmp_path.iterdir())
    with files.open_output_stream(f"{tmp_path}/a") as file:
        file.write(b"whole")
    assert [f.name for f in tmp_path.iterdir()] == ["a"] and PART not in "a"


def test_storage_that_is_away_for_a_while_is_waited_for(s3: S3, tmp_path: Path) -> None:
    store = Store.of(recipe(tmp_path, s3.uri()))
    folder = run_of(tmp_path / "run", metrics="1")
    store.push(folder)
    s3.stop()
    threading.Timer(2.0, s3.start).start()
    started = time.monotonic()
    store.push(folder, ["metrics"])
    assert time.monotonic() - started > 1.5
    assert store.read("metrics") == b"1"


def test_storage_that_stays_away_is_an_error_that_says_so_in_time() -> None:
    started = time.monotonic()
    with pytest.raises(
        OSError, match=r"storage s3://b/runs has failed for 1 s \(cluster.storage_retry_s=0.9\).*No space.*goes on from the last"
    ):
        patiently("s3://b/runs?endpoint_override=x", 0.9, lambda: Path("/dev/full").write_text("x"))
    assert time.monotonic() - started < 2


def test_what_waiting_does_not_mend_is_refused_at_once(s3: S3, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(OSError, match=r"(?i)bucket"):
        Store.of(recipe(tmp_path, s3.uri("nobodys"))).push(run_of(tmp_path / "run", metrics="1"))
    with pytest.raises(ValueError, match=r"cluster.storage=ftp://host/x.*s3://bucket/path"):
        Store.of(recipe(tmp_path, "ftp://host/x")).read("a")
    with pytest.raises(ValueError, match=r"keep keys out of recipes") as refused:
        Store.of(recipe(tmp_path, "s3://key:secret@bucket/runs"))
    assert "secret" not in str(refused.value)
    assert time.monotonic() - started < 10


def test_an_objects_name_does_not_lead_out_of_the_runs_directory(s3: S3, tmp_path: Path) -> None:
    r = recipe(tmp_path, s3.uri())
    for key in (f"runs/{r.directory}/../../../evil", f"runs/{r.directory}/good"):
        s3.client.put_object(Bucket=s3.bucket, Key=key, Body=b"x")
    folder = tmp_path / "a" / "b" / "c"
    folder.mkdir(parents=True)
    Store.of(r).pull(folder)
    assert [f.name for f in tmp_path.rglob("*") if f.is_file()] == ["good"]


def test_a_result_of_another_host_is_found_and_one_of_another_identity_is_not(tmp_path: Path) -> None:
    storage = str(tmp_path / "shared")
    here, there = recipe(tmp_path / "here", storage), recipe(tmp_path / "there", storage)
    assert rundir.finished(here) is None
    folder = run_of(
        tmp_path / "there" / "runs" / there.directory, result_json=json.dumps({"identity": there.identity, "run": "/far", "x": 1})
    )
    Store.of(there).push(folder)
    result = rundir.finished(here)
    mine = tmp_path / "here" / "runs" / here.directory
    assert result == {"identity": here.identity, "run": str(mine), "x": 1} == json.loads((mine / "result.json").read_text())
    other = from_dict(here.as_dict(), {"seed": 5}).recipe
    run_of(Path(storage) / other.directory, result_json=json.dumps({"identity": "another"}))
    assert rundir.finished(other) is None


def test_a_run_that_went_on_elsewhere_is_fetched_and_one_that_is_newer_here_is_not(tmp_path: Path) -> None:
    r = recipe(tmp_path, str(tmp_path / "shared"))
    far, here = run_of(Path(tmp_path / "shared") / r.directory, **{journal.NAME: "1\n2\n"}), tmp_path / "runs" / r.directory
    for mine, expected in (("", "1\n2\n"), ("1\n", "1\n2\n"), ("1\n2\n3\n", "1\n2\n3\n")):
        if mine:
            run_of(here, **{journal.NAME: mine})
        with rundir.claimed(r) as folder:
            assert (folder / journal.NAME).read_text() == expected
    with rundir.claimed(r, fresh=True) as folder:
        assert [f.name for f in folder.iterdir() if f.name != journal.LOCK] == ["recipe.json"]
    assert not far.exists()
