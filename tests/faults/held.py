"""Methods that wait where a test wants to strike: the stripes attack and RoCLIP, each with a door in it.

Their numbers are those of the originals. A door `at("match")` is open unless the desk (the folder that ANTIDOTE_DESK names, known to every
process of the cluster) holds a file `hold-match`; who comes to a closed one says so in `at-match-<pid>` and waits, with a limit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from attacks.backdoor import Stripes
from defenses.base import Batch, Features, Match, Matcher
from defenses.matching import CosineMatcher
from defenses.roclip import RoCLIP

LIMIT_S = 120


def at(phase: str) -> None:
    desk = Path(os.environ.get("ANTIDOTE_DESK", "/nonexistent"))
    if not (desk / f"hold-{phase}").exists():
        return
    (desk / f"at-{phase}-{os.getpid()}").touch()
    end = time.monotonic() + LIMIT_S
    while (desk / f"hold-{phase}").exists() and time.monotonic() < end:
        time.sleep(0.02)


def late() -> None:
    """The one actor that takes `straggle-SECONDS` off the desk is late by so much at every call."""
    desk = Path(os.environ.get("ANTIDOTE_DESK", "/nonexistent"))
    mine = desk / f"straggler-{os.getpid()}"
    for offer in desk.glob("straggle-*"):
        try:
            offer.rename(mine)
            mine.write_text(offer.name.partition("-")[2])
        except FileNotFoundError:
            continue  # the other was quicker
    if mine.exists():
        time.sleep(float(mine.read_text()))


@dataclass(frozen=True)
class HeldMatcher(CosineMatcher):
    def match(self, images: Features, pool: Features, own: Features | None = None) -> Match:
        at("match")
        late()
        return super().match(images, pool, own)


@dataclass(frozen=True)
class Held(RoCLIP):
    """RoCLIP with doors in training and matching.

    Source: this test.
    Assumes: what RoCLIP does.
    Cost: RoCLIP's.
    Limits: none of its own.
    """

    def matcher(self, epoch: int) -> Matcher | None:
        plain = super().matcher(epoch)
        return plain and HeldMatcher(**{f.name: getattr(plain, f.name) for f in fields(plain)})  # type: ignore[arg-type]

    def augment(self, batch: Batch) -> Batch:
        at("train")
        return super().augment(batch)


@dataclass(frozen=True)
class HeldStripes(Stripes):
    """The stripes backdoor with a door in evaluation.

    Source: this test.
    Threat model: the stripes attack's.
    Cost: the same.
    Limits: none of its own.
    """

    def stamp(self, image: np.ndarray, row: Mapping[str, Any]) -> np.ndarray:
        if str(row["image_id"]).startswith("scene-test"):
            at("evaluate")
        return super().stamp(image, row)
