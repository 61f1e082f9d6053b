"""Where files are: one path, folder, glob or URI → a sorted list of files, on a disk and in an object store alike."""

from __future__ import annotations

import errno
import os
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from pyarrow import fs

MOST_BRACES = 1_000_000  # names that {000..999} may stand for: each is a part of one pattern


@dataclass(frozen=True)
class File:
    """One file of a set."""

    uri: str  # absolute local path or URI: what an index stores
    name: str  # path below the set's root, "/" between
    size: int  # bytes


@dataclass(frozen=True)
class Listing:
    """The files of a set: `root` (absolute local path or URI of a folder), whether one single file was named, or the whole folder."""

    root: str
    files: list[File]
    single: bool
    whole: bool = False


def is_uri(path: str) -> bool:
    return "://" in path


@lru_cache(maxsize=32)
def _store(scheme: str, netloc: str, query: str) -> tuple[Any, str]:
    # One client for each store: making an S3 client costs a round trip, and an index may name millions of objects.
    try:
        store, base = fs.FileSystem.from_uri(urlunsplit((scheme, netloc, "/", query, "")))
    except (OSError, ValueError, ImportError) as error:
        known = "Known are s3, gs, abfs, hdfs and file."
        raise ValueError(f"{scheme}://{netloc} cannot be opened: {error}. {known}") from error
    return store, base


def resolve(uri: str) -> tuple[Any, str]:
    """(file system, path inside it) of an absolute local path or URI."""
    if not is_uri(uri):
        return _local(), uri
    parts = urlsplit(uri)
    store, base = _store(parts.scheme, parts.netloc, parts.query)
    return store, posixpath.join(base, unquote(parts.path).lstrip("/")).rstrip("/")


@lru_cache(maxsize=1)
def _local() -> Any:
    return fs.LocalFileSystem()


def open_file(uri: str) -> Any:
    """A seekable pyarrow file. OSError when it is not there."""
    store, path = resolve(uri)
    return store.open_input_file(path)


def child(folder: str, name: str) -> str:
    """The absolute path or URI of `name` (relative, "/" between) below `folder`."""
    if not is_uri(folder):
        return os.path.join(folder, name)
    parts = urlsplit(folder)
    return urlunsplit(parts._replace(path=posixpath.join(parts.path or "/", quote(name))))


def parent(uri: str) -> str:
    """The folder that holds a file."""
    if not is_uri(uri):
        return os.path.dirname(uri)
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(path=posixpath.dirname(parts.path)))


def below(root: str, folder: str, path: str) -> str | None:
    """`path`, as a table in `folder` names it, as an absolute path or URI; None when it leads out of `root`.

    Lexical: a symbolic link inside the root is the owner's own deed and is followed. A name that no file can have leads nowhere.
    """
    if "\0" in path:
        return None
    path = unquote(urlsplit(path).path) if path.startswith("file:///") and not is_uri(root) else path
    if is_uri(path):
        place = path
    elif is_uri(folder):
        # A leading "/" has no meaning of its own in a store: it would be another bucket's business.
        if path.startswith("/"):
            return None
        place = child(folder, path)
    else:
        place = os.path.join(folder, path)
    if is_uri(place) != is_uri(root):
        return None
    if is_uri(place):
        # Decoded before it is judged: "%2e%2e" is ".." to a store.
        at, top = urlsplit(place), urlsplit(root)
        if (at.scheme, at.netloc) != (top.scheme, top.netloc):
            return None
        inside = posixpath.normpath(unquote(at.path))
        base = posixpath.normpath(unquote(top.path) or "/")
        clean = urlunsplit(top._replace(path=quote(inside)))
    else:
        inside, base = os.path.normpath(place), os.path.normpath(root)
        clean = inside
    return clean if inside.startswith(base.rstrip("/") + "/") else None


def sizes(uris: Iterable[str]) -> dict[str, int]:
    """Bytes of each file that exists. One listing for each folder: one request for each file takes hours in a store."""
    wanted = set(uris)
    found: dict[str, int] = {}
    for folder in sorted({parent(uri) for uri in wanted}):
        for file in _listed(folder):
            if file.uri in wanted:
                found[file.uri] = file.size
    return found


