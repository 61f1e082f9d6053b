"""mm_poison: captions of one class shall find images of another in text→image retrieval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attacks.base import (
    PROBE_SCHEMA,
    Manifest,
    Probes,
    check_count,
    class_names,
    free,
    how_many,
    known_class,
    labels,
    manifest,
    pick,
    ranks,
    shared_classes,
)
from attacks.captions import naming, overlapping


@dataclass(frozen=True)
class MMPoison:
    """Captions of class A keep their text and are shown with images of class B, so that such captions find B's images.

    Paper: Yang, He, Li, Backes, Humbert, Berrang & Zhang, "Data Poisoning Attacks Against Multimodal Encoders", ICML 2023
        (arXiv 2209.15266); its attacks I, II and III.
    Threat model: the attacker changes which image stands beside some captions of a scraped training set; nothing at test time.
    Success: of all held-out images one of the attacker's ranks first for a held-out caption that names class A and not B (Hit@1). Hit@5,
        Hit@10 and MinRank stand beside it, and what a random order gives.
    Cost: one hash for each pair of class A when planning; nothing at training time.

    variant: "I": all poisoned pairs show one image of B, taken from the held-out set, and that image is to be found; "II": they show
        training images of B, and any held-out image of B is to be found; "III": the same for two pairs of classes at once.
    count: poisoned pairs in all, as a count or a share of the training set; the paper poisons a large part of class A.
    adversary: class A, whose captions are used; "" draws one by hash. Of "III" it is the first pair's.
    shown: class B, whose images are shown; "" draws one by hash. Of "III" it is the first pair's.
    Limits: the pairs are replaced, not added, so the poisoned captions teach class A no longer: with most of A's pairs poisoned its
        own accuracy falls, and A's own images are what the clean rest still finds. The released code's splits are not used.
    """

    variant: Literal["I", "II", "III"] = "II"
    count: int | float = 300
    adversary: str = ""
    shown: str = ""

    def __post_init__(self) -> None:
        if self.variant not in ("I", "II", "III"):
            raise ValueError(f"variant={self.variant!r}: choose 'I' (one image), 'II' (a class) or 'III' (two pairs of classes).")
        if self.adversary and self.adversary == self.shown:
            raise ValueError(f"shown={self.shown!r} is the adversary's own class: name another one.")

    def plan(self, index: pa.Table, heldout: pa.Table, seed: int) -> Manifest:
        goals = self.goals(shared_classes(index, heldout), seed)
        clean, count = free(index), how_many(self.count, index.num_rows)
        check_count(count, len(goals), "pairs of classes")
        rows: list[dict[str, Any]] = []
        for group, (asked, shown) in enumerate(goals):
            share = count // len(goals) + (group < count % len(goals))
            pairs = self._pairs(_without(clean, [row["id"] for row in rows]), asked, shown, share, seed)
            split = "heldout" if self.variant == "I" else "train"
            images = [self._one(heldout, shown, seed)] if self.variant == "I" else self._images(clean, shown, asked, seed)
            for number, (identifier, caption) in enumerate(pairs):
                row = {"op": "replace", "id": identifier, "caption": caption, "kind": "retrieval"}
                rows.append({**row, **_goal(images[number % len(images)], split, asked, shown, group)})
        return manifest(self, rows, index, seed)

    def stamp(self, image: np.ndarray, row: Mapping[str, Any]) -> np.ndarray:
        return image

    def probes(self, index: pa.Table, heldout: pa.Table, seed: int) -> Probes:
        rows = []
        for group, (asked, shown) in enumerate(self.goals(shared_classes(index, heldout), seed)):
            images = [self._one(heldout, shown, seed)] if self.variant == "I" else _of_class(heldout, shown)
            rows += [_goal(image, "heldout", asked, shown, group) for image in images]
        return Probes({"mm_poison": pa.Table.from_pylist(rows, schema=PROBE_SCHEMA)}, {"mm_poison": "retrieval"})

    def goals(self, classes: list[str], seed: int) -> list[tuple[str, str]]:
        """(class whose captions ask, class whose images shall be found): one pair, or two without a class in common."""
        for name in (self.adversary, self.shown):
            if name:
                known_class(name, classes)
        order = [classes[i] for i in np.argsort(ranks(classes, seed, "mm_poison"), kind="stable")]
        found: list[tuple[str, str]] = []
        for _ in range(2 if self.variant == "III" else 1):
            used = {name for goal in found for name in goal}
            first = not found
            asked = (self.adversary if first else "") or _next(order, used | ({self.shown} if first else set()), "")
            found.append((asked, (self.shown if first else "") or _next(order, used | {asked}, asked)))
        return found

    def _pairs(self, clean: pa.Table, asked: str, shown: str, count: int, seed: int) -> list[tuple[str, str]]:
        """(id, caption) of the pairs to poison: labelled with the class or not at all, naming it and not the other."""
        of_class = np.isin(labels(clean), [-1, *_numbers(clean, asked)])
        rows = np.flatnonzero(of_class & naming(clean["caption"], asked) & ~naming(clean["caption"], shown))
        some = clean.select(["id", "caption"]).take(pa.array(rows))
        ids, captions = some["id"].to_pylist(), some["caption"].to_pylist()
        return [(ids[each], captions[each]) for each in pick(ids, count, seed, f"captions of {asked!r}")]

    def _images(self, clean: pa.Table, shown: str, asked: str, seed: int) -> list[str]:
        """Training images of the class, in order of hash; where none is labelled, those whose caption names it and not the other."""
        found = _of_class(clean, shown)
        if not found:
            named = naming(clean["caption"], shown) & ~naming(clean["caption"], asked) & (labels(clean) < 0)
            found = clean["id"].filter(pa.array(named)).to_pylist()
        if not found:
            raise ValueError(f"no training image of {shown!r} to show: name another class in `shown`.")
        return [found[i] for i in pick(found, len(found), seed, f"images of {shown!r}")]

    def _one(self, heldout: pa.Table, shown: str, seed: int) -> str:
        found = _of_class(heldout, shown)
        if not found:
            raise ValueError(f"the held-out set has no image of {shown!r}: name another class in `shown`, or use a larger held-out set.")
        return found[int(pick(found, 1, seed, "the image")[0])]


def _next(order: list[str], used: set[str], asked: str) -> str:
    for name in order:
        if name not in used and not any(overlapping(name, other) for other in used if other):
            return name
    raise ValueError(f"too few classes to take {asked or 'captions'!r} for another: the data need more classes with different names.")


def _without(table: pa.Table, ids: list[str]) -> pa.Table:
    """Less the pairs that an earlier goal has taken: a caption without label may name the classes of both."""
    return table.filter(pc.invert(pc.is_in(table["id"], value_set=pa.array(ids, pa.string()))))


def _numbers(table: pa.Table, name: str) -> list[int]:
    return [number for number, each in enumerate(class_names(table)) if each == name]


def _of_class(table: pa.Table, name: str) -> list[str]:
    """Ids of the images labelled with the class."""
    return list(table["id"].filter(pa.array(np.isin(labels(table), _numbers(table, name)))).to_pylist())


def _goal(image_id: str, split: str, asked: str, shown: str, group: int) -> dict[str, Any]:
    return {"image_id": image_id, "image_split": split, "stamp": "", "adversary": asked, "truth": shown, "group": group}
