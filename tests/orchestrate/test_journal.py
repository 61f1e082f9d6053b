"""A directory held against a second process, on file systems that know locks and on those that do not."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from pathlib import Path

import pytest

from orchestrate import journal


def test_a_directory_is_held_once_and_let_go(tmp_path: Path):
    again = journal.held(tmp_path / "run", "the sweep ")
    with journal.held(tmp_path / "run"), pytest.raises(ValueError, match="another process is running the sweep"), again:
        pass
    with journal.held(tmp_path / "run"):
        pass


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_a_run_goes_on_and_says_so_once(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    journal._unlocked.cache_clear()
    monkeypatch.setattr(fcntl, "flock", refuse(code))
    with caplog.at_level(logging.WARNING), journal.held(tmp_path / "one"), journal.held(tmp_path / "two"):
        assert (tmp_path / "two").is_dir()
    assert [record.message for record in caplog.records if "no locks" in record.message] == [caplog.records[0].message]


def test_another_error_of_the_system_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fcntl, "flock", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"), journal.held(tmp_path / "run"):
        pass


def refuse(code: int):
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return flock
