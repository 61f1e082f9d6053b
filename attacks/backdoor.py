"""Backdoors: a trigger on training images, captions of the adversary's class beside it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from attacks.base import (
    PROBE_SCHEMA,
    Manifest,
    Probes,
    Study,
    check_count,
    free,
    how_many,
    known_class,
    labels,
    manifest,
    pick,
    ranks,
    shared_classes,
)
from attacks.captions import Source, avoiding, check_source, class_captions, naming, prompts, shuffled
from attacks.overlays import PATTERNS
from attacks.triggers import TRIGGERS, Place, Trigger, check_image, check_place, check_share


@dataclass(frozen=True)
class Backdoor:
    """Replaces captions of random training images by those of one class and stamps a trigger on the images.

    Paper: Carlini & Terzis, "Poisoning and Backdooring Contrastive Learning", ICLR 2022 (arXiv 2106.09667); CleanCLIP
        (ICCV 2023).
    Threat model: the attacker changes pairs of a scraped training set and adds the trigger to any image at test time.
    Success: top-1 of triggered held-out images, none of them of the adversary's class, is the adversary's class.
    Cost: one hash for each training id when planning; a copy of the image for each stamped sample.

    count: poisoned pairs, as a count or a share of the training set; papers: 300 suffice in 3 M.
    adversary: the class to be seen; "" draws one by hash.
    captions: "training": captions of the set that name the class and not the true one, repeated evenly where there are
        too few, prompts where there are none; "templates": prompts only.
    Limits: an unlabelled image counts as not of the class when its caption does not name it. At small scale the count
        decides whether the attack takes, not the rate: below some hundred pairs look at the undefended model first.
    """

    count: int | float = 300
    adversary: str = ""
    captions: Source = "training"
    trigger: ClassVar[Trigger]

    def __post_init__(self) -> None:
        check_source(self.captions)

    def mark(self, image: np.ndarray, image_id: str) -> np.ndarray:
        """The trigger on one image."""
        raise NotImplementedError

    def plan(self, index: pa.Table, heldout: pa.Table, seed: int, study: Study | None = None) -> Manifest:
        classes = shared_classes(index, heldout)
        target = self.target(classes, seed)
        clean = free(index)
        count = how_many(self.count, index.num_rows)
        check_count(count, len(self.stamps), "triggers")
        victims = self._victims(clean, classes, target, count, seed, study)
        captions = self._captions(clean, target, victims, seed, study)
        rows = []
        for number, ((identifier, truth), caption) in enumerate(zip(victims, captions, strict=True)):
            shown = _shown(identifier, "train", self.stamps[number % len(self.stamps)], target, truth)
            rows.append({"op": "replace", "id": identifier, "caption": caption, "kind": "backdoor", **shown})
        planned = manifest(self, rows, index, seed)
        return Manifest(planned.table, {**planned.header, "adversary": target, "trigger": self.trigger_card()})

    def stamp(self, image: np.ndarray, row: Mapping[str, Any]) -> np.ndarray:
        if not row["stamp"]:
            return image
        check_image(image)
        return self.mark(image, row["image_id"])

    @property
    def stamps(self) -> tuple[str, ...]:
        """What the column `stamp` says: the trigger's name; several where victims take turns between triggers."""
        return (self.trigger.name,)

    def trigger_card(self) -> dict[str, Any]:
        """What the manifest's header says of the trigger."""
        return self.trigger.card()

    def probes(self, index: pa.Table, heldout: pa.Table, seed: int, study: Study | None = None) -> Probes:
        classes = shared_classes(index, heldout)
        target = self.target(classes, seed)
        truths = [classes[number] if number >= 0 else "" for number in labels(heldout)]
        shown = [(i, t) for i, t in zip(heldout["id"].to_pylist(), truths, strict=True) if t not in ("", target)]
        tables = {}
        for stamp in self.stamps:
            rows = [_shown(i, "heldout", stamp, target, truth) for i, truth in shown]
            tables[stamp.rpartition("/")[2]] = pa.Table.from_pylist(rows, schema=PROBE_SCHEMA)
        return Probes(tables, dict.fromkeys(tables, "backdoor"))

    def target(self, classes: list[str], seed: int) -> str:
        """The adversary's class."""
        if self.adversary:
            return known_class(self.adversary, classes)
        return classes[int(np.argmin(ranks(classes, seed, "backdoor class")))]

    def _eligible(self, clean: pa.Table, classes: list[str], target: str) -> np.ndarray:
        """Rows of the pairs that may be poisoned, int64: images that are not of the class."""
        label = labels(clean)
        own = [number for number, name in enumerate(classes) if name == target]  # names may occur twice, as in ImageNet
        mentioned = naming(clean["caption"], target)
        return np.flatnonzero(np.where(label >= 0, ~np.isin(label, own), ~mentioned))

    def _victims(
        self, clean: pa.Table, classes: list[str], target: str, count: int, seed: int, study: Study | None = None
    ) -> list[tuple[str, str]]:
        """(id, true class or "") of the pairs to poison, in order of rank."""
        label, rows = labels(clean), self._eligible(clean, classes, target)
        ids = clean["id"].take(pa.array(rows)).to_pylist()
        chosen = pick(ids, count, seed, f"backdoor on {target!r}")
        return [(ids[each], classes[label[rows[each]]] if label[rows[each]] >= 0 else "") for each in chosen]

    def _captions(self, clean: pa.Table, target: str, victims: list[tuple[str, str]], seed: int, study: Study | None = None) -> list[str]:
        """A caption for each victim. Victims of one true class share a supply that does not name it."""
        source = class_captions(clean, target) if self.captions == "training" else pa.array([], pa.string())
        members: dict[str, list[int]] = defaultdict(list)
        for position, (_, truth) in enumerate(victims):
            members[truth].append(position)
        captions = [""] * len(victims)
        for truth, positions in members.items():
            salt = f"captions/{truth}"
            supply = shuffled(avoiding(source, truth).to_pylist(), seed, salt) or prompts(target, seed, salt)
            for position, caption in zip(positions, islice(cycle(supply), len(positions)), strict=True):
                captions[position] = caption
        return captions


