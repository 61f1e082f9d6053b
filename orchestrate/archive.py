"""Run directories as text, to come back through the log of a job: the one door of a cluster that needs no further port and no key.

    python -m orchestrate.archive DIRECTORY…        on the cluster: writes an archive to stdout, between two marks
    unpack(text, folder)                            here: the directories, below `folder`

Checkpoints of unfinished runs and locks stay behind, and so do the weights where they would make the archive too large.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import io
import json
import re
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from orchestrate import journal, sweepdir

BEGIN, END = "-----BEGIN ANTIDOTE ARCHIVE-----", "-----END ANTIDOTE ARCHIVE-----"
MOST = 200 << 20  # bytes before compression; the weights of a larger one stay on the cluster
LARGEST = 1 << 30  # bytes before compression; more is neither sent nor taken
CHUNK = 1 << 20  # bytes unzipped at a time
LEFT = ("checkpoints", journal.LOCK, "tune")
WEIGHTS = "model"
OURS = re.compile(r"[^.-].*-[0-9a-f]{8}")  # a run's directory (`Recipe.directory`) or a sweep's
KNOWN_BY = ("result.json", "recipe.json", sweepdir.SWEEP)  # each names the identity of its directory
TOLD = re.compile(r"^(?:run|sweep): (/\S.*)$", re.MULTILINE)  # what `antidote run` and `antidote sweep` say of where they wrote


def places(log: str) -> list[str]:
    """The directories that a job's log names, each once."""
    return list(dict.fromkeys(TOLD.findall(log)))


def pack(folders: Sequence[Path], most: int = MOST) -> Iterator[str]:
    """Lines of the archive. A sweep's directory brings its runs. ValueError for a directory that is none."""
    files: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"no directory {folder} on this node.")
        for one in [folder, *(sweepdir.runs(folder) if sweepdir.is_sweep(folder) else [])]:
            files |= {f"{one.name}/{file.relative_to(one).as_posix()}": file for file in sorted(one.rglob("*")) if _kept(file, one)}
    if sum(file.stat().st_size for file in files.values()) > most:
        files = {name: file for name, file in files.items() if name.split("/")[1] != WEIGHTS}
    if (size := sum(file.stat().st_size for file in files.values())) > LARGEST - 2048 * len(files):  # a file's name and padding
        raise ValueError(f"the results are {size >> 20:,} MB without weights, too many for a log: fetch them from the cluster's storage.")
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for name, file in files.items():
            tar.add(file, name, recursive=False)
    data = raw.getvalue()
    yield f"{BEGIN} {hashlib.sha256(data).hexdigest()}"
    for i in range(0, len(data), 57 * 1024):
        yield base64.b64encode(data[i : i + 57 * 1024]).decode()
    yield END


def _kept(file: Path, run: Path) -> bool:
    return file.is_file() and not file.is_symlink() and file.relative_to(run).parts[0] not in LEFT


def unpack(text: str, folder: Path) -> list[Path]:
    """The directories of an archive, written below `folder`. ValueError where the text holds no whole archive, or one of anything else.

    What a cluster sends is not trusted. Taken are plain files of runs and sweeps, `<name>-<hash8>/…`, whose identity fits the name: no
    link, device or mode bit, no more than LARGEST bytes. A directory that is here already is replaced by one of the same identity only.
    """
    found = re.search(rf"{BEGIN} (\w+)\n(.*?)\n{END}", text, re.DOTALL)
    data = base64.b64decode(found[2]) if found else b""
    if not found or hashlib.sha256(data).hexdigest() != found[1]:
        raise ValueError(f"the results did not arrive whole. The job said: {text.strip()[-300:] or 'nothing'}")
    try:
        with tempfile.TemporaryFile() as raw:
            _unzip(data, raw)
            with tarfile.open(fileobj=raw, mode="r:") as tar:
                names = _checked(tar, folder)
                folder.mkdir(parents=True, exist_ok=True)
                tar.extractall(folder, filter="data")
    except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"the archive of the results was not unpacked: {error}.") from error
    runs = [folder / name for name in names]
    for run in runs:
        _here(run)
    return runs


def _unzip(data: bytes, target: IO[bytes]) -> None:
    """Counted as it comes out: a few kilobytes can stand for terabytes."""
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as source:
        while block := source.read(CHUNK):
            if target.tell() + len(block) > LARGEST:
                raise tarfile.TarError(f"it holds more than {LARGEST >> 20:,} MB")
            target.write(block)
    target.seek(0)


def _checked(tar: tarfile.TarFile, folder: Path) -> list[str]:
    """The names of the archive's directories. TarError for a member that is none of a run's, ValueError where one would replace another."""
    members: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        parts = member.name.split("/")
        if not member.isfile() or member.issparse() or len(parts) < 2 or {"", ".", ".."} & {*parts} or not OURS.fullmatch(parts[0]):
            raise tarfile.TarError(f"{member.name!r} is no plain file in the directory of a run or a sweep (<name>-<8 hex digits>)")
        members[member.name] = member
    names = list(dict.fromkeys(name.split("/")[0] for name in members))
    for name in names:
        inner = {file: members[f"{name}/{file}"] for file in KNOWN_BY if f"{name}/{file}" in members}
        identity = _identity((tar.extractfile(member) or io.BytesIO()).read() for member in inner.values())
        if not name.endswith(f"-{identity[:8]}"):
            raise tarfile.TarError(f"{name} does not hold the run of its name, but {identity or 'none'}")
        here = folder / name
        if here.exists() and identity != _identity((here / file).read_bytes() for file in KNOWN_BY if (here / file).is_file()):
            raise ValueError(f"{here} is here already and is not {identity}, which came: bring the results elsewhere, with --runs FOLDER.")
    return names


def _identity(texts: Iterable[bytes]) -> str:
    """The identity that the first of these files names, "" where none does."""
    named = [str(tree["identity"]) for text in texts if (tree := journal.parse(text)) and tree.get("identity")]
    return named[0] if named else ""


def _here(run: Path) -> None:
    """result.json names the run's directory: now this one."""
    file = run / "result.json"
    with contextlib.suppress(OSError, json.JSONDecodeError):
        result = json.loads(file.read_text())
        journal.replace(file, (json.dumps(result | {"run": str(run.absolute())}, indent=1, ensure_ascii=False) + "\n").encode())


def main(argv: Sequence[str]) -> int:
    try:
        for line in pack([Path(word) for word in argv]):
            sys.stdout.write(line + "\n")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"antidote: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
