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


def a_run(folder: Path, weights: int = 10) -> Path:
    (folder / "model").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "state.pt").write_bytes(b"x")
    (folder / ".lock").touch()
    (folder / "model" / "w.bin").write_bytes(b"w" * weights)
    (folder / "result.json").write_text(json.dumps({"run": "/far/away", "zeroshot/top1": 0.5}))
    return folder


def test_a_run_comes_back_whole_without_what_is_unfinished(tmp_path: Path):
    run = a_run(tmp_path / "far" / "clip-1")
    log = "Ray says something\n" + "\n".join(archive.pack([run])) + "\nand more\n"
    [here] = archive.unpack(log, tmp_path / "runs")
    assert here == tmp_path / "runs" / "clip-1"
    assert {f.relative_to(here).as_posix() for f in here.rglob("*") if f.is_file()} == {"result.json", "model/w.bin"}
    assert json.loads((here / "result.json").read_text()) == {"run": str(here), "zeroshot/top1": 0.5}


def test_a_sweep_brings_its_runs(tmp_path: Path):
    a_run(tmp_path / "clip-1"), a_run(tmp_path / "clip-2")
    sweep = tmp_path / "s-sweep-1"
    sweep.mkdir()
    sweepdir.begin(sweep, Asking("s", ("clip",), ()), "00", [])
    for name in ("clip-1", "clip-2"):
        sweepdir.note(sweep, Event(name, sweepdir.DONE, name))
    found = archive.unpack("\n".join(archive.pack([sweep])), tmp_path / "here")
    assert {f.name for f in found} == {"s-sweep-1", "clip-1", "clip-2"}
    assert sweepdir.runs(tmp_path / "here" / "s-sweep-1")


def test_weights_that_are_too_large_stay(tmp_path: Path):
    run = a_run(tmp_path / "clip-1", weights=5000)
    [here] = archive.unpack("\n".join(archive.pack([run], most=4000)), tmp_path / "runs")
    assert (here / "result.json").exists() and not (here / "model").exists()


def test_a_torn_archive_is_refused(tmp_path: Path):
    lines = list(archive.pack([a_run(tmp_path / "clip-1")]))
    for text in ("", "\n".join(lines[:-1]), "\n".join([lines[0], "QUJD", lines[-1]])):
        with pytest.raises(ValueError, match="did not arrive whole"):
            archive.unpack(text, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", ["above", "absolute", "link", "device"])
def test_nothing_is_written_outside_the_folder(tmp_path: Path, kind: str):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        member = tarfile.TarInfo({"above": "../owned", "absolute": str(tmp_path / "owned")}.get(kind, "owned"))
        if kind == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        if kind == "device":
            member.type = tarfile.CHRTYPE
        member.size = 3 if kind in ("above", "absolute") else 0
        tar.addfile(member, io.BytesIO(b"abc") if member.size else None)
    data = raw.getvalue()
    text = f"{archive.BEGIN} {hashlib.sha256(data).hexdigest()}\n{base64.b64encode(data).decode()}\n{archive.END}"
    with pytest.raises(ValueError, match="would write outside"):
        archive.unpack(text, tmp_path / "runs")
    assert not (tmp_path / "owned").exists()


def test_a_log_tells_where_its_results_lie():
    lines = ["read: 1,000 images", "run: /shared/runs/clip-1", "report: /shared/x", "run: relative", "  run: /no", "sweep: /shared/s"]
    log = "\n".join([*lines, lines[1], ""])
    assert archive.places(log) == ["/shared/runs/clip-1", "/shared/s"]


def test_a_directory_that_is_gone_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert archive.main([str(tmp_path / "none")]) == 1
    assert "no directory" in capsys.readouterr().err
