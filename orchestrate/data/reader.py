"""Index rows → image bytes → pixels. One open per file; every failure is a value that names file, row and cause."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from orchestrate.data.files import open_file
from orchestrate.data.rows import QUARANTINE

MAX_PIXELS = 64_000_000
# Only formats whose decoders are plain pixel readers: EPS, for one, would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
GAP = 64 << 10  # bytes between two tar members that are cheaper to read than to skip
SPAN = 8 << 20  # bytes of one read


class BadImage(ValueError):
    """The image itself is at fault: to read it again changes nothing, unlike a store that was away."""


def read_bytes(rows: pa.Table) -> list[bytes | Exception]:
    """Encoded image of each index row, in the order of `rows`; an exception where it cannot be read.

    Reads the columns path, where, row and size. Files are opened once a call, and a Parquet's row groups read once:
    ask for whole stretches, not for single rows.
    """
    found: list[bytes | Exception] = [KeyError("not read")] * rows.num_rows
    groups: dict[tuple[str, str], list[int]] = {}
    for position, key in enumerate(zip(rows["path"].to_pylist(), rows["where"].to_pylist(), strict=True)):
        groups.setdefault(key, []).append(position)
    numbers, sizes = rows["row"].to_pylist(), rows["size"].to_pylist()
    for (path, where), positions in groups.items():
        try:
            with open_file(path) as handle:
                if where == "":
                    raw: Iterable[bytes | Exception] = [handle.read()] * len(positions)
                elif where == "tar":
                    raw = _from_tar(handle, [(numbers[p], sizes[p]) for p in positions])
                else:
                    raw = _from_parquet(handle, where.removeprefix("parquet:"), [numbers[p] for p in positions])
                for position, value in zip(positions, raw, strict=True):
                    found[position] = value
        except (OSError, pa.ArrowException, ValueError) as error:
            for position in positions:
                found[position] = error
    return found


def _from_tar(handle: Any, ranges: Sequence[tuple[int, int]]) -> list[bytes | Exception]:
    """Byte ranges; neighbours come in one read, as in a store each read is a request."""
    values: list[bytes | Exception] = [b""] * len(ranges)
    order = sorted(range(len(ranges)), key=lambda i: ranges[i])
    while order:
        start, end, taken = ranges[order[0]][0], sum(ranges[order[0]]), 1
        while taken < len(order):
            offset, size = ranges[order[taken]]
            if offset > end + GAP or offset + size - start > SPAN:
                break
            end, taken = max(end, offset + size), taken + 1
        handle.seek(start)
        raw = handle.read(end - start)
        for i in order[:taken]:
            offset, size = ranges[i]
            piece = raw[offset - start : offset - start + size]
            values[i] = piece if len(piece) == size else ValueError("the tar ends before this member does")
        order = order[taken:]
    return values


def _from_parquet(handle: Any, column: str, numbers: Sequence[int]) -> list[bytes | Exception]:
    parquet = pq.ParquetFile(handle)
    lengths = [parquet.metadata.row_group(g).num_rows for g in range(parquet.metadata.num_row_groups)]
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    wanted = np.asarray(numbers, np.int64)
    values: list[bytes | Exception] = [ValueError("the file has fewer rows than when it was indexed")] * len(numbers)
    group = np.searchsorted(starts, wanted, side="right") - 1
    for g in np.unique(group[(wanted >= 0) & (wanted < starts[-1])]):
        array = parquet.read_row_group(int(g), columns=[column]).column(0).combine_chunks()
        if pa.types.is_struct(array.type):
            array = array.field("bytes")
        places = np.flatnonzero(group == g)
        for place, raw in zip(places, array.take(pa.array(wanted[places] - starts[g])).to_pylist(), strict=True):
            values[place] = raw if raw else BadImage("no image bytes in this row")
    return values


def decode(raw: bytes, side: int, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Encoded image → uint8 (side, side, 3): upright by EXIF, RGB, centre square, bicubic with antialiasing.

    The size is checked in the header, before any pixel is decoded. BadImage, a ValueError, with the cause: unknown format, more than
    `max_pixels` pixels, truncated.
    """
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise BadImage(f"{width} x {height} pixels are more than data.max_pixels={max_pixels}")
            # A JPEG can be decoded at 1/2, 1/4 or 1/8; twice the wanted side keeps the resampling clean.
            scale = 2 * side / min(width, height)
            image.draft(None, (int(width * scale) + 1, int(height * scale) + 1))
            return _square(_rgb(_upright(image)), side)
    except Image.DecompressionBombError as error:
        raise BadImage(f"too many pixels: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise nearly anything: OSError, SyntaxError, struct.error, …
        cause = "not an image in a known format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise BadImage(cause or type(error).__name__) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except (SyntaxError, ValueError, KeyError, TypeError, struct.error):  # broken EXIF is no broken image
        turned = False
    return ImageOps.exif_transpose(image) if turned else image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # convert() would clip 16 bits to white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _square(image: Image.Image, side: int) -> NDArray[np.uint8]:
    width, height = image.size
    short = min(width, height)
    if (width, height) != (side, side):
        # Cropped while resizing: a strip of 1 x 60,000,000 pixels must not be blown up first.
        left, top = (width - short) / 2, (height - short) / 2
        box = (left, top, left + short, top + short)
        image = image.resize((side, side), Image.Resampling.BICUBIC, box=box)
    return np.array(image, dtype=np.uint8)


def load(rows: pa.Table, side: int, max_pixels: int = MAX_PIXELS, threads: int = 1) -> tuple[NDArray[np.uint8], list[tuple[int, str]]]:
    """Index rows → (uint8 (n, side, side, 3), errors as (position, reason naming file, row and cause)).

    Failed images are black. `threads` decode in parallel. Only image references are needed; ids are named if there.
    """
    images, errors = attempt(rows, side, max_pixels, threads)
    return images, described(rows, errors)


def attempt(
    rows: pa.Table, side: int, max_pixels: int = MAX_PIXELS, threads: int = 1
) -> tuple[NDArray[np.uint8], list[tuple[int, Exception]]]:
    """`load`, with what was raised in place of the reasons: BadImage, or else the bytes could not be had."""
    images = np.zeros((rows.num_rows, side, side, 3), np.uint8)
    failed: dict[int, Exception] = {}

    def one(item: tuple[int, bytes | Exception]) -> None:
        position, raw = item
        try:
            if isinstance(raw, Exception):
                raise raw
            images[position] = decode(raw, side, max_pixels)
        except Exception as error:  # a value, not a crash: the caller weighs it against data.max_bad
            failed[position] = error

    work = enumerate(read_bytes(rows))
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, work))
    else:
        for item in work:
            one(item)
    return images, sorted(failed.items(), key=lambda item: item[0])