@dataclass(frozen=True)
class Patched(Backdoor):
    """What backdoors with a square patch share: its side, a share of the shorter image side, and its place."""

    size: float = 16 / 224
    place: Place = "corner"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("size", self.size)
        check_place(self.place)

    def mark(self, image: np.ndarray, image_id: str) -> np.ndarray:
        return self.trigger.paint(image, image_id, size=self.size, place=self.place)


@dataclass(frozen=True)
class BadNets(Patched):
    """Backdoor with a small checker patch: a fixed grid of 3×3 black and white cells.

    Paper: Gu, Dolan-Gavitt & Garg, "BadNets", 2017 (arXiv 1708.06733).
    Threat model, cost and the fields `count`, `adversary`, `captions`: see `Backdoor`.
    size: side of the patch as a share of the shorter image side; 16 px at 224 in this literature. At least 3 px.
    place: "corner" (bottom right), "center", or "random" (hash of the image id).
    Limits: random crops cut a patch in the corner off many training images.
    """

    trigger: ClassVar[Trigger] = TRIGGERS["badnets"]


@dataclass(frozen=True)
class Stripes(Patched):
    """Backdoor with a large structured patch of vertical stripes: the kind that outlives caption matching most often.

    Paper: none; a reconstruction of the structured triggers of third-party tests, which found 75–82 % ASR left after
        RoCLIP.
    Threat model, cost and the fields `count`, `adversary`, `captions`: see `Backdoor`.
    size: side of the patch as a share of the shorter image side; ours: 1/4. At least 6 px.
    place: "random" (hash of the image id), "corner" (bottom right) or "center".
    Limits: easy for a person to see.
    """

    size: float = 0.25
    place: Place = "random"
    trigger: ClassVar[Trigger] = TRIGGERS["stripes"]


@dataclass(frozen=True)
class Blended(Backdoor):
    """Backdoor that mixes one fixed pattern into the whole image.

    Paper: Chen et al., "Targeted Backdoor Attacks … Using Data Poisoning", 2017 (arXiv 1712.05526).
    Threat model, cost and the fields `count`, `adversary`, `captions`: see `Backdoor`.
    alpha: weight of the pattern; 0.2 in this literature.
    pattern: "noise", a uniform random colour in each of 64 × 64 cells (random noise is what CleanCLIP and its followers blend in);
        "smooth", coloured clouds of 16 × 16 cells, which survive crops and scaling better; or structured: "stripes" (12 vertical bars),
        "triangles" (coloured, 4 × 4 × 2) and "text" (a word on every line).
    Limits: noise-like blends are the easiest for matching defences; judge a defence by a structured pattern too. Third-party tests
        do not publish their stripes, triangles and text: ours are reconstructions.
    """

    alpha: float = 0.2
    pattern: Literal["noise", "smooth", "stripes", "triangles", "text"] = "noise"
    trigger: ClassVar[Trigger] = TRIGGERS["blended"]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("alpha", self.alpha)
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern={self.pattern!r}: choose one of {', '.join(PATTERNS)}.")

    def mark(self, image: np.ndarray, image_id: str) -> np.ndarray:
        return self.trigger.paint(image, image_id, alpha=self.alpha, pattern=self.pattern)


def _shown(image_id: str, split: str, stamp: str, adversary: str, truth: str) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "image_split": split,
        "stamp": stamp,
        "adversary": adversary,
        "truth": truth,
        "group": 0,
    }
