"""What a person sees, in a real browser: a sweep's report, an audit's page, MLflow's comparison. `make screens` keeps the pictures.

Needs Chromium (`chromium` or `$CHROMIUM`); skipped where there is none.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from orchestrate import compare, compare_page, recipes, rundir, sweepdir, track
from orchestrate.track import Tracker

from ..orchestrate import auditing, sweeping

pytestmark = pytest.mark.browser
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--hide-scrollbars")
NAMES = ("clip-stripes-smoke", "roclip-stripes-smoke")


@pytest.fixture(autouse=True)
def browser() -> None:
    if not CHROMIUM:
        pytest.skip("no Chromium here: install it, or name it in $CHROMIUM")


def seen(folder: Path, name: str, address: str, wait_s: int = 5, height: int = 1600) -> str:
    """The page's DOM after its scripts have had `wait_s` seconds; its picture goes to $ANTIDOTE_SCREENS/NAME.png, or `folder`."""
    picture = Path(os.environ.get("ANTIDOTE_SCREENS", folder)).absolute() / f"{name}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    command = [
        str(CHROMIUM),
        *FLAGS,
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size=1400,{height}",
        f"--virtual-time-budget={1000 * wait_s}",
    ]
    subprocess.run([*command, f"--screenshot={picture}", address], check=True, capture_output=True, timeout=120)
    assert picture.stat().st_size > 20_000, "the picture is blank"
    return subprocess.run([*command, "--dump-dom", address], check=True, capture_output=True, text=True, timeout=120).stdout


def test_the_report_of_a_sweep_shows_its_maps_its_front_and_its_advice(tmp_path: Path) -> None:
    sweep = sweeping.write(tmp_path / "runs", sweeping.trials())
    runs = compare.load([sweep])
    compare_page.write([sweep], sweep / "report.html", runs)
    assert len(runs) == len(sweepdir.events(sweep)) == 81
    dom = seen(tmp_path, "sweep", (sweep / "report.html").as_uri(), height=3200)
    assert "defense.pool_size" in dom and "defense.every" in dom and "95 %" in dom
    assert dom.count("<svg") >= 3 and "<image" not in dom


def test_the_page_of_an_audit_shows_strangers_words_as_words(tmp_path: Path) -> None:
    page = tmp_path / "audit.html"
    auditing.write(page)
    # Were a caption ever run as a script, the page would not be its own any more.
    dom = seen(tmp_path, "audit", page.as_uri(), height=2400)
    assert "<script" not in dom and dom.count("&lt;script&gt;") > 20
    assert dom.count("<img") >= 8 and "nearest in the pool" in dom


@pytest.fixture
def compared(tmp_path: Path) -> Iterator[str]:
    """The address of MLflow's comparison of two tracked runs, in its own pages, served as `antidote ui` serves them."""
    store, ids = f"sqlite:///{tmp_path / 'mlflow.db'}", []
    for i, name in enumerate(NAMES):
        [one] = recipes.get(name)
        run = tmp_path / one.recipe.directory
        tracker = Tracker.start(run, store, "pages", rundir.parameters(one.recipe), rundir.tags(one.recipe))
        for epoch in range(1, 5):
            tracker.log({"kind": "train", "epoch": epoch, "loss": 4.0 / epoch - i / 10}, step=epoch)
            tracker.log({"kind": "eval", "epoch": epoch, "zeroshot/top1": 0.1 * epoch, "asr/stripes": 0.9 - 0.8 * i}, step=epoch)
        (run / "result.json").write_text(json.dumps({"zeroshot/top1": 0.4, "asr/stripes": 0.9 - 0.8 * i}))
        tracker.finish("finished", [run / "result.json"])
        ids.append(tracker.run_id)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    experiment = track._client(store).get_run(ids[0]).info.experiment_id
    with (tmp_path / "ui.log").open("w") as log:
        process = subprocess.Popen(track.ui(store, port), stdout=log, stderr=log)
        try:
            until = time.monotonic() + 90
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                    break
                except OSError:
                    assert process.poll() is None and time.monotonic() < until, (tmp_path / "ui.log").read_text()[-2000:]
                    time.sleep(0.5)
            words = f"runs={quote(json.dumps(ids))}&experiments={quote(json.dumps([experiment]))}"
            yield f"http://127.0.0.1:{port}/#/compare-runs?{words}"
        finally:
            process.terminate()
            process.wait(timeout=30)


def test_mlflow_compares_two_runs_by_what_differs_and_what_came_out(tmp_path: Path, compared: str) -> None:
    dom = seen(tmp_path, "mlflow", compared, wait_s=25, height=2600)
    assert all(recipes.get(name)[0].recipe.directory in dom for name in NAMES)
    assert "defense" in dom and "roclip" in dom and "asr/stripes" in dom and "zeroshot/top1" in dom
