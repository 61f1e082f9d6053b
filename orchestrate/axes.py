"""Axes: what a sweep varies, read off command-line words, and the recipes that they make. No Ray.

    defense.every=1,2,4          three values              data.classes=dog,cat        one list, no axis
    seed=0..2                    0, 1 and 2                data.classes=dog;dog,cat    two lists
    train.lr=0.001..0.1          a span to draw from       data.path=choice:a,b        a choice, said so
    train.lr=log:1e-4..1e-2      the same, by decades      data.path=x,y;              one text with a comma in it
    train.lr=log:1e-4..1e-2:5    five values of it         attack.count=30..300:4      four counts

Every value passes the recipe's own reading of its field, so a wrong one is refused with the path before anything runs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin

from orchestrate.recipe import LEAD, METHODS, Recipe, Resolved, field_at, parse_overrides
from orchestrate.values import coerce

Make = Callable[[Mapping[str, str]], list[Resolved]]  # overrides → recipes: a name, a suite or a file, ready to be varied

NUMBER = r"[+-]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?"
SPAN = re.compile(rf"(log:)?\s*({NUMBER})\s*\.\.\s*({NUMBER})\s*(?::\s*(\d+))?")
MOST = 10_000  # values of an axis and trials of a sweep: more is a slip of the keyboard
RECIPE = "recipe"  # the axis over named recipes
SEED = "seed"


@dataclass(frozen=True)
class Axis:
    """Values to try, as one would type them."""

    path: str
    values: tuple[str, ...]

    def draw(self, rng: random.Random) -> str:
        return rng.choice(self.values)

    def __str__(self) -> str:
        return f"{self.path}={';'.join(self.values) if any(',' in v for v in self.values) else ','.join(self.values)}"


@dataclass(frozen=True)
class Span:
    """A range to draw from, both ends included; `log`: every decade is as likely as every other."""

    path: str
    low: float
    high: float
    log: bool = False
    whole: bool = False

    def draw(self, rng: random.Random) -> str:
        ends = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = rng.uniform(*ends) if self.log or not self.whole else rng.randint(int(self.low), int(self.high))
        return self.text(math.exp(value) if self.log else value)

    def text(self, value: float) -> str:
        value = min(max(value, self.low), self.high)
        return str(round(value)) if self.whole else repr(float(f"{value:.6g}"))

    def points(self, count: int) -> tuple[str, ...]:
        """`count` values from end to end, evenly spaced (by their logarithm)."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        even = [low + (high - low) * i / max(1, count - 1) for i in range(count)]
        return tuple(dict.fromkeys(self.text(math.exp(x) if self.log else x) for x in even))

    def __str__(self) -> str:
        ends = "..".join(str(int(x)) if self.whole else repr(x) for x in (self.low, self.high))
        return f"{self.path}={'log:' * self.log}{ends}"


@dataclass(frozen=True)
class Trial:
    """One recipe of a sweep and what sets it apart: axis → value as typed."""

    recipe: Recipe
    changed: Mapping[str, str]

    @property
    def label(self) -> str:
        return " ".join(f"{path}={value}" for path, value in self.changed.items()) or self.recipe.name


@dataclass(frozen=True)
class Space:
    """What is varied: `bases` (recipes by name), overrides that all share, and the axes."""

    bases: Mapping[str, Make]
    fixed: Mapping[str, str]
    axes: tuple[Axis | Span, ...]
    _methods: dict[tuple[str, str], list[tuple[str | None, str | None]]] = field(default_factory=dict, compare=False, repr=False)

    def trials_at(self, point: Mapping[str, str]) -> list[Trial]:
        """The recipes of one point. An option of a method that a point's recipe has not (`defense.every` of `clip`) is left out there.

        `read` has made sure that at least one recipe of the sweep knows each option.
        """
        names = [point[RECIPE]] if RECIPE in point else list(self.bases)
        found = []
        for name in names:
            wanted = {k: v for k, v in {**self.fixed, **point}.items() if k != RECIPE}
            chosen = {k: v for k, v in wanted.items() if k in METHODS}
            uses = self.methods(name, chosen)
            given = {k: v for k, v in wanted.items() if any(_knows(k, *use) for use in uses)}
            try:
                members = self.bases[name](given)
            except ValueError as error:
                raise ValueError(f"{' '.join(f'{k}={v}' for k, v in point.items()) or name}: {error}") from None
            several = len(self.bases) > 1 or len(members) > 1
            for one in members:
                changed = {RECIPE: one.recipe.name} if several else {}
                found.append(Trial(one.recipe, changed | {k: v for k, v in point.items() if k in given}))
        return found

    def methods(self, name: str, chosen: Mapping[str, str]) -> list[tuple[str | None, str | None]]:
        """(attack, defence) of each recipe that base `name` makes when these methods are chosen."""
        key = (name, json.dumps(chosen, sort_keys=True))
        if key not in self._methods:
            recipes = [one.recipe for one in self.bases[name](chosen)]
            self._methods[key] = [(r.attack.use if r.attack else None, r.defense.use if r.defense else None) for r in recipes]
        return self._methods[key]