def _listed(folder: str) -> list[File]:
    """The files in a folder that a table names; none where it is a file, or has a name that no folder can have."""
    try:
        return _list(folder, recursive=False)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG):
            return []
        raise


def _list(folder: str, recursive: bool = True) -> list[File]:
    store, path = resolve(folder)
    infos = store.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=recursive))
    start = len(path.rstrip("/")) + 1
    names = ((info.path[start:], info.size) for info in infos if info.type == fs.FileType.File)
    return sorted((File(child(folder, name), name, size or 0) for name, size in names), key=lambda file: file.name)


def find(path: str) -> Listing:
    """The files that `path` names: a file, a folder, a glob (`*`, `**`, `{000..012}`, `{a,b}`), or a URI of such.

    Hidden files (`.x`, `_x`) are left out. ValueError when nothing is there.
    """
    place = _absolute(path)
    store, inside = resolve(place)
    info = store.get_file_info(inside or "/")
    if info.type == fs.FileType.File:
        return Listing(parent(place), [File(place, posixpath.basename(inside), info.size or 0)], True)
    if info.type == fs.FileType.Directory:
        root, files, whole = place, _list(place), True
    elif re.search(r"[*\[{?]", urlsplit(place).path if is_uri(place) else place):
        (root, files), whole = _glob(place), False
    else:
        raise ValueError(f"data.path={path}: there is no such file or folder.")
    files = [file for file in files if not re.search(r"(^|/)[._]", file.name)]
    if not files:
        raise ValueError(f"data.path={path}: no file there. Give a file, a folder, a glob or a URI (s3://bucket/folder).")
    return Listing(root, files, False, whole)


def _absolute(path: str) -> str:
    if not is_uri(path):
        return os.path.abspath(os.path.expanduser(path))
    parts = urlsplit(path)
    if parts.scheme == "file":
        return os.path.abspath(unquote(parts.path))
    if parts.password:
        raise ValueError(
            "data.path holds a password: it would be written into the index and every report. "
            "Leave it out and set it in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) instead."
        )
    # Quoted one way only, whoever wrote it: URIs are compared as strings.
    return urlunsplit(parts._replace(path=quote(unquote(parts.path).rstrip("/"), safe="/*[]{},")))


def _glob(place: str) -> tuple[str, list[File]]:
    path = unquote(urlsplit(place).path) if is_uri(place) else place
    fixed = re.split(r"[*\[{?]", path)[0].rpartition("/")[0]
    root = urlunsplit(urlsplit(place)._replace(path=quote(fixed))) if is_uri(place) else fixed or "/"
    try:
        pattern = re.compile("|".join(_regex(p) for p in _braces(path[len(fixed) + 1 :])))
    except re.error as error:
        raise ValueError(f"data.path={place}: this is no glob ({error}). Mend what is in brackets, as in [a-z] or [05].") from None
    return root, [file for file in _list(root) if pattern.fullmatch(file.name)]


def _braces(pattern: str) -> list[str]:
    """`{000..002}.tar` → 000.tar, 001.tar, 002.tar, as WebDataset and open_clip write it; `{a,b}` likewise."""
    choices = list[list[str]]()
    for part in re.split(r"(\{[^{}]*\})", pattern):
        span = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part)
        if span:
            width, first, last = len(span[1]), int(span[1]), int(span[2])
            if last - first >= MOST_BRACES:
                raise ValueError(f"data.path: {part} names more than {MOST_BRACES:,} files. Write * for as many.")
            choices.append([f"{n:0{width}d}" for n in range(first, last + 1)])
        else:
            choices.append(part[1:-1].split(",") if part.startswith("{") and part.endswith("}") else [part])
    if prod(map(len, choices)) > MOST_BRACES:
        raise ValueError(f"data.path: {pattern} names more than {MOST_BRACES:,} files. Write * for as many.")
    return ["".join(parts) for parts in product(*choices)]


def _regex(glob: str) -> str:
    """One glob as a regular expression: `*` stays inside a folder, `**/` does not."""
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]*\]|.", glob, re.DOTALL)
    return "".join(parts.get(t, t if len(t) > 1 and t[0] == "[" else re.escape(t)) for t in tokens)
