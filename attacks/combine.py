"""Several attacks on one training set, each under its own name; one attack alone is a set of one.

The part's name is what the rest of the house sees: it stands in the manifest's `stamp` (alone, or before a slash where a
part has several triggers), in the ids of added pairs and as the probe's name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attacks.base import Attack, Manifest, Probes, Study, manifest, studied
from attacks.materials import materials


@dataclass(frozen=True)
class Several:
    """Plans its parts in order; a later part neither replaces nor quotes a pair that an earlier one has replaced.

    Each part draws from its own seed, made from the run's seed and the part's name, so a part chooses alike alone and
    in company (but for pairs that another part took first).
    """

    parts: tuple[tuple[str, Attack], ...]
    materials: Mapping[str, Any] = field(default_factory=dict, compare=False)  # part → what its plan left for its stamp

    def __post_init__(self) -> None:
        names = [name for name, _ in self.parts]
        if not names or "" in names:
            raise ValueError("a combined attack needs at least one part, and each part a name.")
        if len(set(names)) < len(names):
            raise ValueError(f"two parts of the attack have one name ({', '.join(names)}): give each its own.")

    @property
    def studies(self) -> bool:
        return any(getattr(attack, "studies", False) for _, attack in self.parts)

    def plan(self, index: pa.Table, heldout: pa.Table, seed: int, study: Study | None = None) -> Manifest:
        taken: set[str] = set()
        rows: list[dict[str, Any]] = []
        headers = []
        for name, attack in self.parts:
            part = attack.plan(_marked(index, taken), heldout, part_seed(seed, name), *studied(attack, study))
            planned = [_renamed(row, name) for row in part.table.to_pylist()]
            replaced = [row["id"] for row in planned if row["op"] == "replace"]
            _check_apart(name, replaced, taken)
            taken.update(replaced)
            rows += planned
            headers.append({"name": name, **part.header})
        whole = manifest(self, rows, index, seed)
        return Manifest(whole.table, {**whole.header, **_summary(headers, whole.header["pairs"])})

    def stamp(self, image: np.ndarray, row: Mapping[str, Any]) -> np.ndarray:
        wanted, _, _ = row["stamp"].partition("/")
        if not wanted:
            return image
        for name, attack in self.parts:
            if name == wanted:
                return attack.stamp(image, {**row, "materials": self.materials[name]} if name in self.materials else row)
        names = ", ".join(name for name, _ in self.parts)
        raise ValueError(f"the manifest wants trigger {wanted!r}, this attack has {names}: use the attack it was planned with.")

    def probes(self, index: pa.Table, heldout: pa.Table, seed: int, study: Study | None = None) -> Probes:
        tables: dict[str, pa.Table] = {}
        how: dict[str, str] = {}
        texts: dict[str, str] = {}
        for name, attack in self.parts:
            own = attack.probes(index, heldout, part_seed(seed, name), *studied(attack, study))
            for inner, table in own.tables.items():
                shown = name if len(own.tables) == 1 else f"{name}-{inner}"
                rows = [{**row, "stamp": _stamp(row["stamp"], name)} for row in table.to_pylist()]
                tables[shown] = pa.Table.from_pylist(rows, schema=table.schema)
                how[shown] = own.how[inner]
                texts |= {shown: own.texts[inner]} if inner in own.texts else {}
        return Probes(tables, how, texts)


def part_seed(seed: int, name: str) -> int:
    """The seed of a part: 32 bits of a hash of the run's seed and the part's name."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest(), "little")


def rebuild(header: Mapping[str, Any], resolve: Callable[[str], Callable[..., Any]]) -> Several:
    """The attack a manifest was planned with, so that its triggers are stamped; `resolve`: "BadNets" → the class."""
    if "parts" not in header:
        raise ValueError("this manifest's header has no parts: plan the attack through `Several`, as `antidote poison` does.")
    parts = tuple((part["name"], resolve(part["attack"])(**part["parameters"])) for part in header["parts"])
    return Several(parts, materials(header))


def _marked(index: pa.Table, taken: set[str]) -> pa.Table:
    if not taken:
        return index
    return index.append_column("taken", pc.is_in(index["id"], value_set=pa.array(sorted(taken), pa.string())))


def _renamed(row: dict[str, Any], name: str) -> dict[str, Any]:
    """The row under the part's name. Replaced pairs keep their id, added ones must not meet those of another part."""
    identifier = row["id"]
    if row["op"] == "add" and not identifier.startswith(f"poison-{name}-"):
        identifier = f"poison-{name}-{identifier.removeprefix('poison-')}"
    return {**row, "id": identifier, "stamp": _stamp(row["stamp"], name)}


def _stamp(stamp: str, name: str) -> str:
    """A trigger under its part's name; what stands behind a slash is the attack's own: which of its triggers."""
    own, slash, detail = stamp.partition("/")
    return f"{name}{slash}{detail}" if own else ""


def _check_apart(name: str, replaced: list[str], taken: set[str]) -> None:
    twice = taken.intersection(replaced)
    if twice:
        raise ValueError(
            f"attack {name!r} replaces {len(twice)} pair(s) that an earlier part has replaced, such as {min(twice)!r}. "
            "Let its plan choose from `attacks.base.free(index)`."
        )


def _summary(headers: list[dict[str, Any]], pairs: int) -> dict[str, Any]:
    """What the whole header says of its parts; every rate is a share of the training set as it is after all parts."""
    common = ("format", "pairs")
    parts = [{key: value for key, value in header.items() if key not in common} for header in headers]
    for part in parts:
        part["rate"] = part["count"] / pairs if pairs else 0.0
    names = [part["name"] for part in parts]
    return {
        "attack": "+".join(names),
        "parameters": {part["name"]: part["parameters"] for part in parts},
        "parts": parts,
    }
