"""Targeted data poisoning: single images learn the captions of another class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from attacks.base import (
    PROBE_SCHEMA,
    Manifest,
    Probes,
    Study,
    free,
    how_many,
    known_class,
    labels,
    manifest,
    ranks,
    shared_classes,
)
from attacks.captions import Source, avoiding, check_source, class_captions, overlapping, prompts, shuffled


class Target(NamedTuple):
    """An image of class `truth` that shall be taken for `adversary`."""

    image_id: str
    truth: str
    adversary: str


@dataclass(frozen=True)
class Quotes:
    """The captions of a training set by the class they name (`class_captions`), found once for all targets."""

    index: pa.Table
    found: dict[str, pa.Array] = field(default_factory=dict)

    def of(self, name: str) -> pa.Array:
        if name not in self.found:
            self.found[name] = class_captions(free(self.index), name)
        return self.found[name]


@dataclass(frozen=True)
class Targeted:
    """Adds pairs that show one image of the held-out set with captions of a class it does not belong to.

    Paper: Carlini & Terzis, "Poisoning and Backdooring Contrastive Learning", ICLR 2022 (arXiv 2106.09667); TDPA in
        RoCLIP and SafeCLIP.
    Threat model: the attacker adds pairs to a scraped training set, knows the test image and changes neither model nor
        test input.
    Success: zero-shot top-1 of that very image is the adversary's class.
    Cost: planning reads captions once for each adversary class; nothing at training time.

    targets: images attacked; 16 in this literature (93.75 % = 15/16). Spread evenly over true classes and over
        adversary classes.
    copies: poisoned pairs for each target, as a count or as a share of the training set; papers: 15 to 512 for 100 k
        to 1 M pairs.
    captions: "training": distinct captions of the set that name the adversary's class and not the true one, topped up
        with prompts where there are too few; "templates": prompts only.
    adversary: one class for all targets; "" draws another for each target, as the papers do.
    Limits: prompts repeat where there are more copies than prompts (24). A target is itself a held-out image: clean
        accuracy on the held-out set counts it too. Synonyms of the true class in a caption are not seen.
    """

    targets: int = 16
    copies: int | float = 30
    captions: Source = "training"
    adversary: str = ""

    def __post_init__(self) -> None:
        check_source(self.captions)
        if self.targets < 1:
            raise ValueError(f"targets={self.targets}: an attack needs at least one target.")

    def plan(self, index: pa.Table, heldout: pa.Table, seed: int, study: Study | None = None) -> Manifest:
        copies = how_many(self.copies, index.num_rows)
        targets = self.choose(index, heldout, seed, study)
        quotes = Quotes(index)
        rows = []
        for group, target in enumerate(targets):
            captions = self._captions(target, quotes if self.captions == "training" else None, copies, seed, study)
            for number, caption in enumerate(captions):
                identifier = f"poison-targeted-{group:02d}-{number:04d}"
                rows.append({"op": "add", "id": identifier, "caption": caption, "kind": "targeted", **_shown(target, group)})
        return manifest(self, rows, index, seed)

    def stamp(self, image: np.ndarray, row: Mapping[str, Any]) -> np.ndarray:
        return image

    def probes(self, index: pa.Table, heldout: pa.Table, seed: int, study: Study | None = None) -> Probes:
        rows = [_shown(target, group) for group, target in enumerate(self.choose(index, heldout, seed, study))]
        return Probes({"targeted": pa.Table.from_pylist(rows, schema=PROBE_SCHEMA)}, {"targeted": "targeted"})

    def choose(self, index: pa.Table, heldout: pa.Table, seed: int, study: Study | None = None) -> list[Target]:
        """The targets in order of their group number. True classes and adversary classes each take turns."""
        classes = shared_classes(index, heldout)
        label = labels(heldout)
        allowed = np.ones(len(classes), dtype=bool)
        if self.adversary:
            known_class(self.adversary, classes)
            allowed = np.array([not overlapping(name, self.adversary) for name in classes])
        rows = np.flatnonzero((label >= 0) & allowed[label])
        if len(rows) < self.targets:
            raise ValueError(
                f"{self.targets} targets wanted, but the held-out set has {len(rows)} labelled images to choose from. "
                "Lower `targets` or use a larger held-out set."
            )
        ids = heldout["id"].take(pa.array(rows)).to_pylist()
        chosen = take_turns(label[rows], ranks(ids, seed, "targets"), ranks(classes, seed, "turns"))[: self.targets]
        used: Counter[str] = Counter()
        targets = []
        for position in chosen:
            truth = classes[label[rows[position]]]
            adversary = self.adversary or _draw_adversary(ids[position], truth, classes, used, seed)
            used[adversary] += 1
            targets.append(Target(ids[position], truth, adversary))
        return targets

    def _captions(self, target: Target, quotes: Quotes | None, copies: int, seed: int, study: Study | None) -> list[str]:
        """The captions of one target's pairs; `quotes` is None where only prompts are wanted."""
        quoted: list[str] = []
        if quotes is not None:
            own = avoiding(quotes.of(target.adversary), target.truth).to_pylist()
            quoted = shuffled(own, seed, f"captions/{target.image_id}")[:copies]
        made = prompts(target.adversary, seed, f"prompts/{target.image_id}")
        return quoted + list(islice(cycle(made), copies - len(quoted)))


def take_turns(label: np.ndarray, rank: np.ndarray, class_rank: np.ndarray) -> np.ndarray:
    """Positions (n,) ordered so that classes take turns; label int64 and rank uint64 (n,), class_rank (classes,)."""
    by_class = np.lexsort((rank, label))
    _, first, count = np.unique(label[by_class], return_index=True, return_counts=True)
    turn = np.arange(len(label)) - np.repeat(first, count)
    return by_class[np.lexsort((class_rank[label[by_class]], turn))]


def _draw_adversary(image_id: str, truth: str, classes: list[str], used: Counter[str], seed: int) -> str:
    """Of the classes drawn least so far, the first by hash that shares no caption with the truth."""
    rank = ranks([f"{image_id}/{name}" for name in classes], seed, "adversary")
    for number in np.lexsort((rank, np.array([used[name] for name in classes]))).tolist():
        name: str = classes[number]
        if not overlapping(truth, name):
            return name
    raise ValueError(f"no class to take {truth!r} for: the data need a second class whose name differs.")


def _shown(target: Target, group: int) -> dict[str, Any]:
    return {
        "image_id": target.image_id,
        "image_split": "heldout",
        "stamp": "",
        "adversary": target.adversary,
        "truth": target.truth,
        "group": group,
    }
