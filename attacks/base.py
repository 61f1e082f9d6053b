"""What an attack is: a plan on paper (the manifest) and a pure function on one image.

`plan` reads metadata, and for a few attacks a `Study` of the clean set, and returns a `Manifest`: one row for each
training pair that it adds or changes. Pixels are never rewritten on disk; whoever reads a row that the manifest names
calls `stamp` on the decoded image, in training and in evaluation alike.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

FORMAT = "antidote-manifest-1"

MANIFEST_SCHEMA = pa.schema(
    [
        ("op", pa.string()),  # "add": a new pair; "replace": the pair `id` of the training index changes
        ("id", pa.string()),  # sample id of the resulting pair
        ("image_id", pa.string()),  # whose pixels it shows
        ("image_split", pa.string()),  # "train" or "heldout": where image_id lives
        ("caption", pa.string()),  # the caption it is trained with
        ("stamp", pa.string()),  # name of the trigger that `stamp` applies, "" for none; see `trigger_of`
        ("kind", pa.string()),  # "targeted", "backdoor", "retrieval" or "text": how success is measured
        ("adversary", pa.string()),  # class the attacker wants to see
        ("truth", pa.string()),  # class the image really shows, "" where unknown
        ("group", pa.int32()),  # number of the target, or of the pair of classes, else 0
    ]
)

PROBE_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("image_split", pa.string()),
        ("stamp", pa.string()),
        ("adversary", pa.string()),
        ("truth", pa.string()),
        ("group", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Probes:
    """What measures an attack's success: for each name one table (PROBE_SCHEMA) and the way to count it.

    `how[name]` is "targeted" (the image itself, no trigger at test time), "backdoor" (the image with the trigger; its
    clean floor is the same image without), or, in text→image retrieval, "retrieval" (captions of the adversary's class
    shall find the table's images, group by group) or "text" (captions of other classes with `texts[name]` behind them
    shall find the table's images; the floor is the same captions without).
    """

    tables: dict[str, pa.Table] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)  # of "text" probes: the trigger word or sentence


@dataclass(frozen=True)
class Manifest:
    """The poison, exactly: `table` (MANIFEST_SCHEMA) and a `header` (JSON: attack, parameters, seed, count, rate)."""

    table: pa.Table
    header: dict[str, Any]

    @property
    def count(self) -> int:
        """Poisoned pairs."""
        return int(self.table.num_rows)

    @property
    def rate(self) -> float:
        """Poisoned pairs as a share of the training set after poisoning."""
        return float(self.header.get("rate", 0.0))

    def part_of(self, identifier: str, stamp: str, other: str) -> str:
        """Which part planted this pair: its trigger, else the part that its id names; `other` where a clean pair was re-captioned."""
        named = (part["name"] for part in self.header["parts"] if identifier.startswith(f"poison-{part['name']}-"))
        return trigger_of(stamp) or max(named, key=len, default=other)  # "a-b" rather than "a"

    def write(self, path: str) -> None:
        """Parquet with the header in the schema metadata; the same plan gives the same bytes."""
        meta = {b"antidote": json.dumps(self.header, sort_keys=True).encode()}
        pq.write_table(self.table.replace_schema_metadata(meta), path, compression="zstd")

    @staticmethod
    def read(path: str) -> Manifest:
        table = pq.read_table(path)
        raw = (table.schema.metadata or {}).get(b"antidote")
        if raw is None:
            raise ValueError(f"{path} is no manifest: it has no header. `antidote poison` and `antidote run` write manifests.")
        header = json.loads(raw)
        if header.get("format") != FORMAT:
            raise ValueError(f"{path} is a manifest of format {header.get('format')!r}; this version reads {FORMAT!r}.")
        missing = [name for name in MANIFEST_SCHEMA.names if name not in table.column_names]
        if missing:
            raise ValueError(f"{path} lacks the manifest column(s) {', '.join(missing)}.")
        return Manifest(table.replace_schema_metadata(None).select(MANIFEST_SCHEMA.names).cast(MANIFEST_SCHEMA), header)


class Study(Protocol):
    """What an attacker finds out on a copy of the clean set: its pixels, where objects are, what a surrogate CLIP sees.

    `split` is "train" or "heldout". Features are float32 and unit norm. `surrogate` fixes which CLIP `…features`, `transport` and
    `pull_back` mean: trained in place on `pairs` pairs of the clean training set for `epochs`.
    """

    def surrogate(self, pairs: int, epochs: int) -> None: ...

    def images(self, split: str, ids: Sequence[str]) -> np.ndarray:
        """uint8 (n, S, S, 3), as stamps see them."""
        ...

    def masks(self, split: str, ids: Sequence[str], folder: str = "") -> np.ndarray:
        """bool (n, S, S), true on the main object: from `folder`/ID.png, else exact where the set knows, else by saliency."""
        ...

    def image_features(self, split: str, ids: Sequence[str]) -> np.ndarray: ...

    def text_features(self, captions: Sequence[str]) -> np.ndarray: ...

    def transport(self, split: str, image_id: str, captions: Sequence[str]) -> np.ndarray:
        """Optimal-transport distance between an image's patches and each caption's words, float32 (n,)."""
        ...

    def pull_back(self, images: np.ndarray, loss: Callable[[np.ndarray], tuple[float, np.ndarray]]) -> tuple[float, np.ndarray]:
        """float32 (n, S, S, 3) in 0–255, and features (n, d) → (loss, its gradient (n, d)): the loss, and its gradient in pixels."""
        ...


def studied(attack: Any, study: Study | None) -> list[Study]:
    """What `plan` and `probes` of an attack take beside (index, heldout, seed): a study where the attack has `studies = True`."""
    if not getattr(attack, "studies", False):
        return []
    if study is None:
        raise ValueError(f"{type(attack).__name__} plans on a surrogate or on pixels: plan it with a study of the set, as `antidote` does.")
    return [study]


class Attack(Protocol):
    """A frozen dataclass: its fields are its hyper-parameters.

    `index` and `heldout` are Arrow tables with at least id (string), caption (string), label (int32, −1 unknown) and
    schema metadata `classes` (JSON list of class names, read by `class_names`). An attack with `studies = True` takes a `Study`
    as a fourth argument of `plan` and `probes`. What its stamp needs besides the row it leaves in the header's `materials`.
    """

    def plan(self, index: pa.Table, heldout: pa.Table, seed: int) -> Manifest: ...

    def stamp(self, image: np.ndarray, row: Mapping[str, Any]) -> np.ndarray:
        """uint8 (H, W, 3) → uint8 (H, W, 3), pure; `stamp` and `image_id` of the row are read, and its part's `materials` if there are."""
        ...

    def probes(self, index: pa.Table, heldout: pa.Table, seed: int) -> Probes: ...


def class_names(table: pa.Table) -> list[str]:
    """Class names that the labels of an index point to."""
    raw = (table.schema.metadata or {}).get(b"classes")
    return list(json.loads(raw)) if raw else []


def shared_classes(index: pa.Table, heldout: pa.Table) -> list[str]:
    """The class names of both tables; a training set without any (scraped pairs) takes those of the held-out set."""
    train, held = class_names(index), class_names(heldout)
    if not held:
        raise ValueError("the held-out set has no class names, so an attack cannot be measured: give it labels and `classes`.")
    if train and train != held:
        raise ValueError(
            f"training and held-out set name different classes ({len(train)}: {', '.join(train[:3])}, …; {len(held)}: "
            f"{', '.join(held[:3])}, …). Give both the same list in the same order, or the training set none."
        )
    return held


def labels(table: pa.Table) -> np.ndarray:
    """Labels, int64 (n,); −1 is unknown, and every label of a table without class names is."""
    if not class_names(table):
        return np.full(table.num_rows, -1, dtype=np.int64)
    return np.asarray(table["label"].fill_null(-1).to_numpy(), dtype=np.int64)


def known_class(name: str, classes: Sequence[str]) -> str:
    """`name` if it is one of `classes`, else ValueError with the nearest ones."""
    if name in classes:
        return name
    near = difflib.get_close_matches(name, classes, n=3, cutoff=0.4) or list(classes[:3])
    raise ValueError(f"adversary {name!r} is no class of this data; near it: {', '.join(near)}.")


def free(index: pa.Table) -> pa.Table:
    """The rows an attack may replace or quote: all but those that an earlier part of a combined attack has replaced.

    `combine.Several` marks those in a bool column `taken`; counts and shares stay those of the whole index.
    """
    return index.filter(pc.invert(index["taken"])) if "taken" in index.column_names else index


def trigger_of(stamp: str) -> str:
    """The trigger a stamp names, "corrupt/support" of "corrupt/support/7": what stands behind a second slash is the draw of one picture."""
    return "/".join(stamp.split("/")[:2])


def ranks(ids: Sequence[str], seed: int, salt: str) -> np.ndarray:
    """A pseudo-random rank for each id, uint64 (n,), from (id, seed, salt) alone: not from order, shard or process."""
    key = hashlib.blake2b(f"{seed}/{salt}".encode(), digest_size=16).digest()
    digests = b"".join(hashlib.blake2b(i.encode(), digest_size=8, key=key).digest() for i in ids)
    return np.frombuffer(digests, dtype="<u8")


def pick(ids: Sequence[str], count: int, seed: int, salt: str) -> np.ndarray:
    """Positions of `count` ids chosen by hash, in order of rank, int64 (count,). ValueError when there are too few."""
    if count > len(ids):
        raise ValueError(f"{salt}: {count} samples wanted, only {len(ids)} to choose from. Lower the count or use a larger set.")
    return np.argsort(ranks(ids, seed, salt), kind="stable")[:count]


def how_many(amount: float, total: int) -> int:
    """A count (an int, 0 for none) or a share of `total` (a float up to 1.0, the whole) as a count."""
    if isinstance(amount, bool) or amount < 0:
        raise ValueError(f"count {amount!r} is neither a count nor a share: give a whole number, or a share between 0 and 1.")
    if isinstance(amount, float) and amount == 1:  # 1 is one, 1.0 the whole
        return total
    if isinstance(amount, float) and 0 < amount < 1:
        share = round(amount * total)
        if share == 0:  # a plan without poison would pass for a defence that works
            raise ValueError(f"share {amount:g} of {total} pairs is less than one pair: give a larger share, or a count.")
        return share
    if float(amount) != int(amount):
        raise ValueError(f"count {amount!r} is neither a whole number nor a share between 0 and 1.")
    return int(amount)


def check_count(count: int, among: int, what: str) -> None:
    """ValueError where some of `what`, each of them measured, would get no pair. No pair at all is a clean run, and fine."""
    if 0 < count < among:
        raise ValueError(f"{count} poisoned pair(s) for {among} {what}, each of which is measured: {among} at least, or 0 for none.")


def manifest(attack: Any, rows: list[dict[str, Any]], index: pa.Table, seed: int) -> Manifest:
    """Rows → Manifest, with the header every manifest carries. Rate = poisoned / training pairs after poisoning."""
    table = pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)
    added = sum(row["op"] == "add" for row in rows)
    total = index.num_rows + added
    header = {
        "format": FORMAT,
        "attack": type(attack).__name__,
        "parameters": dataclasses.asdict(attack),
        "seed": seed,
        "count": len(rows),
        "rate": len(rows) / total if total else 0.0,
        "pairs": total,
    }
    return Manifest(table, header)
