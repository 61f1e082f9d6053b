"""The site all cases share, the numbers of an undisturbed run, and the table of what came out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ray.conftest import Antidote
from tests.s3 import KEYS

from . import table
from .numbers import WORDS, Numbers
from .site import Desk, Site


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    desk = Desk(tmp_path_factory.mktemp("faults") / "desk")
    os.environ["ANTIDOTE_DESK"] = str(desk.folder)  # before the raylets start: their workers inherit it
    os.environ["RAY_gcs_rpc_server_reconnect_timeout_s"] = "10"  # noqa: SIM112, a driver gives its head up after so long
    os.environ["RAY_prestart_worker_first_driver"] = "0"  # noqa: SIM112, two idle processes a node for every run
    os.environ |= KEYS  # the nodes know the keys of the storage, the recipe does not
    site = Site(desk)
    yield site
    site.stop()


@pytest.fixture
def desk(site: Site) -> Iterator[Desk]:
    site.desk.clear()
    yield site.desk
    site.desk.clear()


@dataclass
class Runs:
    """The command line on the site; what it says goes to the table."""

    site: Site
    antidote: Antidote
    storage: str

    def words(self, *more: str) -> tuple[str, ...]:
        return (*WORDS, f"cluster.address={self.site.address}", f"cluster.storage={self.storage}", *more)


@pytest.fixture
def runs(site: Site, desk: Desk, tmp_path: Path) -> Runs:
    return Runs(site, Antidote(tmp_path), str(tmp_path / "shared"))


@pytest.fixture(scope="session")
def undisturbed(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Numbers:
    folder = tmp_path_factory.mktemp("undisturbed")
    runs = Runs(site, Antidote(folder), str(folder / "shared"))
    with table.timed() as seconds:
        runs.antidote.result(*runs.words())
    table.note("none", "nobody", "the undisturbed run", seconds(), 0.0)
    return Numbers.of(runs.antidote)


def pytest_itemcollected(item: pytest.Item) -> None:
    table.CASES[item.nodeid] = "not run"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed or (report.when == "call" and report.passed):
        table.CASES[report.nodeid] = report.outcome


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if table.ROWS or "failed" in table.CASES.values():
        terminalreporter.write_line("\n" + table.markdown())
        if target := os.environ.get("ANTIDOTE_FAULTS_PAGE"):
            table.write(Path(target))
