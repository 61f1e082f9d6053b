"""Ready sweeps: `antidote sweep frequency`, `pool`, `poison-rate`, `paper-grid`, `matrix`, each a question that every user has.

A sweep is a function of a scale that returns what one would type: recipes and axes. Whatever is given on the command line wins over its
words, and `recipe=…` over its recipes: `antidote sweep frequency-smoke recipe=roclip-stripes-smoke seed=0`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from orchestrate import axes, recipes

SEEDS = "seed=0..2"  # an interval over seeds wants three
NAME = 100  # characters of a sweep's name: a directory of that name must be possible, with some behind it


@dataclass(frozen=True)
class Asked:
    """What a sweep is made of: a name, recipes by name, and words. `shows` says which question it answers."""

    name: str
    recipes: tuple[str, ...]
    words: tuple[str, ...]
    shows: str = ""


def frequency(scale: str) -> Asked:
    """how often must I match: attack success and accuracy against the number of plain epochs between robust ones"""
    return Asked("frequency", (f"roclip-blended-{scale}",), ("defense.every=1,2,4,8", *_counts(scale, 1, 3), SEEDS))


def pool(scale: str) -> Asked:
    """how large must the pool be: attack success, accuracy and matching time against its size"""
    return Asked("pool", (f"roclip-blended-{scale}",), ("defense.pool_size=0.005,0.02,0.1,0.3", *_counts(scale, 1), SEEDS))


def poison_rate(scale: str) -> Asked:
    """up to what poison rate does it hold: attack success against the poison count, a line a defence"""
    methods = tuple(f"{method}-blended-{scale}" for method in ("clip", "augmented", "roclip", "otcclip"))
    return Asked("poison-rate", methods, (*_counts(scale, 0.3, 1, 3, 10), SEEDS))


def paper_grid(scale: str) -> Asked:
    """frequency × pool size × poison count: the whole picture"""
    words = ("defense.every=1,2,4", "defense.pool_size=0.005,0.02,0.1", *_counts(scale, 0.5, 1, 3), SEEDS)
    return Asked("paper-grid", (f"roclip-blended-{scale}",), words)


def matrix(scale: str) -> Asked:
    """which defence holds against which attack: every attack against everything that trains, one seed"""
    methods = ("clip", "roclip", "otcclip", "safeclip", "augmented", "audited")  # cleanclip repairs, hint defends the probe
    attacks = [name for name in recipes.ATTACKS if name not in ("clean", "both")]  # the floor, and a pair of two that are in
    return Asked("matrix", tuple(f"{method}-{attack}-{scale}" for method in methods for attack in attacks), ("seed=0",))


SWEEPS: Mapping[str, Callable[[str], Asked]] = {
    "frequency": frequency,
    "pool": pool,
    "poison-rate": poison_rate,
    "paper-grid": paper_grid,
    "matrix": matrix,
}
PAPER_COUNT = 500  # poisoned pairs at the scale for which recipes.POISON sets none


def _counts(scale: str, *times: float) -> tuple[str, ...]:
    """Multiples of the scale's count, and the strength, that recipes.POISON takes for the same attack there."""
    poison = recipes.POISON.get(("both", scale), {})
    count, alpha = poison.get("attack.blended.count", PAPER_COUNT), poison.get("attack.blended.alpha")
    words = (f"attack.count={','.join(str(round(count * t)) for t in times)}",)
    return words if alpha is None else (*words, f"attack.alpha={alpha}")


def shows(name: str) -> str:
    return (SWEEPS[name].__doc__ or "").strip()


def ask(name: str, words: Sequence[str]) -> Asked:
    """A ready sweep's name, or a recipe's (or several, by comma), with words → what to sweep. ValueError for an unknown name."""
    given = {word.partition("=")[0]: word for word in words}
    ready = _ready(name)
    if ready is None:
        return Asked(called(name.split(",")), tuple(name.split(",")), tuple(words))
    base = tuple(given[axes.RECIPE].partition("=")[2].split(",")) if axes.RECIPE in given else ready.recipes
    kept = [word for word in ready.words if word.partition("=")[0] not in given]
    if given.keys() & {axes.RECIPE, "attack"}:  # the strength is of the attack that the sweep itself names
        kept = [word for word in kept if not word.startswith("attack.alpha=")]
    added = [word for word in words if word.partition("=")[0] != axes.RECIPE]
    return Asked(name, base, (*kept, *added), shows(ready.name))


def called(names: Sequence[str]) -> str:
    """The recipes' names, or those of their files, in one; where they are many, the first and how many more."""
    short = [name.removesuffix(".json").rpartition("/")[2] for name in names]
    whole = "+".join(short)
    return whole if len(whole) <= NAME else f"{short[0][:NAME]}+{len(short) - 1}"


def _ready(name: str) -> Asked | None:
    """A ready sweep, with `-SCALE` behind its name or at the default scale; None where no sweep is meant."""
    for sweep, make in SWEEPS.items():
        if name == sweep:
            return make(recipes.SCALE)
        scale = name.removeprefix(f"{sweep}-")
        if name.startswith(f"{sweep}-"):
            if scale not in recipes.SCALES:
                raise ValueError(f"no sweep is called {name!r}: give {sweep}, or {', '.join(f'{sweep}-{s}' for s in recipes.SCALES)}.")
            return make(scale)
    if close := get_close_matches(name, SWEEPS, n=1, cutoff=0.75):
        raise ValueError(f"no sweep is called {name!r}. Did you mean {close[0]}?")
    return None
