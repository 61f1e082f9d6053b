"""WebDataset tars, img2dataset's among them: headers are walked, small members read, images left where they are."""

from __future__ import annotations

import json
import posixpath
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from orchestrate.data.files import File, Listing, is_uri, parent, resolve
from orchestrate.data.rows import CAPTIONS, CLASSES, LABELS, QUARANTINE, RAW, Source, Wish, column, scrubbed

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
READ_AHEAD = 8 << 20  # bytes a request, when a tar is streamed out of a store


@dataclass
class Seen:
    """What the samples of some tars hold beside each other."""

    extensions: set[str] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)  # of .json members

    def check(self, file: File, wish: Wish) -> None:
        """ValueError for a column of the recipe's that is in none of the tars: captions would be made in silence."""
        texts = self.extensions - {*IMAGES, "cls", "json"}
        wanted = (
            ("data.image_column", wish.image_column, self.extensions, set[str]()),
            ("data.caption_column", wish.caption_column, texts, self.keys),
        )
        for key, name, extensions, keys in wanted:
            if name and name.lower() not in extensions and name not in keys:
                listed = scrubbed(", ".join(sorted(extensions | keys)[:30])) or "nothing of the kind"
                raise ValueError(f"{parent(file.uri)}: no sample of the tars has {name!r} ({key}={name}). They have: {listed}.")


def read(listing: Listing, files: Sequence[File], wish: Wish) -> Source:
    """Tars of `key.jpg` + `key.txt` / `key.json` / `key.cls` → rows with the byte range of each image.

    The recipe's columns are extensions here, or of captions a key of the `.json`. ValueError when no sample has them.
    """
    parts, bad = [], []
    seen = Seen()
    for file in files:
        samples = list(_samples(file, wish, seen))
        parts.append(pa.Table.from_pylist([s for s in samples if not s["reason"]], schema=RAW))
        bad += [s for s in samples if s["reason"]]
    seen.check(files[0], wish)
    rows = pa.concat_tables(parts)
    notes = ["Images by byte range from the tars; sample ids are shard and key."]
    return Source(rows, pa.Table.from_pylist(bad, schema=QUARANTINE), [], notes)


def _samples(file: File, wish: Wish, seen: Seen) -> Iterator[dict[str, Any]]:
    """One RAW row for each run of members that share a key, with the `reason` why it cannot be used, "" where it can."""
    sample: dict[str, Any] = {}
    key = None
    for name, extension, member, body in _members(file, wish):
        if name != key:
            if sample:
                yield _finished(sample)
            key = name
            shard = posixpath.splitext(file.name)[0]
            sample = dict.fromkeys(RAW.names) | {"id": f"{shard}/{name}", "path": file.uri, "where": "tar", "label": -1}
            sample |= {"row": member.offset_data, "reason": ""}
        seen.extensions.add(extension)
        if extension == wish.image_column.lower() if wish.image_column else extension in IMAGES:
            sample |= {"row": member.offset_data, "size": member.size}
        elif body is not None:
            _read_member(sample, extension, body, wish, seen)
    if sample:
        yield _finished(sample)


def _finished(sample: dict[str, Any]) -> dict[str, Any]:
    if sample["size"] is None:
        sample["reason"] = f"sample {sample['id']} has no image in the tar"
    texts: dict[str, Any] = {name: scrubbed(sample[name]) for name in ("caption", "class") if sample[name]}
    if sample["captions"]:
        texts["captions"] = [scrubbed(text) for text in sample["captions"]]
    return sample | texts


def _members(file: File, wish: Wish) -> Iterator[tuple[str, str, tarfile.TarInfo, bytes | None]]:
    """(key, extension, member, bytes of a small member). A key ends at the base name's first dot, as in WebDataset."""
    store, path = resolve(file.uri)
    stream = is_uri(file.uri)
    # On a disk images are skipped by seeking; in a store each seek is a request, and one long read is far cheaper.
    handle = store.open_input_stream(path, buffer_size=READ_AHEAD) if stream else store.open_input_file(path)
    small = {"txt", "json", "cls", wish.caption_column.lower()}
    count = 0
    with handle:
        try:
            with tarfile.open(fileobj=handle, mode="r|" if stream else "r:") as tar:
                for member in tar:
                    # A name may be in another encoding than UTF-8, and is part of an id all the same.
                    folder, base = posixpath.split(member.name.encode("utf-8", "backslashreplace").decode())
                    name, _, extension = base.partition(".")
                    if not member.isreg() or member.issparse() or not name:
                        continue
                    opened = tar.extractfile(member) if extension.lower() in small else None
                    yield posixpath.join(folder, name), extension.lower(), member, opened.read() if opened else None
                    tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps every header of the shard
                    count += 1
                if tar.offset + tarfile.BLOCKSIZE > file.size:  # type: ignore[attr-defined]
                    # tarfile takes a cut between two members for the end; a whole tar closes with blocks of zeros.
                    raise tarfile.ReadError("no end mark")
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise ValueError(
                f"{file.uri} ends early or is no plain tar ({error}, after {count} members). "
                "Copy it again, unpack it if it is compressed, or take it out of the set."
            ) from error


def _read_member(sample: dict[str, Any], extension: str, body: bytes, wish: Wish, seen: Seen) -> None:
    text = body.decode("utf-8", errors="replace")
    if extension == "json":
        _read_json(sample, text, wish, seen)
    elif extension == "cls" and (words := text.strip()):
        _set_label(sample, words)
    elif extension == (wish.caption_column.lower() or "txt"):
        sample["caption"] = text.strip()


def _set_label(sample: dict[str, Any], words: str) -> None:
    if not re.fullmatch(r"-?\d+", words):
        sample["class"] = words
    elif len(words.lstrip("-0")) < 10:
        sample["label"] = int(words)
    else:
        sample["reason"] = f"label {words[:20]} is no class number"


def _read_json(sample: dict[str, Any], text: str, wish: Wish, seen: Seen) -> None:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        sample["reason"] = f"its .json is no JSON ({error})"
        return
    if not isinstance(values, dict):
        return
    names = list(values)
    seen.keys.update(names)
    caption = values.get(wish.caption_column or column(names, CAPTIONS))
    if isinstance(caption, list):
        sample["captions"] = [str(c) for c in caption]
        caption = caption[0] if caption else None
    many = values.get("captions")
    if isinstance(many, list):
        sample["captions"] = [str(c) for c in many]
    if isinstance(caption, str) and sample["caption"] is None:  # a .txt of the same key comes first
        sample["caption"] = caption
    label, name = values.get(column(names, LABELS)), values.get(column(names, CLASSES))
    if isinstance(label, int) and not isinstance(label, bool):
        _set_label(sample, str(label))
    elif isinstance(label, str) and label.strip():
        sample["class"] = label
    if isinstance(name, str) and name.strip():
        sample["class"] = name
