"""Manifest + index → the table that training reads: every pair, poisoned or not, and where its pixels lie."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attacks.base import Manifest
from attacks.materials import carrying

ADDED = pa.schema(
    [
        ("image_id", pa.string()),  # whose pixels the pair shows
        ("stamp", pa.string()),  # the trigger on them, "" for none
        ("poison", pa.bool_()),
        ("adversary", pa.string()),
        ("group", pa.int32()),
    ]
)


def apply(index: pa.Table, heldout: pa.Table, manifest: Manifest) -> pa.Table:
    """The poisoned training table: the index's rows in order, then the added pairs in the manifest's order.

    Of a poisoned pair `id` and `caption` are the manifest's; every other column of the index (where the pixels lie,
    label) is that of the image it shows, from the training or the held-out table. Adds the columns of ADDED. Schema
    metadata are the index's, and `materials` where the plan left some for its stamps.
    """
    _check(index, manifest)
    plan, rows = manifest.table, index.num_rows
    own = _positions(plan["id"], index)  # −1 for added pairs
    shown = _shown(plan, index, heldout)
    is_added = np.array([op == "add" for op in plan["op"].to_pylist()], dtype=bool)
    replaced = np.flatnonzero(~is_added)[np.argsort(own[~is_added], kind="stable")]
    added = np.flatnonzero(is_added)

    pixels = pa.concat_tables([index, _like(heldout, index.schema)])
    body = index
    if np.any(shown[replaced] != own[replaced]):  # pairs that show another image; else the index is used as it is
        source = np.arange(rows)
        source[own[replaced]] = shown[replaced]
        body = pixels.take(pa.array(source)).set_column(*_named("id", index["id"], index.schema))
        body = body.set_column(*_named("caption", index["caption"], index.schema))
    body = _with(body, index["id"])
    mask = np.zeros(rows, dtype=bool)
    mask[own[replaced]] = True
    changes = _columns(plan.take(pa.array(replaced)))
    for name in ("caption", *ADDED.names):
        values = pc.replace_with_mask(body[name].combine_chunks(), pa.array(mask), changes[name].cast(body.schema.field(name).type))
        body = body.set_column(*_named(name, values, body.schema))
    tail = _with(pixels.take(pa.array(shown[added])), None)
    for name, values in _columns(plan.take(pa.array(added))).items():
        tail = tail.set_column(*_named(name, values.cast(tail.schema.field(name).type), tail.schema))
    return pa.concat_tables([body, tail]).replace_schema_metadata(carrying(index.schema.metadata, manifest.header))


def _check(index: pa.Table, manifest: Manifest) -> None:
    clash = [name for name in ADDED.names if name in index.column_names]
    if clash:
        raise ValueError(f"the index has column(s) {', '.join(clash)} of a poisoned table: apply a manifest to clean data, once.")
    ids = manifest.table["id"].to_pylist()
    if len(set(ids)) < len(ids):
        twice = next(each for number, each in enumerate(ids) if each in ids[:number])
        raise ValueError(f"the manifest names pair {twice!r} twice: combine attacks with `+`, which keeps them apart.")


def _shown(plan: pa.Table, index: pa.Table, heldout: pa.Table) -> np.ndarray:
    """Position of each manifest row's image in [index, heldout], int64 (m,). Checks all that the row refers to."""
    own, train, held = (
        _positions(plan["id"], index),
        _positions(plan["image_id"], index),
        _positions(plan["image_id"], heldout),
    )
    shown = np.full(plan.num_rows, -1, dtype=np.int64)
    for number, row in enumerate(plan.select(["op", "id", "image_id", "image_split"]).to_pylist()):
        where = f"manifest row {number} ({row['op']} {row['id']!r})"
        differ = "the data differ from those this manifest was planned on: use the same set, or plan the attack anew."
        if row["op"] not in ("add", "replace"):
            raise ValueError(f"{where} is neither an 'add' nor a 'replace': this is no manifest of ours.")
        if row["op"] == "replace" and own[number] < 0:
            raise ValueError(f"{where}: no pair of the training set has this id; {differ}")
        if row["op"] == "add" and own[number] >= 0:
            raise ValueError(f"{where}: the training set already has a pair of this id; {differ}")
        if row["image_split"] not in ("train", "heldout"):
            raise ValueError(f"{where}: image_split {row['image_split']!r} is neither 'train' nor 'heldout'.")
        position, offset = (train[number], 0) if row["image_split"] == "train" else (held[number], index.num_rows)
        if position < 0:
            raise ValueError(f"{where}: no image {row['image_id']!r} in the {row['image_split']} set; {differ}")
        shown[number] = offset + position
    return shown


def _positions(wanted: pa.ChunkedArray, table: pa.Table) -> np.ndarray:
    """Rows of `table` with these ids, −1 where there is none, int64 (m,)."""
    found = pc.index_in(wanted, value_set=table["id"].combine_chunks().cast(pa.string()))
    return np.asarray(found.fill_null(-1).to_numpy(), dtype=np.int64)


def _like(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """`table` with the columns of `schema`; what it lacks is null."""
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(table.num_rows, field.type) for field in schema
    ]
    return pa.table(columns, schema=schema)


def _with(table: pa.Table, image_ids: pa.ChunkedArray | None) -> pa.Table:
    """`table` with the ADDED columns as they stand in clean pairs."""
    ids = table["id"] if image_ids is None else image_ids
    clean = (ids.cast(pa.string()), *(pa.repeat(pa.scalar(value), table.num_rows) for value in ("", False, "")))
    columns = (*clean, pa.repeat(pa.scalar(0, pa.int32()), table.num_rows))
    for field, column in zip(ADDED, columns, strict=True):
        table = table.append_column(field, column)
    return table


def _columns(plan: pa.Table) -> dict[str, pa.Array]:
    """What a manifest sets in the pairs it names."""
    columns = {name: plan[name].combine_chunks() for name in ("id", "caption", "image_id", "stamp", "adversary", "group")}
    return {**columns, "poison": pa.repeat(pa.scalar(True), plan.num_rows)}


def _named(name: str, values: pa.Array | pa.ChunkedArray, schema: pa.Schema) -> tuple[int, pa.Field, pa.Array | pa.ChunkedArray]:
    """Arguments of `Table.set_column` that put `values` in place of the column `name`."""
    position = schema.get_field_index(name)
    return position, schema.field(position), values
