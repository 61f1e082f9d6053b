"""Run directories as text, to come back through the log of a job: the one door of a cluster that needs no further port and no key.

    python -m orchestrate.archive DIRECTORY…        on the cluster: writes an archive to stdout, between two marks
    unpack(text, folder)                            here: the directories, below `folder`

Checkpoints of unfinished runs and locks stay behind, and so do the weights where they would make the archive too large.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from orchestrate import journal, sweepdir

BEGIN, END = "-----BEGIN ANTIDOTE ARCHIVE-----", "-----END ANTIDOTE ARCHIVE-----"
MOST = 200 << 20  # bytes before compression; the weights of a larger one stay on the cluster
LEFT = ("checkpoints", journal.LOCK, "tune")
WEIGHTS = "model"
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
    """The directories of an archive, written below `folder`. ValueError where the text holds no whole archive.

    What a cluster sends is not trusted: nothing is written outside `folder`, and no link, device or mode bit is taken over.
    """
    found = re.search(rf"{BEGIN} (\w+)\n(.*?)\n{END}", text, re.DOTALL)
    data = base64.b64decode(found[2]) if found else b""
    if not found or hashlib.sha256(data).hexdigest() != found[1]:
        raise ValueError(f"the results did not arrive whole. The job said: {text.strip()[-300:] or 'nothing'}")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
        members = tar.getmembers()
        names = list(dict.fromkeys(member.name.split("/")[0] for member in members))
        try:
            if odd := [member.name for member in members if not member.isfile() or member.name.startswith("/")]:
                raise tarfile.TarError(f"{odd[0]!r} is no plain file below it")
            tar.extractall(folder, filter="data")
        except (tarfile.FilterError, tarfile.TarError) as error:
            raise ValueError(f"the archive would write outside {folder}, so it was not unpacked: {error}.") from error
    runs = [folder / name for name in names]
    for run in runs:
        _here(run)
    return runs


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
