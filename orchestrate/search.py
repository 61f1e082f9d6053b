"""Which trial comes next: a list that is known beforehand (grid, random), or Optuna's choice by what has come out so far. No Ray."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from orchestrate import measure, sweepdir
from orchestrate.axes import Axis, Space, Trial, distinct, grid, sample, seeds
from orchestrate.measure import Result
from orchestrate.sweepdir import Options

Known = Callable[[Trial], Result | None]  # the result of a trial that is finished already


SETTLED = "settled"  # a setting's mark in Optuna's memory: the identities of its runs


class Search(Protocol):
    total: int  # trials, as far as can be known

    def next(self) -> Trial | None:
        """A trial to start now; None when there are no more."""

    def told(self, trial: Trial, result: Result | None) -> None:
        """What came of a trial; None where it failed or was stopped."""


class Listed:
    """Trials in order."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.total = len(trials)
        self.waiting = list(trials)

    def next(self) -> Trial | None:
        return self.waiting.pop(0) if self.waiting else None

    def told(self, trial: Trial, result: Result | None) -> None:
        pass


class Asked:
    """Settings that Optuna proposes, each run once for every seed; it is told the means over the seeds.

    Its memory is a file that is appended to, so a killed sweep goes on with what it has learnt. A setting that was being tried is
    proposed again first: its runs go on from their checkpoints, and what was finished is known.
    """

    def __init__(self, space: Space, options: Options, folder: Path, known: Known) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.space, self.options, self.known = space, options, known
        self.spans = [axis for axis in space.axes if axis.path != "seed"]
        self.total = options.samples * len(seeds(space))
        self.study = optuna.create_study(
            study_name="sweep",
            storage=JournalStorage(JournalFileBackend(str(folder / sweepdir.STUDY))),
            directions=["maximize", "minimize"],
            load_if_exists=True,
        )
        self._take_up(optuna.trial.TrialState)
        begun = len(self.study.trials)  # with the same seed a resumed sampler would propose what it has proposed
        samplers: dict[str, Any] = {"tpe": optuna.samplers.TPESampler, "nsga": optuna.samplers.NSGAIISampler}
        self.study.sampler = samplers[options.sampler](seed=options.seed + 1000 * begun)
        self.waiting: list[tuple[int, Trial]] = []
        self.results: dict[int, dict[str, Result | None]] = {}  # setting → identity → what came of it
        self.members: dict[int, list[str]] = {}
        self.proposed: dict[int, Any] = {}
        self.settled = {str(t.user_attrs[SETTLED]) for t in self.study.trials if SETTLED in t.user_attrs}

    def _take_up(self, state: Any) -> None:
        for old in [t for t in self.study.trials if t.state == state.RUNNING]:
            self.study.tell(old.number, state=state.FAIL)
            self.study.enqueue_trial(old.params, user_attrs={"again": True}, skip_if_exists=False)

    def next(self) -> Trial | None:
        while not self.waiting:
            if len(self.settled) + len(self.members) >= self.options.samples or len(self.study.trials) > 20 * self.options.samples:
                return None
            self._ask()
        return self.waiting.pop(0)[1]

    def _ask(self) -> None:
        """One more setting: its trials, less those that are finished, wait."""
        proposed = self.study.ask()
        point = {axis.path: self._value(proposed, axis) for axis in self.spans}
        trials = distinct(trial for seed in seeds(self.space) for trial in self.space.trials_at(point | seed))
        number = proposed.number
        self.proposed[number] = proposed
        self.members[number] = [t.recipe.identity for t in trials]
        self.results[number] = {}
        for trial in trials:
            if (result := self.known(trial)) is not None:
                self.told(trial, result)
            else:
                self.waiting.append((number, trial))

    @staticmethod
    def _value(proposed: Any, axis: Any) -> str:
        if isinstance(axis, Axis):
            return str(proposed.suggest_categorical(axis.path, list(axis.values)))
        if axis.whole:
            return str(proposed.suggest_int(axis.path, int(axis.low), int(axis.high), log=axis.log))
        return axis.text(proposed.suggest_float(axis.path, axis.low, axis.high, log=axis.log))

    def told(self, trial: Trial, result: Result | None) -> None:
        identity = trial.recipe.identity
        for number in [n for n, members in self.members.items() if identity in members]:
            self.results[number][identity] = result
            if len(self.results[number]) == len(self.members[number]):
                self._tell(number)

    def _tell(self, number: int) -> None:
        """Everything about a setting is known: the means over its runs, or that it has failed."""
        from optuna.trial import TrialState

        results, setting = list(self.results.pop(number).values()), "+".join(sorted(self.members.pop(number)))
        self.settled.add(setting)
        self.proposed.pop(number).set_user_attr(SETTLED, setting)
        up, down = (means(results, metric) for metric in (self.options.maximize, self.options.minimize))
        if up is None or down is None:
            self.study.tell(number, state=TrialState.FAIL)
        else:
            self.study.tell(number, [up, down])


def means(results: Sequence[Result | None], metric: str) -> float | None:
    """The mean of a metric; None where any run lacks it."""
    values = [None if result is None else measure.value(result, metric) for result in results]
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def listed(space: Space, options: Options) -> list[Trial]:
    """The trials known beforehand; none for Optuna, which finds them on the way."""
    if options.search == "grid":
        return grid(space)
    if options.search == "random":
        return sample(space, options.samples, options.seed)
    if not [axis for axis in space.axes if axis.path != "seed"]:
        raise ValueError("there is nothing to search: give an axis beside seed, such as defense.every=1..4.")
    return []


def drawn_from(space: Space, options: Options) -> list[str]:
    """What makes one search by Optuna another: the space, the objectives, the sampler. More samples continue the same search."""
    asked = [options.maximize, options.minimize, options.sampler, str(options.seed)]
    first = [trial.recipe.identity for trial in sample(space, 1)]
    return [json.dumps([sorted(map(str, space.axes)), sorted(space.fixed.items()), asked, first])]
