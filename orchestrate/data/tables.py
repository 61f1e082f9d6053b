"""CSV and TSV (and Parquet) whose rows name image files, and what all tables share: captions, labels, ids."""

from __future__ import annotations

import csv as text
import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from orchestrate.data.files import File, Listing, below, open_file, parent, sizes
from orchestrate.data.rows import CAPTIONS, CLASSES, IDS, LABELS, Source, Wish, bad_rows, column, empty, fill, named, single, variant

PATHS = ("filepath", "image", "image_path", "filename", "file_name", "path", "image_file", "file", "img")
UNFIT = -(2**31)  # stands for a label that is no class number, until its row is quarantined


def read(listing: Listing, files: Sequence[File], wish: Wish) -> Source:
    """Tables with a header line, or Parquet, whose rows name image files → those rows.

    open_clip writes `filepath`, `title`, tab separated; CleanCLIP `image`, `caption`, comma separated.
    """
    parts, bad, notes = [], [empty()], []
    for file in files:
        table, separator = _table(file, wish)
        names = table.column_names
        image = named(file, names, wish.image_column, "data.image_column") or column(names, PATHS)
        if not image:
            raise ValueError(
                f"{file.uri} has no column of image paths ({', '.join(PATHS)}). Its columns: {', '.join(names)}. "
                "Name it: data.image_column=…; if the file has no header line, add one (filepath, title)."
            )
        caption = named(file, names, wish.caption_column, "data.caption_column") or column(names, CAPTIONS)
        raw, note = _rows(listing, file, table, image, caption)
        raw, wrong = usable(raw, file)
        raw, missing = _existing(raw, file)
        parts.append(raw)
        bad += [wrong, missing]
        about = f"Images from column {image!r} (paths{separator})."
        captions = f"Captions from column {caption!r}." if caption else "No caption column."
        notes += [n for n in [about, captions, *note] if n not in notes]
    return Source(pa.concat_tables(parts), pa.concat_tables(bad), [], notes)


def _rows(listing: Listing, file: File, table: pa.Table, image: str, caption: str) -> tuple[pa.Table, list[str]]:
    names, count = table.column_names, table.num_rows
    ident, label, name = column(names, IDS), column(names, LABELS), column(names, CLASSES)
    written = table[image].cast(pa.string()).to_pylist()
    paths = _paths(listing, file, written)
    rows: dict[str, Any] = {
        "path": pa.array(paths, pa.string()),
        "where": pa.repeat("", count),
        "row": pa.array(range(count), pa.int64()),
        "size": pa.repeat(0, count),
    }
    more = column(names, ["captions"]) if caption.lower() == "caption" else ""
    rows |= caption_columns(table, caption, more) | label_columns(file, table, label, name)
    start = len(listing.root.rstrip("/")) + 1
    derived = [path[start:] if path else f"{file.name}/{row}" for row, path in enumerate(paths)]
    rows, note = with_ids(rows, table, ident, pa.array(derived, pa.string()))
    return fill(rows, count), note


def _paths(listing: Listing, file: File, written: Sequence[str | None]) -> list[str | None]:
    folder, places = parent(file.uri), list[str | None]()
    for row, path in enumerate(written):
        if not path or not path.strip():
            places.append(None)
            continue
        if path.startswith(("http://", "https://")):
            raise ValueError(f"{file.uri}, row {row} names a web address ({path}). Download it first, with img2dataset.")
        place = below(listing.root, folder, path)
        if place is None:
            raise ValueError(
                f"{file.uri}, row {row} names {path}, which is outside the set's folder {listing.root}. "
                "Make data.path the folder that holds both table and images, or write paths relative to the table."
            )
        places.append(place)
    return places


def usable(raw: pa.Table, file: File) -> tuple[pa.Table, pa.Table]:
    """(rows, those of them for quarantine): a row needs an image path, and its label may be unknown but not nonsense."""
    reasons = pc.if_else(pc.equal(raw["label"], UNFIT), "its label is no class number", "")
    reasons = pc.if_else(pc.is_null(raw["path"]), "no image path", reasons)
    good = pc.equal(reasons, "")
    lost = pc.invert(good)
    return raw.filter(good), bad_rows(raw.filter(lost), file.uri, reasons.filter(lost))


def _existing(raw: pa.Table, file: File) -> tuple[pa.Table, pa.Table]:
    found = sizes(raw["path"].to_pylist())
    length = pa.array([found.get(path) for path in raw["path"].to_pylist()], pa.int64())
    here = pc.is_valid(length)
    gone = raw.filter(pc.invert(here))
    reasons = pa.array([f"image file {path} is missing" for path in gone["path"].to_pylist()], pa.string())
    return raw.set_column(4, "size", pc.fill_null(length, 0)).filter(here), bad_rows(gone, file.uri, reasons)


