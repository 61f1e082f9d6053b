"""Images: bounded, upright, square; every failure names its file, row and cause."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from orchestrate.data.index import open_dataset
from orchestrate.data.reader import BadImage, attempt, check_share, decode, load, quarantined, read_bytes
from orchestrate.recipe import MOST_PIXELS, Data

from .data_formats import Settings, encoded, pairs, parquet, png, webdataset


def giant(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixel."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", b""), (b"IEND", b"")]
    made = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + made


def jpeg(side: int = 64, **options: object) -> bytes:
    ramp = np.linspace(0, 255, side, dtype=np.uint8)
    return encoded(Image.fromarray(np.stack([np.tile(ramp, (side, 1))] * 3, axis=2)), "JPEG", **options)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(100_000, 1_000), (60_000, 60_000)])
def test_too_many_pixels_are_refused_before_decoding(size, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    with pytest.raises(ValueError, match=r"max_pixels|too many pixels"):
        decode(giant(*size), 32)


def test_a_bound_on_pixels_is_inclusive():
    assert decode(png(0), 16, max_pixels=256).shape == (16, 16, 3)
    with pytest.raises(ValueError, match=r"16 x 16 pixels are more than data.max_pixels=255"):
        decode(png(0), 16, max_pixels=255)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_recipes_bound_on_pixels_is_the_one_that_counts(monkeypatch):
    """Pillow has a bound of its own, for the whole process: a recipe's may be as large and no larger."""
    assert 2 * Image.MAX_IMAGE_PIXELS == MOST_PIXELS
    with pytest.raises(ValueError, match=r"20000 x 8900 pixels are more than data.max_pixels=177999999"):
        decode(giant(20_000, 8_900), 32, max_pixels=177_999_999)
    small = Image.new("RGB", (32, 32))  # in place of what would be decoded here
    monkeypatch.setattr("orchestrate.data.reader._upright", lambda _: small)
    assert decode(giant(20_000, 8_900), 32, max_pixels=Data(max_pixels=MOST_PIXELS).max_pixels).shape == (32, 32, 3)


def test_what_is_no_image_is_said():
    for raw in (b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        with pytest.raises(ValueError, match="not an image in a known format"):
            decode(raw, 16)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_images_are_errors_never_grey(kind):
    rng = np.random.default_rng(0)
    raw = encoded(Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(ValueError, match=r"\w"):
            decode(raw[: int(len(raw) * share)], 32)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(mode):
    grey = np.full((20, 20), 40_000 if mode == "I;16" else 156, np.uint16 if mode == "I;16" else np.uint8)
    image = Image.fromarray(grey) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    out = decode(encoded(image, "TIFF"), 8)
    assert out.shape == (8, 8, 3) and out.dtype == np.uint8
    assert mode == "1" or abs(int(out.mean()) - 156) <= 2


def test_exif_turns_the_image():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: what was left is up
    straight, turned = decode(jpeg(), 16), decode(jpeg(exif=exif), 16)
    assert abs(np.rot90(straight, -1).astype(int) - turned).max() <= 4


def test_the_centre_square_is_kept():
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 255
    assert (decode(encoded(Image.fromarray(image), "PNG"), 10) == 255).all()
    strip = decode(encoded(Image.fromarray(np.zeros((1, 50_000, 3), np.uint8)), "PNG"), 64)
    assert strip.shape == (64, 64, 3)


def test_large_jpegs_come_out_like_a_plain_resize():
    raw = jpeg(512)
    whole = Image.open(io.BytesIO(raw)).resize((32, 32), Image.Resampling.BICUBIC)
    assert abs(decode(raw, 32).astype(int) - np.asarray(whole)).max() <= 3


def test_a_truncated_image_is_reported_with_file_and_row(tmp_path: Path):
    some = pairs()
    some[4] = ("00004", jpeg()[:300], "cut short")
    places = {parquet: r"a.parquet, row 4 \(id 00004\)", webdataset: r"00001.tar, byte \d+ \(id 00001/00004\)"}
    for write, place in places.items():
        folder = tmp_path / write.__name__
        folder.mkdir()
        write(folder, some)
        rows = open_dataset(Settings(str(folder))).train
        pixels, errors = load(rows, 16, threads=2)
        assert [position for position, _ in errors] == [4]
        assert not pixels[4].any() and pixels[5].any()
        with pytest.raises(ValueError, match=f"(?i)1 of 6 rows cannot be used(.|\n)*{place}: .*truncated"):
            check_share(rows.num_rows, errors, 0.01)
        check_share(rows.num_rows, errors, 0.5)
        assert quarantined(rows, errors)["id"].to_pylist() == [rows["id"][4].as_py()]


def test_the_list_of_bad_rows_is_bounded():
    with pytest.raises(ValueError, match=r"reason 19\n  … and 30 more\nMend") as caught:
        check_share(100, [(i, f"reason {i}") for i in range(50)], 0.01)
    assert "reason 20" not in str(caught.value)


def test_missing_bytes_and_vanished_files_are_values(tmp_path: Path):
    pq.write_table(pa.table({"id": ["a", "b"], "image": [png(0), None], "caption": ["x", "y"]}), tmp_path / "a.parquet")
    rows = open_dataset(Settings(str(tmp_path))).train
    errors = load(rows.drop_columns(["id", "caption"]), 16)[1]
    assert errors == [(1, f"{tmp_path}/a.parquet, row 1: no image bytes in this row")]
    pq.write_table(pa.table({"image": [png(0)]}), tmp_path / "a.parquet")
    assert "fewer rows" in load(rows, 16)[1][0][1]
    (tmp_path / "a.parquet").unlink()
    assert all(isinstance(value, OSError) for value in read_bytes(rows))


def test_an_image_at_fault_is_told_from_bytes_that_could_not_be_had(tmp_path: Path):
    images = [png(0), None, b"no image", png(1, 32, 32)]
    pq.write_table(pa.table({"id": list("abcd"), "image": images, "caption": ["x"] * 4}), tmp_path / "a.parquet")
    rows = open_dataset(Settings(str(tmp_path))).train
    errors = attempt(rows, 16, max_pixels=300)[1]
    assert [position for position, _ in errors] == [1, 2, 3] and all(isinstance(error, BadImage) for _, error in errors)
    pq.write_table(pa.table({"image": [png(0)]}), tmp_path / "a.parquet")
    shorter = attempt(rows, 16)[1]
    (tmp_path / "a.parquet").unlink()
    gone = attempt(rows, 16)[1]
    assert len(shorter) == 3 and len(gone) == 4 and not any(isinstance(error, BadImage) for _, error in shorter + gone)


def test_a_row_group_is_read_once_and_no_other(tmp_path: Path, monkeypatch):
    parquet(tmp_path, pairs(12))
    rows = open_dataset(Settings(str(tmp_path))).train
    seen = []
    original = pq.ParquetFile.read_row_group

    def spy(self, group, columns):
        seen.append(group)
        return original(self, group, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    read_bytes(rows.take(pa.array([9, 2, 8, 3])))
    assert seen == [1, 4]


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]),
    st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), max_size=8),
)
def test_damaged_bytes_are_an_image_or_a_value_error(kind, damage):
    raw = bytearray(encoded(Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)), kind))
    for place, value in damage:
        raw[place % len(raw)] = value
    try:
        assert decode(bytes(raw), 8, max_pixels=10_000).shape == (8, 8, 3)
    except ValueError as error:
        assert str(error)
