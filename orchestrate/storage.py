"""Where a run is kept: its checkpoints, and with `cluster.storage` a copy of its files that another host can go on from.

Any file system that pyarrow reads by address (a local or NFS folder, s3://, gs://, hdfs://). Every call is tried again for a while
(`cluster.storage_retry_s`) when it fails, because an object store refuses now and then and a network folder goes away for a minute. A file
is written whole or not at all: its bytes are collected on the local disk and sent when it is closed.

Knows no Ray: Ray Train is handed `Store.filesystem` and keeps its checkpoints through it.
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs

from orchestrate.cluster import absolute
from orchestrate.journal import LOCK
from orchestrate.mlflow_uri import masked
from orchestrate.recipe import Recipe

CHECKPOINTS, PART = "checkpoints", ".part"  # Ray Train's folder in a run's; what is being written
CHUNK = 16 << 20  # bytes copied at a time
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0  # between two attempts
WHOLE = ("s3", "gcs", "abfs")  # stores where a file appears when it is complete; elsewhere it is renamed into place
# What no waiting mends, in the words of pyarrow's clients.
FINAL = re.compile(r"ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY|SIGNATURE|PERMISSION_DENIED|not found|Permission denied")
logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Store:
    """The place of one run. `shared`: it is not the run's own directory, so its files are copied there as they are made."""

    root: str  # a path or an address
    name: str  # the run's directory in it
    retry_s: float
    shared: bool

    @classmethod
    def of(cls, recipe: Recipe) -> Store:
        """The recipe's place. ValueError for an address that can be none."""
        c = recipe.cluster
        runs = str(absolute(c.runs))
        root = c.storage if "://" in c.storage else str(absolute(c.storage)) if c.storage else runs
        if re.match(r"[\w+.-]+://[^/]*@", root):
            raise ValueError(
                f"cluster.storage={masked(root)}: keep keys out of recipes; each node finds its own (environment, role, file)."
            )
        return cls(root, recipe.directory, c.storage_retry_s, root != runs)

    @property
    def filesystem(self) -> fs.FileSystem:
        return fs.PyFileSystem(Patient(self.root, self.retry_s))

    @property
    def home(self) -> str:
        """The run's folder on `filesystem`."""
        return f"{_open(self.root, self.retry_s)[1].rstrip('/')}/{self.name}"

    def read(self, name: str) -> bytes | None:
        """A small file's content; None where there is none."""
        try:
            with self.filesystem.open_input_stream(f"{self.home}/{name}") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def remove(self, name: str = "") -> None:
        """A file or folder of the run, or the whole run; nothing where there is none."""
        path = f"{self.home}/{name}".rstrip("/")
        kind = self.filesystem.get_file_info(path).type
        if kind == fs.FileType.Directory:
            self.filesystem.delete_dir(path)
        elif kind != fs.FileType.NotFound:
            self.filesystem.delete_file(path)

    def push(self, folder: Path, names: Iterable[str] | None = None) -> None:
        """Copy files of the run's directory here (`names`, relative; None: all), nothing where the run lies here anyway."""
        if not self.shared:
            return
        for name in sorted(_files(folder)) if names is None else names:
            if (folder / name).is_file():
                with (folder / name).open("rb") as source, self.filesystem.open_output_stream(f"{self.home}/{name}") as target:
                    shutil.copyfileobj(source, target, CHUNK)

    def pull(self, folder: Path) -> None:
        """Copy every file but the checkpoints into the run's directory, over what is there."""
        if not self.shared:
            return
        folder = folder.resolve()
        for info in self.filesystem.get_file_info(fs.FileSelector(self.home, recursive=True, allow_not_found=True)):
            name = info.path[len(self.home) :].lstrip("/")
            target = (folder / name).resolve()
            if info.type != fs.FileType.File or name.startswith(CHECKPOINTS + "/") or not target.is_relative_to(folder):
                continue  # the key of an object may hold `..`
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(target.name + PART)
            with self.filesystem.open_input_stream(info.path) as source, part.open("wb") as file:
                shutil.copyfileobj(source, file, CHUNK)
            part.replace(target)


def _files(folder: Path) -> list[str]:
    """The run's files by their relative names, less checkpoints, the lock and what is being written."""
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    return [n for n in names if not n.startswith(CHECKPOINTS + "/") and not n.endswith((LOCK, PART))]