def _table(file: File, wish: Wish) -> tuple[pa.Table, str]:
    """A table of strings, and what separates its columns."""
    try:
        with open_file(file.uri) as handle:
            if file.name.lower().endswith((".parquet", ".pq")):
                parquet = pq.ParquetFile(handle)
                known = used(wish)
                wanted = [name for name in parquet.schema_arrow.names if {name, name.lower()} & {*known}]
                return plain(parquet.read(columns=wanted)), ""
            raw = handle.read()
        header = raw.split(b"\n", 1)[0].decode("utf-8-sig")
        mark = "\t" if "\t" in header else max(",;|", key=header.count)
        names = next(text.reader([header.rstrip("\r")], delimiter=mark), [])
        options = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
        # One thread, so that an error names the row.
        order = csv.ReadOptions(use_threads=False)
        layout = csv.ParseOptions(delimiter=mark, newlines_in_values=True)
        table = csv.read_csv(io.BytesIO(raw), order, layout, options)
    except (pa.ArrowException, OSError, UnicodeDecodeError, text.Error) as error:
        mend = "It must be UTF-8 text with one header line, and as many columns in each row."
        raise ValueError(f"{file.uri} cannot be read as a table: {error}. {mend}") from error
    single(file, table.column_names, used(wish))
    return table, ", tab separated" if mark == "\t" else f", separated by {mark!r}"


def used(wish: Wish) -> tuple[str, ...]:
    """Every column that a table of paths may be read by."""
    return (*PATHS, *CAPTIONS, *IDS, *LABELS, *CLASSES, wish.image_column, wish.caption_column)


def plain(table: pa.Table) -> pa.Table:
    """Dictionaries and large strings as plain strings, so that readers meet one kind of text."""
    for i, part in enumerate(table.schema):
        kind = part.type.value_type if pa.types.is_dictionary(part.type) else part.type
        kind = pa.string() if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) else kind
        if kind != part.type:
            table = table.set_column(i, part.name, table[part.name].cast(kind))
    return table


def caption_columns(table: pa.Table, caption: str, more: str) -> dict[str, Any]:
    """`caption` (the first of a list) and `captions` (all, where there are several)."""
    if not caption:
        return {}
    one, many = table[caption].combine_chunks(), table[more].combine_chunks() if more else None
    if pa.types.is_list(one.type) or pa.types.is_large_list(one.type):
        many = one.cast(pa.list_(pa.string()))
        filled = pc.if_else(pc.equal(pc.fill_null(pc.list_value_length(many), 0), 0), pa.scalar([""], many.type), many)
        one = pc.list_element(filled, 0)
    if many is not None and not pa.types.is_list(many.type) and not pa.types.is_large_list(many.type):
        many = None
    return {"caption": one.cast(pa.string()), "captions": None if many is None else many.cast(pa.list_(pa.string()))}


def label_columns(file: File, table: pa.Table, label: str, name: str) -> dict[str, Any]:
    """`label` from whole numbers, `class` from words, whichever column they are in; blank words are none.

    A number that is no class's (too many digits) becomes `UNFIT`, for `usable` to quarantine.
    """
    columns: dict[str, Any] = {}
    if name and pa.types.is_string(table[name].type):
        columns["class"] = _words(table[name])
    if not label:
        return columns
    values = table[label]
    if pa.types.is_string(values.type):
        numbers = pc.all(pc.match_substring_regex(values, r"^\s*-?\d*\s*$")).as_py()
        if not numbers:
            return {"class": _words(values)} | columns
    try:
        return columns | {"label": pc.fill_null(_numbers(values), -1)}
    except pa.ArrowException:
        kind = f"column {label!r} ({values.type})"
        raise ValueError(f"{file.uri}: {kind} holds neither class numbers nor class names. Rename it.") from None


def _numbers(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whole numbers of any type as int32: blank or NaN is −1 or null, what does not fit is `UNFIT`. ArrowException for fractions."""
    if pa.types.is_string(values.type):
        values = pc.utf8_trim_whitespace(values)
        fits = pc.match_substring_regex(values, r"^-?0*\d{1,9}$")
        values = pc.if_else(pc.equal(values, ""), "-1", pc.if_else(fits, values, str(UNFIT)))
    if pa.types.is_integer(values.type):
        values = values.cast(pa.int64(), safe=False)
        fits = pc.and_(pc.greater(values, UNFIT), pc.less(values, -UNFIT))
        values = pc.if_else(fits, values, UNFIT)
    if pa.types.is_floating(values.type):
        values = pc.if_else(pc.is_nan(values), None, values)
    return values.cast(pa.int32())


def _words(values: pa.ChunkedArray) -> pa.ChunkedArray:
    # A CSV has no null: an empty cell would be a class named "".
    return pc.if_else(pc.equal(pc.utf8_trim_whitespace(values), ""), None, values)


def with_ids(rows: dict[str, Any], table: pa.Table, ident: str, derived: pa.Array) -> tuple[dict[str, Any], list[str]]:
    """Add `id`: from the column `ident`, else `derived` from file name and row or path.

    An image named in several rows (`image_id`, a path) is several pairs: their ids carry a hash of the caption.
    """
    ids, about = derived, "Sample ids are made from file names."
    if ident:
        ids, about = table[ident].cast(pa.string()).combine_chunks(), f"Sample ids from column {ident!r}."
        ids = pc.if_else(pc.fill_null(pc.equal(ids, ""), True), derived, ids)
    several = len(pc.unique(ids)) < len(ids) and rows.get("caption") is not None
    if several and ident.lower() in ("", "image_id"):
        texts = rows["caption"].to_pylist()
        ids = pa.array([variant(i, text or "") for i, text in zip(ids.to_pylist(), texts, strict=True)], pa.string())
        about += " Images have several captions: each is a pair of its own, its id made from image and caption."
    return rows | {"id": ids}, [about]