def read(bases: Mapping[str, Make], words: Sequence[str]) -> Space:
    """Words such as `defense.every=1,2,4 train.epochs=8` → what is fixed and what varies. ValueError names word and mend."""
    given = parse_overrides(words)
    axes: dict[str, Axis | Span] = {RECIPE: Axis(RECIPE, tuple(bases))} if len(bases) > 1 else {}
    fixed: dict[str, str] = {}
    for key in sorted(given, key=lambda key: key not in METHODS):  # what the options mean depends on the methods
        path, hint = _field(key, _uses(bases, fixed, axes))
        path = key if path.partition(".")[0] in METHODS else path  # `attack.targeted.copies` may be `attack.copies` in some recipes only
        if path in axes or path in fixed:
            raise ValueError(f"{path} is given twice: as {key} and by its other name.")
        found = _values(given[key], hint, path)
        if isinstance(found, str):
            fixed[path] = found if path in METHODS else _checked(found, hint, path)
        elif path == "name" or path.partition(".")[0] in ("cluster", "track") or path == "data.cache":
            raise ValueError(f"{path} does not change what a run computes, so it is no axis: give it one value.")
        else:
            axes[path] = found
    _uses(bases, fixed, axes)  # an unknown method is told now, not after the first hundred recipes
    order = {path: i for i, key in enumerate(given) for path in (key, key + "." + LEAD.get(key, ""))}
    return Space(bases, fixed, tuple(sorted(axes.values(), key=lambda axis: order.get(axis.path, -1))))


def grid(space: Space) -> list[Trial]:
    """Every combination, in the order of the axes, the last one fastest; equal identities once."""
    endless = [axis for axis in space.axes if isinstance(axis, Span) and not _countable(axis)]
    if endless:
        raise ValueError(
            f"{endless[0]} is a span without end of values: say how many ({endless[0]}:5), list them, or draw with --search random."
        )
    values = [axis.values if isinstance(axis, Axis) else axis.points(int(axis.high - axis.low) + 1) for axis in space.axes]
    if (count := math.prod(map(len, values))) > MOST:
        raise ValueError(f"{count:,} combinations are more than {MOST:,}: take fewer values, or draw some with --search random.")
    points = (dict(zip([axis.path for axis in space.axes], point, strict=True)) for point in itertools.product(*values))
    return distinct(trial for point in points for trial in space.trials_at(point))


def sample(space: Space, count: int, seed: int = 0) -> list[Trial]:
    """`count` settings drawn at random, each once for every value of the axis `seed`, if there is one.

    Draw i depends on (seed, i) alone: more samples later are the same ones and some more.
    """
    if count < 1:
        raise ValueError(f"--samples {count}: give the number of settings to draw, 1 or more.")
    drawn = [axis for axis in space.axes if axis.path != SEED]
    if not drawn:
        raise ValueError("there is nothing to draw: give an axis beside seed, such as defense.every=1,2,4 or train.lr=log:1e-4..1e-2.")
    seen: dict[str, list[Trial]] = {}
    for i in range(20 * count):  # a small space has fewer settings than were asked for
        rng = random.Random(f"{seed}/{i}")
        point = {axis.path: axis.draw(rng) for axis in drawn}
        trials = distinct(trial for value in seeds(space) for trial in space.trials_at(point | value))
        seen.setdefault("+".join(trial.recipe.identity for trial in trials), trials)
        if len(seen) == count:
            break
    return distinct(trial for trials in seen.values() for trial in trials)


def seeds(space: Space) -> list[dict[str, str]]:
    """The repetitions of a setting: one for each value of the axis `seed`, else one."""
    for axis in space.axes:
        if axis.path == SEED:
            values = axis.values if isinstance(axis, Axis) else axis.points(int(axis.high - axis.low) + 1)
            return [{SEED: value} for value in values]
    return [{}]


def distinct(trials: Iterable[Trial]) -> list[Trial]:
    """Trials of different identities, the first of each."""
    found: dict[str, Trial] = {}
    for trial in trials:
        found.setdefault(trial.recipe.identity, trial)
    return list(found.values())


def identity(parts: Iterable[str]) -> str:
    """A sweep's identity, 16 hex digits: of its trials' identities in any order, or of what it is drawn from."""
    return hashlib.blake2b("\n".join(sorted(parts)).encode(), digest_size=8).hexdigest()