def described(rows: pa.Table, errors: Sequence[tuple[int, Exception]]) -> list[tuple[int, str]]:
    """What `attempt` met, in words: (position, file, row and cause)."""
    names = [name for name in ("id", "path", "where", "row") if name in rows.column_names]
    some = rows.select(names).take(pa.array([position for position, _ in errors], pa.int64())).to_pylist()
    causes = [(position, str(error) or type(error).__name__) for position, error in errors]
    return [(position, f"{_place(row)}: {cause}") for (position, cause), row in zip(causes, some, strict=True)]


def _place(row: dict[str, Any]) -> str:
    kind = "byte" if row["where"] == "tar" else "row"
    return f"{row['path']}, {kind} {row['row']}" + (f" (id {row['id']})" if "id" in row else "")


def quarantined(rows: pa.Table, errors: Sequence[tuple[int, str]]) -> pa.Table:
    """What `load` could not read, as a quarantine table (id, path, row, reason); the place has columns of its own there."""
    some = rows.select(["id", "path", "where", "row"]).take(pa.array([position for position, _ in errors], pa.int64()))
    causes = [reason.removeprefix(f"{_place(row)}: ") for row, (_, reason) in zip(some.to_pylist(), errors, strict=True)]
    return some.drop_columns("where").append_column("reason", pa.array(causes, pa.string())).cast(QUARANTINE)


def check_share(total: int, bad: pa.Table | Sequence[tuple[int, str]], max_bad: float) -> None:
    """ValueError that lists the bad rows (the first 20) when they are more than the share `max_bad` of `total` rows.

    `bad` is a quarantine table or `load`'s errors; `total` counts good and bad rows.
    """
    if isinstance(bad, pa.Table):
        reasons = [f"{b['path']}, row {b['row']} (id {b['id']}): {b['reason']}" for b in bad.slice(0, 20).to_pylist()]
    else:
        reasons = [reason for _, reason in bad[:20]]
    count = len(bad)
    if count <= max_bad * total:
        return
    more = f"\n  … and {count - 20:,} more" if count > 20 else ""
    raise ValueError(
        f"{count:,} of {total:,} rows cannot be used, more than data.max_bad={max_bad:g} tolerates:\n  "
        + "\n  ".join(reasons)
        + more
        + f"\nMend or remove them, or accept them with data.max_bad={min(1, count / max(total, 1) + 0.0005):.3f}."
    )
