"""The options of a sweep: each one that is typed does something, or is refused with the mend."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrate import cli, cli_cluster, cli_sweeps, sweepdir
from orchestrate.sweepdir import Asking, Event, Options

WORDS = ("defense.every=1,2", "seed=0..2")
STORED = Asking("frequency", ("roclip-smoke",), WORDS, Options(search="random", samples=3, concurrent=2))


def asked(*typed: str) -> Asking:
    return cli_sweeps._asking(cli.parsed(["sweep", *typed]))


@pytest.fixture
def folder(tmp_path: Path) -> str:
    sweepdir.begin(tmp_path, STORED, "00", [])
    return str(tmp_path)


@pytest.mark.parametrize(("typed", "concurrent"), [([], 2), (["--concurrent", "1"], 1), (["--concurrent", "0"], 0)])
def test_a_sweep_goes_on_as_it_was_asked_for_with_as_many_trials_at_once_as_now(folder: str, typed: list[str], concurrent: int):
    again = asked(folder, "--resume", *typed)
    assert again.options == Options(search="random", samples=3, concurrent=concurrent)
    assert (again.name, again.recipes, again.words) == (STORED.name, STORED.recipes, STORED.words)


@pytest.mark.parametrize("typed", [["--samples", "20"], ["--search", "grid"], ["--asha"], ["--minimize", "asr", "--concurrent", "1"]])
def test_a_sweep_that_goes_on_takes_no_other_option(folder: str, typed: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.main(["sweep", folder, "--resume", *typed]) == 1
    assert f"takes --concurrent only: leave {typed[0]}, or type" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "mend"),
    [
        (["--samples", "20"], "--samples says nothing to --search grid: give --search random or --search optuna"),
        (["--seed", "0"], "--seed says nothing to --search grid"),
        (["--sampler", "tpe"], "--sampler says nothing to --search grid: give --search optuna with it"),
        (["--search", "random", "--sampler", "nsga"], "--sampler says nothing to --search random"),
    ],
)
def test_an_option_that_the_search_does_not_look_at_is_refused(typed: list[str], mend: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["sweep", "roclip-smoke", *WORDS, *typed, "--dry"]) == 1
    assert mend in capsys.readouterr().err


def test_without_options_a_sweep_has_the_defaults_that_its_help_names(capsys: pytest.CaptureFixture[str]):
    assert asked("roclip-smoke", *WORDS).options == Options()
    with pytest.raises(SystemExit):
        cli.main(["sweep", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in ("search", "samples", "seed", "sampler", "maximize"):
        assert f"(default: {getattr(Options(), name)})" in text
    drawn = asked("roclip-smoke", *WORDS, "--search", "optuna", "--samples", "4", "--seed", "7", "--sampler", "nsga", "--asha")
    assert drawn.options == Options(search="optuna", samples=4, seed=7, sampler="nsga", asha="zeroshot/top1")


@pytest.mark.parametrize(
    ("states", "code", "verdict"),
    [
        (["done", "done"], 0, "finished"),
        (["done", "failed"], 1, "finished"),
        (["skipped", "failed"], 1, "finished"),
        (["failed", "failed"], 1, "failed"),
        (["stopped", "skipped"], 0, "finished"),
        ([], 0, "finished"),
    ],
)
def test_a_sweep_says_at_its_end_that_trials_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], states: list[str], code: int, verdict: str
):
    sweepdir.begin(tmp_path, STORED, "00", [])
    for i, state in enumerate(states):
        sweepdir.note(tmp_path, Event(str(i), state))
    monkeypatch.setitem(sys.modules, "orchestrate.sweep", SimpleNamespace(run_sweep=lambda *_, **__: tmp_path))
    assert cli.main(["sweep", "roclip-smoke", *WORDS]) == code
    out, err = capsys.readouterr()
    assert out == f"sweep: {tmp_path}\n", "what a job's results are found by is said before"
    assert (f"{states.count('failed')} of 2 trials failed; {tmp_path}/trials.jsonl" in err) is bool(code)
    assert sweepdir.verdict(sweepdir.events(tmp_path).values()) == verdict


@pytest.mark.parametrize(
    ("state", "log", "brought"),
    [
        ("FAILED", "sweep: /far/s-sweep-0\n", True),
        ("FAILED", "no memory\n", False),
        ("STOPPED", "sweep: /far/s-sweep-0\n", False),
    ],
)
def test_the_results_of_a_sweep_with_failed_trials_come_back(tmp_path: Path, state: str, log: str, brought: bool):
    job, pulled = SimpleNamespace(id="a", state=state, message="exit code 1"), []
    jobs: Any = SimpleNamespace(follow=lambda *_: job, log=lambda _: log, pull=lambda places, *_: pulled.append(places) or [])
    assert cli_cluster._watch(jobs, "a", tmp_path) == 1
    assert pulled == [["/far/s-sweep-0"]] * brought
