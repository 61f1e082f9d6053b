"""Run directories as text and back; what a hostile cluster sends stays in the folder."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from orchestrate import archive, sweepdir
from orchestrate.sweepdir import Asking, Event

ONE, TWO, SWEEP = "clip-1a2b3c4d", "clip-00000000", "s-sweep-ffffffff"


def a_run(folder: Path, weights: int = 10, identity: str = "") -> Path:
    (folder / "model").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "state.pt").write_bytes(b"x")
    (folder / ".lock").touch()
    (folder / "model" / "w.bin").write_bytes(b"w" * weights)
    (folder / "result.json").write_text(
        json.dumps({"identity": identity or f"{folder.name[-8:]}01234567", "run": "/far/away", "top1": 0.5})
    )
    return folder


def test_a_run_comes_back_whole_without_what_is_unfinished(tmp_path: Path):
    run = a_run(tmp_path / "far" / ONE)
    log = "Ray says something\n" + "\n".join(archive.pack([run])) + "\nand more\n"
    [here] = archive.unpack(log, tmp_path / "runs")
    assert here == tmp_path / "runs" / ONE
    assert {f.relative_to(here).as_posix() for f in here.rglob("*") if f.is_file()} == {"result.json", "model/w.bin"}
    assert json.loads((here / "result.json").read_text()) == {"identity": "1a2b3c4d01234567", "run": str(here), "top1": 0.5}


def test_a_sweep_brings_its_runs(tmp_path: Path):
    a_run(tmp_path / ONE), a_run(tmp_path / TWO)
    sweep = tmp_path / SWEEP
    sweep.mkdir()
    sweepdir.begin(sweep, Asking("s", ("clip",), ()), "ffffffff00000000", [])
    for name in (ONE, TWO):
        sweepdir.note(sweep, Event(name, sweepdir.DONE, name))
    found = archive.unpack("\n".join(archive.pack([sweep])), tmp_path / "here")
    assert {f.name for f in found} == {SWEEP, ONE, TWO}
    assert sweepdir.runs(tmp_path / "here" / SWEEP)


def test_weights_that_are_too_large_stay(tmp_path: Path):
    run = a_run(tmp_path / ONE, weights=5000)
    [here] = archive.unpack("\n".join(archive.pack([run], most=4000)), tmp_path / "runs")
    assert (here / "result.json").exists() and not (here / "model").exists()


def test_a_torn_archive_is_refused(tmp_path: Path):
    lines = list(archive.pack([a_run(tmp_path / ONE)]))
    for text in ("", "\n".join(lines[:-1]), "\n".join([lines[0], "QUJD", lines[-1]])):
        with pytest.raises(ValueError, match="did not arrive whole"):
            archive.unpack(text, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def sent(*members: tarfile.TarInfo, **files: bytes) -> str:
    """What a cluster may send: files by name, then any members."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in members:
            tar.addfile(member, io.BytesIO(b"x" * member.size) if member.isfile() else None)
    data = raw.getvalue()
    return f"{archive.BEGIN} {hashlib.sha256(data).hexdigest()}\n{base64.b64encode(data).decode()}\n{archive.END}"


def result(identity: str) -> bytes:
    return json.dumps({"identity": identity}).encode()


@pytest.mark.parametrize(
    "name", ["../owned", "/owned", f"{ONE}/../../owned", f"{ONE}/../mlflow.db", "mlflow.db", "notes/x", "-1a2b3c4d/x", ".-1a2b3c4d/x", ONE]
)
def test_a_file_that_is_none_of_a_runs_is_not_written(tmp_path: Path, name: str):
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "mlflow.db").write_text("the user's own")
    with pytest.raises(ValueError, match="no plain file in the directory of a run"):
        archive.unpack(sent(**{f"{ONE}/result.json": result("1a2b3c4d00"), name: b"abc"}), runs)
    assert [file.name for file in tmp_path.rglob("*")] == ["runs", "mlflow.db"]
    assert (runs / "mlflow.db").read_text() == "the user's own"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_a_link_or_device_is_not_made(tmp_path: Path, kind: bytes):
    member = tarfile.TarInfo(f"{ONE}/x")
    member.type, member.linkname = kind, "/etc/passwd"
    with pytest.raises(ValueError, match="no plain file in the directory of a run"):
        archive.unpack(sent(member, **{f"{ONE}/result.json": result("1a2b3c4d00")}), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_run_of_another_identity_keeps_its_place(tmp_path: Path):
    mine = a_run(tmp_path / "runs" / ONE)
    with pytest.raises(ValueError, match=r"is here already and is not 1a2b3c4dffff.*--runs"):
        archive.unpack(sent(**{f"{ONE}/result.json": result("1a2b3c4dffff")}), tmp_path / "runs")
    with pytest.raises(ValueError, match="does not hold the run of its name, but deadbeef"):
        archive.unpack(sent(**{f"{ONE}/result.json": result("deadbeef0000")}), tmp_path / "runs")
    with pytest.raises(ValueError, match="but none"):
        archive.unpack(sent(**{f"{ONE}/model/w.bin": b"theirs"}), tmp_path / "runs")
    assert (mine / "model" / "w.bin").read_bytes() == b"w" * 10 and json.loads((mine / "result.json").read_text())["top1"] == 0.5
    again = list(archive.pack([a_run(tmp_path / "far" / ONE, weights=20)]))
    archive.unpack("\n".join(again), tmp_path / "runs")
    assert (mine / "model" / "w.bin").read_bytes() == b"w" * 20, "the same identity may come again"


def test_a_directory_of_the_users_own_keeps_its_place(tmp_path: Path):
    notes = tmp_path / "runs" / ONE
    notes.mkdir(parents=True)
    (notes / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is here already"):
        archive.unpack(sent(**{f"{ONE}/result.json": result("1a2b3c4d00")}), tmp_path / "runs")
    assert [file.name for file in notes.iterdir()] == ["notes.txt"]


def test_an_archive_that_unpacks_into_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(archive, "LARGEST", 1 << 20)
    text = sent(**{f"{ONE}/result.json": result("1a2b3c4d00"), f"{ONE}/zeros": bytes(8 << 20)})
    assert len(text) < 50_000
    with pytest.raises(ValueError, match="more than 1 MB"):
        archive.unpack(text, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    run = a_run(tmp_path / ONE)
    (run / "rounds.parquet").write_bytes(bytes(2 << 20))
    with pytest.raises(ValueError, match="fetch them from the cluster's storage"):
        list(archive.pack([run]))


def test_a_log_tells_where_its_results_lie():
    lines = ["read: 1,000 images", "run: /shared/runs/clip-1", "report: /shared/x", "run: relative", "  run: /no", "sweep: /shared/s"]
    log = "\n".join([*lines, lines[1], ""])
    assert archive.places(log) == ["/shared/runs/clip-1", "/shared/s"]


def test_a_directory_that_is_gone_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert archive.main([str(tmp_path / "none")]) == 1
    assert "no directory" in capsys.readouterr().err
