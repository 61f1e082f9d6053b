"""Addresses of MLflow stores: what the user may write, whether somebody answers there, and what to say when not.

Knows no mlflow: an address is checked in milliseconds, before the import that takes seconds.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from orchestrate.secrets import masked as masked  # messages, files and pages name addresses without their passwords

NONE = "none"  # track.uri=none: metrics.jsonl only
ANSWER_S = 5  # seconds a store gets for one answer
MEND = "give another with track.uri=…, or track.uri=none to keep metrics.jsonl only"
MEND_SYNC = "or give another with --uri"
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
WORDS = {
    "connection refused": "connection refused",
    "timed out": "timed out",
    "resolve": "unknown host",
    "name or service not known": "unknown host",
    "connection reset": "connection reset",
}


def resolve(uri: str | None, runs: Path) -> str:
    """An absolute URI or "none"; by default `MLFLOW_TRACKING_URI`, else `mlflow.db` in `runs`. ValueError: malformed."""
    uri = (uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(runs).absolute() / 'mlflow.db'}").strip()
    if uri.lower() == NONE:
        return NONE
    kind = scheme(uri)
    if kind == "sqlite":
        if not sqlite_path(uri).name:
            raise ValueError(f"MLflow store {uri} names no file: write sqlite:////absolute/path/mlflow.db, or {MEND}.")
        return f"sqlite:///{sqlite_path(uri).absolute()}"
    if kind in ("", "file") and not uri.startswith("databricks"):
        hint = f"write sqlite:///{uri.removeprefix('file://').rstrip('/')}/mlflow.db"
        raise ValueError(f"MLflow store {uri} is a plain folder, which MLflow no longer takes: {hint}, or {MEND}.")
    if kind in ("http", "https") and not urlsplit(uri).hostname:
        raise ValueError(f"MLflow server {uri} names no host: write http://host:port, or {MEND}.")
    return uri.rstrip("/")


def scheme(uri: str) -> str:
    """`postgresql+psycopg2://…` → `postgresql`; "" for a plain path."""
    return urlsplit(uri).scheme.split("+")[0]


def sqlite_path(uri: str) -> Path:
    """The file of `sqlite:///relative.db` or `sqlite:////absolute.db`."""
    return Path(uri.partition("://")[2].removeprefix("/").partition("?")[0])


def knock(uri: str) -> None:
    """Raise soon where a database or server is not there: MLflow itself would try ten times with growing pauses, for minutes."""
    parts = urlsplit(uri)
    port = parts.port  # ValueError where it is no number
    kind = scheme(uri)
    if kind == "sqlite":
        with contextlib.closing(sqlite3.connect(sqlite_path(uri), timeout=ANSWER_S)) as database:
            database.execute("BEGIN IMMEDIATE")
    elif kind in PORTS:
        socket.create_connection((parts.hostname or "localhost", port or PORTS[kind]), timeout=ANSWER_S).close()


@contextlib.contextmanager
def alone(uri: str) -> Iterator[None]:
    """One process at a time, for a SQLite store: two that make the tables of a fresh one at once both fail."""
    if scheme(uri) != "sqlite":
        yield
        return
    import fcntl

    path = sqlite_path(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as lock:
        with contextlib.suppress(OSError):  # some network file systems have no locks: then without
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def user_errors(uri: str, mend: str = MEND) -> Iterator[None]:
    """Anything thrown inside → a ValueError of one sentence with the address and the mend."""
    try:
        yield
    except Exception as error:
        if type(error) is ValueError and "MLflow" in str(error):
            raise  # has its own sentence
        what = "server" if scheme(uri).startswith("http") else "store"
        raise ValueError(f"MLflow {what} {masked(uri)} does not answer ({reason(error)}): start it, {mend}.") from error


def reason(error: BaseException) -> str:
    """The few words of an exception that a person needs."""
    text = " ".join(str(error).split()) or type(error).__name__
    known = [words for sign, words in WORDS.items() if sign in text.lower()]
    return known[0] if known else masked(text if len(text) < 160 else text[:157] + "…").rstrip(".")
