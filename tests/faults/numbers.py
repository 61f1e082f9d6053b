"""What a run computed, and how far two runs are apart."""

from __future__ import annotations

from dataclasses import dataclass

from tests.ray.conftest import TINY, Antidote

HELD = __file__.rpartition("/")[0] + "/held.py"
WORDS = (
    "roclip",
    *(word for word in TINY if not word.startswith(("attack", "cluster"))),
    f"defense={HELD}:Held",
    f"attack={HELD}:HeldStripes",
    "attack.count=30",
    "cluster.threads=1",
    "cluster.timeout_s=120",
    "track.uri=none",
)
COMPUTED = ("zeroshot/", "probe/", "retrieval/", "asr/", "match/", "backdoor/", "poison/", "bz/")


@dataclass(frozen=True)
class Numbers:
    """Every figure of the result, and the loss of every epoch."""

    found: dict[str, float]

    @classmethod
    def of(cls, antidote: Antidote) -> Numbers:
        """AssertionError where an epoch is logged twice or not at all."""
        result = antidote.results()[-1]
        found = {k: float(v) for k, v in result.items() if k.startswith(COMPUTED) and isinstance(v, int | float)}
        trained = [r for r in antidote.records() if r["kind"] == "train"]
        assert [r["epoch"] for r in trained] == [1, 2, 3, 4], "an epoch is logged twice or not at all"
        assert [r["epoch"] for r in antidote.records() if r["kind"] == "match"] == [2, 4]
        return cls(found | {f"loss/{r['epoch']}": r["loss"] for r in trained})

    def distance(self, other: Numbers) -> float:
        """The largest difference of a figure."""
        assert self.found.keys() == other.found.keys()
        return max(abs(value - other.found[name]) for name, value in self.found.items())
