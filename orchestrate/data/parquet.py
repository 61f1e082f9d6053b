"""Parquet with image bytes (plain, Hugging Face, img2dataset), or beside image files. Image bytes are not read."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orchestrate.data.files import File, Listing, below, child, open_file, sizes
from orchestrate.data.rows import (
    CAPTIONS,
    CLASSES,
    IDS,
    IMAGE_FILES,
    LABELS,
    Reader,
    Source,
    Wish,
    bad_rows,
    column,
    empty,
    fill,
    named,
    scrubbed,
    single,
)
from orchestrate.data.tables import PATHS, caption_columns, label_columns, plain, usable, used, with_ids
from orchestrate.data.tables import read as read_paths

IMAGES = ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "img", "bytes", "picture")
LOST, OUTSIDE = "no image file of that key in {}", "its key leads out of the set's folder, from {}"


def flavour(file: File, wish: Wish) -> tuple[str, Reader]:
    """(name, reader) of a Parquet set, from the schema of its first file. ValueError when it holds no image."""
    schema = _schema(file, wish)
    if image_column(file, schema, wish):
        return ("img2dataset Parquet with image bytes" if _img2dataset(schema) else "Parquet with image bytes"), read
    if _img2dataset(schema) and not wish.image_column:
        return "img2dataset files", read_files
    if wish.image_column or column(schema.names, PATHS):
        return "Parquet with image paths", read_paths
    raise ValueError(
        f"{file.uri} has no column of image bytes ({', '.join(IMAGES)}) nor of image paths ({', '.join(PATHS)}). "
        f"It has: {_describe(schema)}. Name it: data.image_column=…"
    )


def _img2dataset(schema: pa.Schema) -> bool:
    return {"key", "status"} <= set(schema.names)


def _schema(file: File, wish: Wish) -> pa.Schema:
    try:
        with open_file(file.uri) as handle:
            schema = pq.read_schema(handle)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file.uri} is no readable Parquet file: {error}. Copy it again or take it out of the set.") from error
    single(file, schema.names, (*IMAGES, *used(wish)))
    return schema


def _describe(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def _is_bytes(kind: pa.DataType) -> bool:
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(is_kind(kind) for is_kind in kinds)


def image_column(file: File, schema: pa.Schema, wish: Wish) -> str:
    """The column of image bytes, `image.bytes` for Hugging Face's struct; "" when there is none."""
    if wish.image_column:
        base = wish.image_column.partition(".")[0]
        named(file, schema.names, base, "data.image_column")
        candidates = [base]
    else:
        found = column(schema.names, [n for n in IMAGES if _holds_bytes(schema, column(schema.names, [n]))])
        binary = [field.name for field in schema if _holds_bytes(schema, field.name)]
        # A single column of bytes can only be the image; of several, only a known name is trusted.
        candidates = [found] if found else binary if len(binary) == 1 else []
        if len(binary) > 1 and not found:
            raise ValueError(f"{file.uri} has several columns of bytes: {', '.join(binary)}. Name the image: data.image_column=…")
    name = candidates[0] if candidates else ""
    if not _holds_bytes(schema, name):
        return ""
    return name if _is_bytes(schema.field(name).type) else f"{name}.bytes"


