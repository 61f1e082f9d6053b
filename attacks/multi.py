"""Several triggers for one class in one attack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from attacks.backdoor import Backdoor, BadNets, Blended, Stripes
from attacks.triggers import check_image
from attacks.whole_image import SIG, ColourFilter, WaNet

KNOWN: dict[str, type[Backdoor]] = {
    "badnets": BadNets,
    "stripes": Stripes,
    "blended": Blended,
    "sig": SIG,
    "wanet": WaNet,
    "tint": ColourFilter,
}


@dataclass(frozen=True)
class MultiTrigger(Backdoor):
    """Backdoor with several triggers for one class, each on its share of the poisoned pairs and each measured by itself.

    Paper: none for CLIP; the multi-trigger setting of backdoor surveys, where removing one trigger leaves the others.
    Threat model, cost and the fields `count`, `adversary`, `captions`: see `Backdoor`.
    triggers: two or more of badnets, stripes, blended, sig, wanet, tint; pairs take turns between them, one trigger each, at that
        attack's own defaults.
    Limits: `count` is that of all triggers together. For other strengths join attacks by `+` and give them one adversary.
    """

    triggers: tuple[str, ...] = ("badnets", "stripes", "blended")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "triggers", tuple(self.triggers))  # a list where it was read from JSON
        unknown = [name for name in self.triggers if name not in KNOWN]
        if unknown or len(self.triggers) < 2 or len(set(self.triggers)) < len(self.triggers):
            raise ValueError(f"triggers={list(self.triggers)}: name two or more different ones of {', '.join(KNOWN)}.")

    @property
    def stamps(self) -> tuple[str, ...]:
        return tuple(f"multi/{name}" for name in self.triggers)

    def trigger_card(self) -> dict[str, Any]:
        return {name: KNOWN[name]().trigger_card() for name in self.triggers}

    def stamp(self, image: np.ndarray, row: Mapping[str, Any]) -> np.ndarray:
        name = row["stamp"].rpartition("/")[2]
        if not name:
            return image
        check_image(image)
        if name not in self.triggers:
            raise ValueError(f"the manifest wants trigger {row['stamp']!r}, this attack has {', '.join(self.triggers)}.")
        return KNOWN[name]().mark(image, row["image_id"])