class Patient(fs.FileSystemHandler):
    """A pyarrow file system whose every call is tried again while it fails, for `retry_s` seconds. Pickled as its address."""

    def __init__(self, root: str, retry_s: float) -> None:
        self.root, self.retry_s = root, retry_s

    def __reduce__(self) -> Any:
        return Patient, (self.root, self.retry_s)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Patient) and (self.root, self.retry_s) == (other.root, other.retry_s)

    def __hash__(self) -> int:
        return hash((self.root, self.retry_s))

    @property
    def inner(self) -> fs.FileSystem:
        return _open(self.root, self.retry_s)[0]

    def _call(self, name: str, *args: Any, **options: Any) -> Any:
        return patiently(self.root, self.retry_s, lambda: getattr(self.inner, name)(*args, **options))

    def get_type_name(self) -> str:
        return f"patient-{self.inner.type_name}"

    def normalize_path(self, path: str) -> str:
        return str(self.inner.normalize_path(path))

    def get_file_info(self, paths: list[str]) -> Any:
        return self._call("get_file_info", paths)

    def get_file_info_selector(self, selector: fs.FileSelector) -> Any:
        return self._call("get_file_info", selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        self._call("create_dir", path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self._call("delete_dir", path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._call("delete_dir_contents", path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise PermissionError("the root of a storage is not emptied")

    def delete_file(self, path: str) -> None:
        self._call("delete_file", path)

    def move(self, src: str, dest: str) -> None:
        self._call("move", src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        self._call("copy_file", src, dest)

    def open_input_file(self, path: str) -> pa.NativeFile:
        """The file, fetched whole: reading it cannot fail half-way."""
        spool = tempfile.TemporaryFile()  # noqa: SIM115, closed by the reader

        def fetch() -> None:
            spool.seek(0)
            spool.truncate()
            with self.inner.open_input_stream(path) as source:
                shutil.copyfileobj(source, spool, CHUNK)

        patiently(self.root, self.retry_s, fetch)
        spool.seek(0)
        return pa.PythonFile(spool, mode="r")

    open_input_stream = open_input_file

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return pa.PythonFile(_Outgoing(self, path), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise NotImplementedError("files in a storage are written whole")

    def put(self, spool: Any, path: str) -> None:
        """The bytes of a local file under `path`, whole or not at all."""
        renames = self.inner.type_name not in WHOLE

        def send() -> None:
            spool.seek(0)
            if renames:
                self.inner.create_dir(path.rpartition("/")[0], recursive=True)
            with self.inner.open_output_stream(path + PART * renames) as target:
                shutil.copyfileobj(spool, target, CHUNK)
            if renames:
                self.inner.move(path + PART, path)

        patiently(self.root, self.retry_s, send)


class _Outgoing:
    """What is being written: on the local disk until `close`. No io.IOBase, whose end of life would send half a file."""

    def __init__(self, target: Patient, path: str) -> None:
        self.target, self.path, self.closed = target, path, False
        self.spool = tempfile.TemporaryFile()  # noqa: SIM115, closed by `close`
        self.write, self.tell, self.flush = self.spool.write, self.spool.tell, self.spool.flush

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            with self.spool:
                self.target.put(self.spool, self.path)


@cache
def _open(root: str, retry_s: float) -> tuple[fs.FileSystem, str]:
    """(file system, path on it). ValueError for an address that pyarrow does not know."""
    try:
        return patiently(root, retry_s, lambda: fs.FileSystem.from_uri(root))
    except (ValueError, pa.ArrowException) as error:
        raise ValueError(
            f"cluster.storage={root}: {error}. Give a folder, or an address such as s3://bucket/path or gs://bucket/path."
        ) from None


def patiently(root: str, retry_s: float, call: Callable[[], T]) -> T:
    """`call` until it works, pauses growing, for `retry_s` seconds; then OSError with what to do. What is missing is so at once."""
    started, pause, shown = time.monotonic(), FIRST_PAUSE_S, root.partition("?")[0]
    while True:
        try:
            return call()
        except (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError):
            raise
        except OSError as error:
            waited = time.monotonic() - started
            if FINAL.search(str(error)):
                raise
            if waited + pause > retry_s:
                raise OSError(
                    f"storage {shown} has failed for {waited:.0f} s (cluster.storage_retry_s={retry_s:g}), at last with: {error}. "
                    "When it works again, the same command goes on from the last checkpoint."
                ) from error
            logger.warning("storage %s fails (%s); trying again for %.0f s more", shown, error, retry_s - waited)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
