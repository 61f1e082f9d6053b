"""The options of a sweep: each one that is typed does something, or is refused with the mend."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrate import cli, cli_sweeps, sweepdir
from orchestrate.sweepdir import Asking, Options

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
