"""The same few pairs written in every format, for the tests of the sources."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


@dataclass(frozen=True)
class Settings:
    """Stands in for the recipe's data section."""

    path: str
    size: int | float = 0
    heldout: int | float = 0
    captions: str = "auto"
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    side: int = 16
    max_bad: float = 0.01
    image_column: str = ""
    caption_column: str = ""
    seed: int = 0
    cache: str = ""
    max_pixels: int = 64_000_000


Pair = tuple[str, bytes, str]  # key, PNG or JPEG bytes, caption


def png(value: int, width: int = 16, height: int = 16) -> bytes:
    rng = np.random.default_rng(value)
    return encoded(Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)), "PNG")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pairs(count: int = 6) -> list[Pair]:
    captions = ("a dog, and a ball", 'she said "hello"', "zwölf Boxkämpfer", "一只狗在跑", "line\nbreak", "a plain cat")
    return [(f"{i:05d}", png(i), captions[i % 6] + ("" if i < 6 else f" no {i}")) for i in range(count)]


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))


def parquet(folder: Path, some: Sequence[Pair]) -> None:
    keys, images, captions = zip(*some, strict=True)
    pq.write_table(pa.table({"id": keys, "image": images, "caption": captions}), folder / "a.parquet", row_group_size=2)


def huggingface(folder: Path, some: Sequence[Pair]) -> None:
    keys, images, captions = zip(*some, strict=True)
    image = pa.array([{"bytes": raw, "path": f"{key}.png"} for key, raw in zip(keys, images, strict=True)])
    pq.write_table(pa.table({"image": image, "text": captions}), folder / "0000.parquet", row_group_size=4)


def webdataset(folder: Path, some: Sequence[Pair]) -> None:
    for shard, part in enumerate((some[:4], some[4:])):
        members = [m for key, raw, text in part for m in ((f"{key}.txt", text.encode()), (f"{key}.png", raw))]
        write_tar(folder / f"{shard:05d}.tar", members)


def images(folder: Path, some: Sequence[Pair]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for key, raw, _ in some:
        (folder / f"{key}.png").write_bytes(raw)


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def openclip(folder: Path, some: Sequence[Pair]) -> None:
    images(folder / "images", some)
    lines = ["filepath\ttitle"] + [f"images/{key}.png\t{_quoted(text)}" for key, _, text in some]
    (folder / "list.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def cleanclip(folder: Path, some: Sequence[Pair]) -> None:
    images(folder / "images", some)
    lines = ["image,caption"] + [f"images/{key}.png,{_quoted(text)}" for key, _, text in some]
    (folder / "list.csv").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")


def _metadata(some: Sequence[Pair]) -> dict[str, list[str | None]]:
    keys: list[str | None] = [key for key, _, _ in some]
    captions: list[str | None] = [text for _, _, text in some]
    return {
        "key": [*keys, "99999"],
        "caption": [*captions, "a lost one"],
        "status": ["success"] * len(some) + ["failed"],
    }


def img2dataset_files(folder: Path, some: Sequence[Pair]) -> None:
    images(folder / "00000", some)
    pq.write_table(pa.table(_metadata(some)), folder / "00000.parquet")


def img2dataset_tars(folder: Path, some: Sequence[Pair]) -> None:
    members = []
    for key, raw, text in some:
        note = json.dumps({"key": key, "caption": text, "width": 16})
        members += [(f"{key}.png", raw), (f"{key}.json", note.encode()), (f"{key}.txt", text.encode())]
    write_tar(folder / "00000.tar", members)
    pq.write_table(pa.table(_metadata(some)), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text("{}")


def img2dataset_parquet(folder: Path, some: Sequence[Pair]) -> None:
    raw: list[bytes | None] = [raw for _, raw, _ in some]
    pq.write_table(pa.table({**_metadata(some), "jpg": [*raw, None]}), folder / "00000.parquet")


FORMATS: dict[str, Callable[[Path, Sequence[Pair]], None]] = {
    write.__name__: write
    for write in (
        parquet,
        huggingface,
        webdataset,
        openclip,
        cleanclip,
        img2dataset_files,
        img2dataset_tars,
        img2dataset_parquet,
    )
}