# --- one word ------------------------------------------------------------------------------------------------------------------


def _values(text: str, hint: Any, path: str) -> Axis | Span | str:
    """A word's right side: an axis, a span, or (as it was) one value."""
    said, body = text.startswith("choice:"), text.removeprefix("choice:").strip()
    if not said and _numeric(hint):
        if match := SPAN.fullmatch(text.strip()):
            return _span(match, hint, path)
        if text.startswith("log:") or (".." in text and "," not in text):
            raise ValueError(f"{path}={text!r}: a range is written 0..2, 0.1..0.5:5 or log:1e-4..1e-2.")
    if said and not body:
        items = []
    elif ";" in body:
        items = [item.strip() for item in body.split(";") if item.strip()]
    elif (_listed(hint) and not said) or "," not in body:
        items = [body]
    else:
        items = [value for item in body.split(",") if item.strip() for value in _expanded(item.strip(), hint, path)]
    if not items:
        if said or ";" in text:
            raise ValueError(f"{path}={text!r} has no values: write {path}=a,b.")
        return body
    if path not in METHODS:
        for item in items:
            _checked(item, hint, path)
    return items[0] if len(items) == 1 else Axis(path, tuple(dict.fromkeys(items)))


def _checked(text: str, hint: Any, path: str) -> str:
    """The text, once the recipe's own reading has taken it."""
    coerce(text, hint, path)
    return text


def _expanded(item: str, hint: Any, path: str) -> Iterator[str]:
    """An item of a list of values: itself, or all of a whole range (`0..2,7`)."""
    match = SPAN.fullmatch(item) if _numeric(hint) else None
    if match is None:
        yield item
        return
    span = _span(match, hint, path)
    if isinstance(span, Span) and not _countable(span):
        raise ValueError(f"{path}: {item} in a list has no end of values: say how many, as {item}:5.")
    yield from span.values if isinstance(span, Axis) else span.points(int(span.high - span.low) + 1)


def _span(match: re.Match[str], hint: Any, path: str) -> Axis | Span:
    log, low, high, count = match.groups()
    whole = hint is int or (_either(hint) and all(re.fullmatch(r"[+-]?\d+", x) for x in (low, high)))
    for end in (low, high):
        coerce(end, hint, path)
    span = Span(path, float(low), float(high), bool(log), whole)
    if not span.low < span.high:
        raise ValueError(f"{path}={match[0]!r}: the range runs from the smaller to the larger, such as {high}..{low}.")
    if log and span.low <= 0:
        raise ValueError(f"{path}={match[0]!r}: a logarithmic range begins above 0.")
    if count is None:
        return span
    if not 2 <= int(count) <= MOST:
        raise ValueError(f"{path}={match[0]!r}: take 2 to {MOST:,} values of a range.")
    return Axis(path, span.points(int(count)))


def _countable(span: Span) -> bool:
    return span.whole and not span.log and span.high - span.low < MOST


def _numeric(hint: Any) -> bool:
    return hint in (int, float) or _either(hint)


def _either(hint: Any) -> bool:
    """A count or a share."""
    return {int, float} <= set(get_args(hint)) and get_origin(hint) is not tuple


def _listed(hint: Any) -> bool:
    return get_origin(hint) is tuple or any(get_origin(arg) is tuple for arg in get_args(hint))


# --- which field ---------------------------------------------------------------------------------------------------------------


def _uses(bases: Mapping[str, Make], fixed: Mapping[str, str], axes: Mapping[str, Axis | Span]) -> list[tuple[str | None, str | None]]:
    """(attack, defence) of every recipe the sweep can come to."""
    space = Space(bases, {}, ())
    choices = []
    for method in METHODS:
        axis = axes.get(method)
        values = list(axis.values) if isinstance(axis, Axis) else [fixed[method]] if method in fixed else [None]
        choices.append([{} if value is None else {method: value} for value in values])
    chosen = [attack | defense for attack, defense in itertools.product(*choices)]
    return list(dict.fromkeys(use for name in bases for one in chosen for use in space.methods(name, one)))


def _field(key: str, uses: Sequence[tuple[str | None, str | None]]) -> tuple[str, Any]:
    """The field that a key means in the first recipe that has it."""
    error: ValueError | None = None
    for use in uses:
        try:
            return field_at(key, *use)
        except ValueError as unknown:
            error = error or unknown
    assert error is not None, "a sweep has at least one recipe"
    raise error


def _knows(path: str, attack: str | None, defense: str | None) -> bool:
    try:
        field_at(path, attack, defense)
    except ValueError:
        return False
    return True
