"""Which trial comes next, and what is remembered, without Ray: the tests play the part of the trials."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from orchestrate import axes, recipes, search, sweepdir
from orchestrate.axes import Space, Trial
from orchestrate.board import Board
from orchestrate.recipe import flatten
from orchestrate.search import Asked, Listed
from orchestrate.sweepdir import DONE, FAILED, SKIPPED, Asking, Event, Options

WORDS = ("train.lr=log:1e-4..1e-1", "defense.every=1..8", "seed=0,1")


def space(*words: str) -> Space:
    return axes.read({"roclip-smoke": lambda given: recipes.get("roclip-smoke", given)}, words or WORDS)


def outcome(trial: Trial) -> dict[str, Any]:
    """Best near lr 1e-2; rarer matching is more accurate and more easily fooled."""
    values = flatten(trial.recipe.as_dict())
    lr, every = values["train.lr"], values["defense.every"]
    return {"zeroshot/top1": 0.5 + 0.02 * every - abs(lr - 1e-2), "asr/x": 0.1 * every + 0.01 * values["seed"]}


def unknown(trial: Trial) -> None:
    return None


def play(asked: Asked, steps: int = 10_000) -> list[Trial]:
    """Run trials as they come, one at a time."""
    done = []
    while len(done) < steps and (trial := asked.next()) is not None:
        asked.told(trial, outcome(trial))
        done.append(trial)
    return done


@pytest.mark.parametrize("sampler", ["tpe", "nsga"])
def test_every_setting_runs_on_every_seed_and_optuna_learns_the_means(tmp_path: Path, sampler: str):
    asked = Asked(space(), Options(search="optuna", samples=6, sampler=sampler), tmp_path, unknown)
    done = play(asked)
    assert asked.total == 12 == len(done) and [t.recipe.seed for t in done] == [0, 1] * 6
    for trial in asked.study.trials:
        point = {"train.lr": trial.params["train.lr"], "defense.every": trial.params["defense.every"]}
        assert trial.values[1] == pytest.approx(0.1 * point["defense.every"] + 0.005)


def test_a_killed_search_goes_on_with_what_it_was_trying(tmp_path: Path):
    options = Options(search="optuna", samples=5)
    first = Asked(space(), options, tmp_path, unknown)
    done = play(first, 5)  # two settings, and one seed of the third
    hanging = first.next()
    finished = {t.recipe.identity: outcome(t) for t in done}
    second = Asked(space(), options, tmp_path, lambda trial: finished.get(trial.recipe.identity))
    rest = play(second)
    assert rest[0].recipe.identity == hanging.recipe.identity, "what was tried is proposed again, less what is finished"
    ran = [t.recipe.identity for t in (*done, *rest)]
    assert len(ran) == 10 == len(set(ran)), "no trial repeated, none lost"


def test_more_samples_later_go_on_from_the_same_memory(tmp_path: Path):
    few = play(Asked(space(), Options(search="optuna", samples=2), tmp_path, unknown))
    more = play(Asked(space(), Options(search="optuna", samples=4), tmp_path, unknown))
    assert len(few) == len(more) == 4 and not {t.recipe.identity for t in few} & {t.recipe.identity for t in more}
    kinds = [search.drawn_from(space(), Options(search="optuna", samples=n, seed=s)) for n, s in ((2, 0), (4, 0), (2, 1))]
    assert kinds[0] == kinds[1] != kinds[2]


def test_a_failed_setting_counts_and_the_search_goes_on(tmp_path: Path):
    asked = Asked(space(), Options(search="optuna", samples=3), tmp_path, unknown)
    for i in range(6):
        trial = asked.next()
        assert trial is not None
        asked.told(trial, None if i == 0 else outcome(trial))
    assert asked.next() is None
    assert [t.state.name for t in asked.study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]


def test_a_small_space_is_searched_once(tmp_path: Path):
    finished: dict[str, Any] = {}
    asked = Asked(
        space("defense.every=1,2", "seed=0,1"), Options(search="optuna", samples=9), tmp_path, lambda t: finished.get(t.recipe.identity)
    )
    ran = []
    while (trial := asked.next()) is not None:
        finished[trial.recipe.identity] = outcome(trial)
        asked.told(trial, finished[trial.recipe.identity])
        ran.append(trial.recipe.identity)
    assert len(ran) == 4 == len(set(ran))


def test_lists_are_given_in_order():
    trials = search.listed(space("defense.every=1,2"), Options())
    listed = Listed(trials)
    assert [listed.next(), listed.next(), listed.next()] == [*trials, None]
    assert len(search.listed(space(), Options(search="random", samples=3))) == 6
    with pytest.raises(ValueError, match="nothing to search"):
        search.listed(space("seed=0,1"), Options(search="optuna"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"search": "greedy"}, "grid, random, optuna"),
        ({"sampler": "cma"}, "tpe, nsga"),
        ({"samples": 0}, "--samples"),
        ({"asha": "asr/stripes"}, "cannot be trusted early"),
        ({"asha": "probe/top1"}, "cannot be trusted early"),
    ],
)
def test_options_are_checked(given, message):
    with pytest.raises(ValueError, match=message):
        Options(**given)


# --- the sweep's directory and its log ---------------------------------------------------------------------------------------------


def test_a_sweep_is_asked_again_from_its_directory(tmp_path: Path):
    asking = Asking("frequency", ("roclip-smoke",), WORDS, Options(search="random", samples=3, asha="retrieval/r1"))
    sweepdir.begin(tmp_path, asking, "00", axes.sample(space(), 3))
    assert sweepdir.asked(tmp_path) == asking
    assert [event.state for event in sweepdir.events(tmp_path).values()] == [""] * 6
    with pytest.raises(ValueError, match="is no sweep"):
        sweepdir.asked(tmp_path / "other")


def test_two_drivers_do_not_share_a_sweep(tmp_path: Path):
    with (
        sweepdir.claimed(tmp_path / "sweep"),
        pytest.raises(ValueError, match="another process is running the sweep"),
        sweepdir.claimed(tmp_path / "sweep"),
    ):
        pass


def test_the_log_says_what_ended_and_what_is_best():
    out = io.StringIO()
    board = Board("test", 4, 2, "zeroshot/top1", "asr", stream=out)
    board.end(Event("a", SKIPPED, changed={"seed": "0"}), {"zeroshot/top1": 0.5, "asr/x": 0.1})
    board.begin("b")
    board.end(Event("b", DONE, changed={"seed": "1"}, seconds=30.0), {"zeroshot/top1": 0.6, "asr/x": 0.5})
    board.end(Event("c", FAILED, changed={"seed": "2"}, reason="no\nmemory", seconds=1.0), None)
    board.begin("d")
    board.summary()
    lines = out.getvalue().splitlines()
    assert lines[0] == "1/4  skipped seed=0  zero-shot 50.0 %, ASR 10.0 %"
    assert lines[1] == "2/4  done    seed=1  zero-shot 60.0 %, ASR 50.0 %  30.0 s"
    assert lines[2] == "3/4  failed  seed=2  no memory  1.0 s"
    assert "1 done, 1 running, 1 finished before, 1 failed, 0 to go" in lines[3]
    assert "best so far: seed=0 (zero-shot 50.0 %, ASR 10.0 %)" in lines[3] and "about" in lines[3]
    assert board.left() == pytest.approx(30, abs=1)