def _holds_bytes(schema: pa.Schema, name: str) -> bool:
    if not name:
        return False
    kind = schema.field(name).type
    return _is_bytes(kind) or bool(pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def read(listing: Listing, files: Sequence[File], wish: Wish) -> Source:
    """Parquet with image bytes → rows, one for each row of each file. The image column is not read."""
    parts, bad, notes = [], [empty()], []
    classes: list[str] = []
    for file in files:
        schema = _schema(file, wish)
        image = image_column(file, schema, wish)
        if not image:
            raise ValueError(f"{file.uri} has no image bytes, unlike {files[0].name}. It has: {_describe(schema)}.")
        part, wrong, note = _rows(file, schema, f"parquet:{image}", wish)
        parts.append(part)
        bad.append(wrong)
        notes += [n for n in [f"Images from column {image!r} (bytes).", *note] if n not in notes]
        classes = classes or _huggingface_names(file, schema)
    return Source(pa.concat_tables(parts), pa.concat_tables(bad), classes, notes)


def _rows(file: File, schema: pa.Schema, where: str, wish: Wish) -> tuple[pa.Table, pa.Table, list[str]]:
    """(RAW rows, those of them for quarantine, sentences)."""
    names = schema.names
    caption = named(file, names, wish.caption_column, "data.caption_column")
    caption = caption or column(names, [n for n in CAPTIONS if _is_text(schema, column(names, [n]))])
    more = column(names, ["captions"]) if caption.lower() == "caption" else ""
    label, name = column(names, LABELS), column(names, CLASSES)
    status = "status" if _img2dataset(schema) else ""
    ident = "key" if status else column(names, IDS)  # img2dataset's key also names the image file
    wanted = list(dict.fromkeys(n for n in (caption, more, ident, label, name, status) if n))
    table = _columns(file, wanted)
    count = table.num_rows
    rows: dict[str, Any] = {
        "path": pa.repeat(file.uri, count),
        "where": pa.repeat(where, count),
        "row": pa.array(range(count), pa.int64()),
        "size": pa.repeat(file.size, count),
    }
    rows |= caption_columns(table, caption, more) | label_columns(file, table, label, name)
    notes = [f"Captions from column {caption!r}." if caption else "No caption column."]
    stem = posixpath.splitext(file.name)[0]
    rows, note = with_ids(rows, table, ident, pa.array([f"{stem}/{i}" for i in range(count)], pa.string()))
    raw = fill(rows, count)
    if status:
        raw, left = _downloaded(raw, table[status])
        notes += left
    return *usable(raw, file), notes + note


def _is_text(schema: pa.Schema, name: str) -> bool:
    if not name:
        return False
    kind = schema.field(name).type
    kind = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind))


def _columns(file: File, names: Sequence[str]) -> pa.Table:
    with open_file(file.uri) as handle:
        try:
            parquet = pq.ParquetFile(handle)
            if names:
                return plain(parquet.read(columns=list(names)))
            return pa.table({"": pa.nulls(parquet.metadata.num_rows)})
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{file.uri} cannot be read: {error}. Copy it again or take it out of the set.") from error


def _downloaded(raw: pa.Table, status: pa.ChunkedArray) -> tuple[pa.Table, list[str]]:
    kept = raw.filter(pc.equal(status, "success"))
    lost = raw.num_rows - kept.num_rows
    return kept, [f"{lost:,} rows were never downloaded (img2dataset status) and are no part of the set."] if lost else []


def _huggingface_names(file: File, schema: pa.Schema) -> list[str]:
    """Class names that the `datasets` library writes into a Parquet's metadata."""
    raw = (schema.metadata or {}).get(b"huggingface")
    try:
        features = (json.loads(raw).get("info") or {}).get("features") or {} if raw else {}
        feature = features.get(column(list(features), LABELS), {})
        names = feature.get("names") or [] if isinstance(feature, dict) else []  # a list: many labels a row, which name no class
        return [scrubbed(name) for name in names]
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{file.uri}: its metadata under 'huggingface' is not what the datasets library writes ({error}). Write the file again without "
            "it (pyarrow: table.replace_schema_metadata(None)), and give class names in classnames.json."
        ) from error


def read_files(listing: Listing, files: Sequence[File], wish: Wish) -> Source:
    """img2dataset's `files` layout: `00000.parquet` (key, caption, status) beside `00000/000000001.jpg`."""
    parts, bad, notes = [], [empty()], []
    for file in files:
        schema = _schema(file, wish)
        raw, wrong, note = _rows(file, schema, "", wish)
        notes += [n for n in note if n not in notes]
        folder = child(listing.root, posixpath.splitext(file.name)[0])
        keys = raw["id"].to_pylist()
        places = {key: _places(listing.root, folder, key) for key in keys}
        size = sizes(place for some in places.values() for place in some)
        found = [next((place for place in places[key] if place in size), None) for key in keys]
        paths = pa.array(found, pa.string())
        length = pa.array([size.get(place) if place else None for place in found], pa.int64())
        here = pc.is_valid(paths)
        gone = raw.filter(pc.invert(here))
        reasons = [LOST if places[key] else OUTSIDE for key in gone["id"].to_pylist()]
        bad += [wrong, bad_rows(gone, file.uri, pa.array([reason.format(folder) for reason in reasons], pa.string()))]
        raw = raw.set_column(1, "path", paths).set_column(4, "size", length)
        parts.append(raw.filter(here))
    return Source(pa.concat_tables(parts), pa.concat_tables(bad), [], notes)


def _places(root: str, folder: str, key: str) -> list[str]:
    """Where the image of a key may lie; nowhere for a key that leads out of the set."""
    return [place for ending in IMAGE_FILES if (place := below(root, folder, key + ending))]
