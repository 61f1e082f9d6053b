"""Raw rows: what every source returns, and what sources share: column names, quarantine, unique ids."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from orchestrate.data.files import File, Listing

RAW = pa.schema(
    [
        ("id", pa.string()),
        ("path", pa.string()),  # absolute local path or URI
        # "": an image file; "parquet:COLUMN": row `row` of that Parquet; "tar": bytes [row, row + size) of that tar
        ("where", pa.string()),
        ("row", pa.int64()),  # for an image file: the row of the table that named it
        ("size", pa.int64()),  # bytes; of the whole file for Parquet
        ("caption", pa.string()),  # null: none given
        ("captions", pa.list_(pa.string())),  # all captions, null where `caption` is the only one
        ("label", pa.int32()),  # −1 unknown
        ("class", pa.string()),  # null: not given
    ]
)
QUARANTINE = pa.schema([("id", pa.string()), ("path", pa.string()), ("row", pa.int64()), ("reason", pa.string())])

IDS = ("id", "sample_id", "uid", "key", "image_id")
CAPTIONS = ("caption", "captions", "title", "text", "sentence", "sentences", "description", "alt_text", "txt")
LABELS = ("label", "cls", "class_id")
CLASSES = ("class", "class_name", "classname")
IMAGE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

# The same image with several captions: its id carries a hash of the caption, so that it does not depend on row order.
VARIANT = re.compile(r"#c[0-9a-f]{8}$")


def variant(image: str, caption: str) -> str:
    """The id of a pair of an image that has several captions."""
    return f"{image}#c{hashlib.blake2b(caption.encode(), digest_size=4).hexdigest()}"


@dataclass(frozen=True)
class Wish:
    """What the recipe says about columns ("" = find out)."""

    image_column: str = ""
    caption_column: str = ""


@dataclass(frozen=True)
class Source:
    """What one split's files hold."""

    rows: pa.Table  # RAW
    bad: pa.Table  # QUARANTINE: rows that cannot be used
    classes: list[str] = field(default_factory=list)  # class names, if a file gave them
    notes: list[str] = field(default_factory=list)  # sentences for the report


Reader = Callable[[Listing, Sequence[File], Wish], Source]


def column(names: Sequence[str], wanted: Sequence[str]) -> str:
    """The first of `wanted` among `names`, whatever the case; "" if none."""
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[want] for want in wanted if want in lower), "")


def named(file: File, names: Sequence[str], name: str, key: str) -> str:
    """The column that the recipe names, "" if it names none; ValueError when the file has none of that name."""
    if name and name not in names:
        raise ValueError(f"{file.uri} has no column {name!r} ({key}={name}). It has: {', '.join(names)}.")
    return name


def single(file: File, names: Sequence[str], used: Sequence[str]) -> None:
    """ValueError when a column that may be read occurs twice: which of the two is meant cannot be known."""
    double = next((n for n, count in Counter(names).items() if count > 1 and n and (n in used or n.lower() in used)), "")
    if double:
        raise ValueError(f"{file.uri} has two columns called {double!r}. Rename or remove one of them.")


def scrubbed(text: str) -> str:
    """Text as UTF-8 can hold it: JSON may name half a character (`\\ud800`), which becomes �, as a wrong byte does."""
    return re.sub(r"[\ud800-\udfff]", "\ufffd", text)


def empty(schema: pa.Schema = QUARANTINE) -> pa.Table:
    return schema.empty_table()


def bad_rows(rows: pa.Table, path: str | pa.Array | pa.ChunkedArray, reason: pa.Array | str) -> pa.Table:
    """RAW rows as QUARANTINE rows."""
    count = rows.num_rows
    paths = pa.array([path] * count, pa.string()) if isinstance(path, str) else path
    reasons = pa.array([reason] * count, pa.string()) if isinstance(reason, str) else reason
    return pa.table([rows["id"], paths, rows["row"], reasons], schema=QUARANTINE)


def fill(columns: dict[str, Any], count: int) -> pa.Table:
    """Columns → RAW, with what is not given filled in (caption, captions, class: null; label: −1)."""
    for name, default in (("caption", None), ("captions", None), ("label", -1), ("class", None)):
        if columns.get(name) is None:
            columns[name] = pa.repeat(pa.scalar(default, RAW.field(name).type), count)
    arrays = {name: columns[name] for name in RAW.names}
    return pa.table(arrays).cast(RAW)


def unique_ids(rows: pa.Table) -> None:
    """ValueError that names both places when an id occurs twice."""
    if len(pc.unique(rows["id"])) == rows.num_rows:
        return
    counts = pc.value_counts(rows["id"])
    double = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0]
    first, second = rows.filter(pc.equal(rows["id"], double)).slice(0, 2).select(["path", "row"]).to_pylist()
    raise ValueError(
        f"Sample id {double.as_py()!r} occurs twice: in {first['path']}, row {first['row']}, and in {second['path']}, "
        f"row {second['row']}. Ids must be unique: remove one of the two rows, or give one of them another id."
    )
