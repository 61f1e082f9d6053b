"""A sweep's directory, runs/<name>-sweep-<hash8>/: what was asked, and what became of each trial. No Ray.

    sweep.json      what was asked: recipes, words, search; and the trials, as far as they are known beforehand
    trials.jsonl    one line an event: running, done, skipped (finished before), failed (and why), stopped (early, by ASHA)
    study.log       Optuna's memory (--search optuna)
    metrics.jsonl   how the sweep went on; a copy goes to MLflow's parent run
    report.html     the picture

Runs are where all runs are. A trial that is finished is known by its run's result.json, whoever ran it, so this directory may be lost
without losing a number.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orchestrate import journal
from orchestrate.axes import Trial
from orchestrate.secrets import masked_tree

SWEEP, TRIALS, STUDY = "sweep.json", "trials.jsonl", "study.log"
RUNNING, DONE, SKIPPED, FAILED, STOPPED = "running", "done", "skipped", "failed", "stopped"
FINISHED = (DONE, SKIPPED)


@dataclass(frozen=True)
class Options:
    """How a sweep searches. `maximize` and `minimize` are the two objectives; `asha` the metric that stops trials early, or ""."""

    search: str = "grid"  # grid, random, optuna
    samples: int = 20  # settings drawn (random, optuna)
    seed: int = 0  # of the draws
    sampler: str = "tpe"  # optuna: tpe, nsga
    asha: str = ""
    concurrent: int = 0  # at most so many trials at once; 0 = as many as fit
    maximize: str = "zeroshot/top1"
    minimize: str = "asr"

    def __post_init__(self) -> None:
        for name, known in (("search", ("grid", "random", "optuna")), ("sampler", ("tpe", "nsga"))):
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)}: choose one of {', '.join(known)}.")
        if self.samples < 1 or self.concurrent < 0:
            raise ValueError("--samples must be 1 or more, --concurrent 0 (as many as fit) or more.")
        if self.asha.startswith(("asr", "probe", "match", "poison", "seconds")):
            raise ValueError(
                f"--asha {self.asha}: this metric cannot be trusted early. An attack is learnt late, so a low success early on proves "
                "nothing, and the probe is fitted at the end only. Take zeroshot/top1 or retrieval/r1."
            )


@dataclass(frozen=True)
class Asking:
    """A sweep as asked: enough to begin it again from its directory."""

    name: str
    recipes: tuple[str, ...]
    words: tuple[str, ...]
    options: Options = field(default_factory=Options)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Event:
    """What is known of a trial. `run` is its directory's name beside the sweep's."""

    identity: str
    state: str
    run: str = ""
    changed: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""
    seconds: float = 0.0

    @property
    def label(self) -> str:
        return " ".join(f"{path}={value}" for path, value in self.changed.items()) or self.run


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[Path]:
    """The directory, held against a second driver."""
    with journal.held(folder, "the sweep "):
        yield folder


def begin(folder: Path, asking: Asking, identity: str, trials: Sequence[Trial]) -> None:
    """Write down what was asked."""
    listed = [{"identity": t.recipe.identity, "run": t.recipe.directory, "changed": dict(t.changed)} for t in trials]
    content = masked_tree({**asking.as_dict(), "identity": identity, "trials": listed})
    journal.replace(folder / SWEEP, json.dumps(content, indent=1, ensure_ascii=False).encode())


def note(folder: Path, event: Event) -> None:
    journal.append(folder / TRIALS, {**asdict(event), "time": time.time()})


def is_sweep(folder: Path) -> bool:
    return (folder / SWEEP).is_file()


def read(folder: Path) -> dict[str, Any]:
    """sweep.json. ValueError where there is none."""
    if not is_sweep(folder):
        raise ValueError(f"{folder} is no sweep: it has no {SWEEP}. `antidote sweep RECIPE key=a,b` makes one.")
    tree = journal.parse((folder / SWEEP).read_bytes())
    if tree is None:
        raise ValueError(f"{folder / SWEEP} is no JSON: type the sweep's command again, its finished runs are kept.")
    return tree


def asked(folder: Path) -> Asking:
    tree = read(folder)
    return Asking(tree["name"], tuple(tree["recipes"]), tuple(tree["words"]), Options(**tree["options"]))


def events(folder: Path) -> dict[str, Event]:
    """Identity → the last that is known of the trial, in the order in which they were asked for."""
    known = {t["identity"]: Event(t["identity"], "", t["run"], t["changed"]) for t in read(folder)["trials"]}
    for line in journal.read(folder / TRIALS):
        line.pop("time", None)
        known[line["identity"]] = Event(**line)
    return known


def verdict(ended: Iterable[Event]) -> str:
    """What MLflow is told of a sweep that came to its end: "failed" where no trial did anything else, else "finished"."""
    return "failed" if {event.state for event in ended} == {FAILED} else "finished"


def runs(folder: Path) -> list[Path]:
    """The directories of the sweep's runs that have a result."""
    found = [folder.parent / event.run for event in events(folder).values() if event.run]
    return [run for run in dict.fromkeys(found) if (run / "result.json").is_file()]
