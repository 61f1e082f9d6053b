"""The index: one table of image–caption pairs from any source, split, selected, captioned and labelled.

Pixels stay where they are; `orchestrate.data.reader` fetches them by the index's references.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attacks.base import how_many, ranks
from orchestrate.data import sources
from orchestrate.data.captions import NOUN_SHARE, made_captions
from orchestrate.data.files import find
from orchestrate.data.labels import evaluation, given_names, labelled
from orchestrate.data.reader import check_share
from orchestrate.data.rows import QUARANTINE, RAW, VARIANT, Source, Wish, bad_rows, unique_ids, variant

INDEX = pa.schema([RAW.field(name) for name in ("id", "path", "where", "row", "size", "caption", "label")])
TEMPLATES: tuple[str, ...] = ("a photo of a {}", "a picture of a {}", "an image of a {}", "{}")
SCENES, SCENE_SIDE = 4_000, 64  # built-in training scenes when data.size is 0; pixels when data.side is 0

Progress = Callable[[int, int], None]


class Data(Protocol):
    """The recipe's `data` section, as this room reads it."""

    @property
    def path(self) -> str: ...
    @property
    def size(self) -> int | float: ...
    @property
    def heldout(self) -> int | float: ...
    @property
    def captions(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def templates(self) -> tuple[str, ...]: ...
    @property
    def side(self) -> int: ...
    @property
    def max_bad(self) -> float: ...
    @property
    def image_column(self) -> str: ...
    @property
    def caption_column(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def cache(self) -> str: ...


@dataclass(frozen=True)
class Dataset:
    """What a run learns from and is measured on.

    `train` and `heldout` are INDEX tables with schema metadata `classes` (JSON list); a label is an index into
    `classes`, −1 unknown. `report`: sentences on what was understood. `quarantine`: rows left out, and why.
    """

    name: str
    train: pa.Table
    heldout: pa.Table
    classes: list[str]
    templates: tuple[str, ...]
    report: list[str] = field(default_factory=list)
    quarantine: pa.Table = field(default_factory=QUARANTINE.empty_table)
    carved: bool = False  # whether the held-out pairs were taken from the training files, as the set has no others

    @cached_property
    def digest(self) -> str:
        """See `fingerprint`; once for each data set, for it goes through every caption."""
        digest = hashlib.blake2b(digest_size=8)
        for table in (self.train, self.heldout):
            digest.update(f"{table.num_rows} {json.dumps(self.classes)}".encode())
            for batch in table.to_batches(max_chunksize=10_000):
                columns = batch.select(["id", "caption", "label", "size"]).to_pydict()
                names = [posixpath.basename(path) for path in batch["path"].to_pylist()]
                digest.update(json.dumps([*columns.values(), names]).encode())
        return digest.hexdigest()


def open_dataset(config: Data, progress: Progress | None = None) -> Dataset:
    """The set that `data.path` names: "scenes" (built in, made on first use), a file, a folder, a glob or a URI.

    `progress(done, total)` counts built-in scenes while they are made. No image is decoded. ValueError, with the mend,
    for whatever cannot be used as it is, and when more than the share `data.max_bad` of the rows is quarantined.
    """
    _check(config)
    scenes = config.path == "scenes"
    listing = find(str(_scenes(config, progress)) if scenes else config.path)
    kind, parts, notes = sources.read(listing, Wish(config.image_column, config.caption_column))
    name = "scenes" if scenes else posixpath.basename(config.path.partition("?")[0].rstrip("/"))
    _check_found(config, parts)
    names, labels_note = given_names(parts, sources.class_file(listing), config.classes)
    tables, bad, captions_note = _usable(config, parts, names)
    total = sum(part.rows.num_rows + part.bad.num_rows for part in parts.values())
    check_share(total, bad, config.max_bad)
    if not tables["train"].num_rows:
        raise ValueError(f"{config.path} has no usable training row: all {total:,} are quarantined.")
    train, heldout, split_note = _split(tables, config)
    classes, train, heldout, classes_note = evaluation(names, config.classes, train, heldout)
    train, every_note = _every_caption(train) if config.captions == "every" else (train, "")
    train, size_note = (train, "") if scenes else _keep(train, config)
    report = [f"{name}: {'built-in scenes, ' if scenes else ''}{kind}.", *notes, *parts["train"].notes, captions_note]
    report += [labels_note, classes_note, split_note, every_note, size_note, _counts_note(classes, train, heldout)]
    report += [f"{bad.num_rows:,} of {total:,} rows quarantined." if bad.num_rows else "No row quarantined."]
    meta = {b"classes": json.dumps(classes).encode()}
    train, heldout = (rows.select(INDEX.names).replace_schema_metadata(meta) for rows in (train, heldout))
    templates = tuple(config.templates) or TEMPLATES
    report = [note for note in report if note]
    return Dataset(name, train, heldout, classes, templates, report, bad, carved="heldout" not in parts)


def fingerprint(dataset: Dataset) -> str:
    """16 hex digits over ids, captions, labels, file names and sizes of both splits, in order; folders do not count."""
    return dataset.digest


def _check(config: Data) -> None:
    if config.captions not in ("auto", "given", "every", "made"):
        raise ValueError(f"data.captions={config.captions} is unknown: it is auto, given, every or made.")
    for template in config.templates:
        if template.count("{}") != 1:
            raise ValueError(f"data.templates: {template!r} needs one {{}}, where the class name goes.")
    if not 0 <= config.max_bad <= 1:
        raise ValueError(f"data.max_bad={config.max_bad} is no share: give a number between 0 and 1.")
    if len(set(config.classes)) < len(config.classes):
        raise ValueError("data.classes names a class twice.")


def _amount(amount: int | float, total: int, key: str) -> int:
    """A count, or a share of `total` (a float up to 1.0, which means all)."""
    try:
        return how_many(amount, total)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _scenes(config: Data, progress: Progress | None) -> Path:
    from orchestrate.data import scenes

    train = _amount(config.size, SCENES, "data.size") or SCENES
    heldout = _amount(config.heldout, train, "data.heldout")
    side = max(32, config.side or SCENE_SIDE)
    cache = Path(os.path.abspath(os.path.expanduser(config.cache)))
    folder = cache / f"scenes-v{scenes.VERSION}-{train}-{heldout}-{side}-{config.seed}"
    return scenes.generate(folder, train, heldout, seed=config.seed, side=side, progress=progress)


def _check_found(config: Data, parts: dict[str, Source]) -> None:
    """Lost images stop the run before anything is said about captions: they are the likelier cause."""
    bad = pa.concat_tables(part.bad for part in parts.values())
    total = bad.num_rows + sum(part.rows.num_rows for part in parts.values())
    check_share(total, bad, config.max_bad)
    if not parts["train"].rows.num_rows:
        raise ValueError(f"{config.path} holds no training row that can be used ({total:,} rows in all).")


def _usable(config: Data, parts: dict[str, Source], names: Sequence[str]) -> tuple[dict[str, pa.Table], pa.Table, str]:
    """(labelled and captioned rows of each split, quarantine, a sentence on the captions). Ids are checked."""
    made = _wants_made(config, parts["train"].rows, names)
    tables, bad = {}, []
    for split, part in parts.items():
        tables[split], lost = _captioned(labelled(part.rows, names), names, config.seed, made)
        bad += [part.bad, lost]
        unique_ids(tables[split])
    different = len(pc.unique(tables["train"]["caption"]))
    note = f"Captions are given: {different:,} different ones in train."
    if made:
        note = (
            f"Captions are MADE from class names ({different:,} different ones in train): {NOUN_SHARE:.0%} use the "
            "class name, the others a synonym where there is one; size, look, place and time are drawn by lot."
        )
    return tables, pa.concat_tables(bad), note


def _wants_made(config: Data, train: pa.Table, names: Sequence[str]) -> bool:
    given = train["caption"].null_count < train.num_rows
    if config.captions in ("given", "every") and not given:
        mend = "Name the column (data.caption_column=…) or have them made (data.captions=made)."
        raise ValueError(f"{config.path} has no captions. {mend}")
    if given and config.captions != "made":
        return False
    if not names:
        raise ValueError(
            f"{config.path} has no {'class labels' if given else 'captions, nor class labels'} to make captions from: "
            "name the caption column (data.caption_column=…), or give labels and their names (classnames.json)."
        )
    return True


def _captioned(rows: pa.Table, names: Sequence[str], seed: int, made: bool) -> tuple[pa.Table, pa.Table]:
    """(rows with a usable caption, the others for quarantine)."""
    if made:
        good = pc.greater_equal(rows["label"], 0)
        kept, lost = rows.filter(good), rows.filter(pc.invert(good))
        texts = made_captions(kept["id"].to_pylist(), kept["label"].to_pylist(), names, seed)
        captions = pa.array(texts, pa.string())
        kept = kept.set_column(RAW.get_field_index("caption"), "caption", captions)
        return kept, bad_rows(lost, lost["path"], "no label to make a caption from")
    # Unicode letters of any script: a caption of digits and signs teaches a text encoder nothing.
    good = pc.fill_null(pc.match_substring_regex(rows["caption"], r"\p{L}"), False)
    lost = rows.filter(pc.invert(good))
    blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(lost["caption"]), ""), True)
    reasons = pc.if_else(blank, "empty caption", "caption without any letter")
    return rows.filter(good), bad_rows(lost, lost["path"], reasons)


def _split(tables: dict[str, pa.Table], config: Data) -> tuple[pa.Table, pa.Table, str]:
    """(train, held-out, a sentence). A found split is cut to data.heldout; else one is carved from train, by image."""
    train = tables["train"]
    if "heldout" in tables:
        found = tables["heldout"]
        count = min(found.num_rows, _amount(config.heldout, found.num_rows, "data.heldout"))
        heldout = _by_hash(found, count, config.seed, "heldout")
        note = f"Held-out: {count:,} of the {found.num_rows:,} pairs of the set's own held-out files."
        both = pc.sum(pc.is_in(heldout["id"], value_set=train["id"].combine_chunks())).as_py() or 0
        note += f" {both:,} of their ids occur in train too: are these the same images?" if both else ""
        return train, heldout, note
    count = _amount(config.heldout, train.num_rows, "data.heldout")
    if 2 * count > train.num_rows:
        raise ValueError(
            f"{config.path} has {train.num_rows:,} usable rows and no held-out files; data.heldout={config.heldout} "
            "would take more than half. Lower it (data.heldout=0.2), or put test files beside the training files."
        )
    images = pa.array([VARIANT.sub("", i) for i in train["id"].to_pylist()], pa.string())
    mask = pc.is_in(images, value_set=_first(images, count, config.seed))
    heldout = train.filter(mask)
    note = f"Held-out: {heldout.num_rows:,} pairs carved out of train by hash, as there are no held-out files."
    return train.filter(pc.invert(mask)), heldout, note


def _first(images: pa.Array, count: int, seed: int) -> pa.Array:
    """Images in order of hash until they make at least `count` rows: all captions of an image go to the same side."""
    tally = pc.value_counts(images)
    names = tally.field("values")
    order = np.argsort(ranks(names.to_pylist(), seed, "heldout"), kind="stable")
    rows = np.cumsum(tally.field("counts").to_numpy()[order])
    return names.take(pa.array(order[: int(np.searchsorted(rows, count)) + 1 if count else 0]))


def _every_caption(train: pa.Table) -> tuple[pa.Table, str]:
    """A pair for each different caption of an image; the first keeps the image's id, the others carry a hash of the caption."""
    at, ids, texts = list[int](), list[str](), list[str]()
    columns = (train[name].to_pylist() for name in ("id", "caption", "captions"))
    for i, (ident, first, more) in enumerate(zip(*columns, strict=True)):
        others = dict.fromkeys(text for text in more or () if text and any(map(str.isalpha, text)))
        others.pop(first, None)
        at += [i] * (1 + len(others))
        ids += [ident, *(variant(ident, text) for text in others)]
        texts += [first, *others]
    pairs = train.take(pa.array(at, pa.int64()))
    for name, values in (("id", ids), ("caption", texts)):
        pairs = pairs.set_column(RAW.get_field_index(name), name, pa.array(values, pa.string()))
    unique_ids(pairs)
    return pairs, f"{train.num_rows:,} training images make {len(ids):,} pairs, one a caption (data.captions=every)."


def _by_hash(rows: pa.Table, count: int, seed: int, salt: str) -> pa.Table:
    """`count` rows chosen by (id, seed), in the order they had."""
    if count == rows.num_rows:
        return rows
    order = np.argsort(ranks(rows["id"].to_pylist(), seed, salt), kind="stable")[:count]
    return rows.take(pa.array(np.sort(order)))


def _keep(train: pa.Table, config: Data) -> tuple[pa.Table, str]:
    whole = train.num_rows
    count = _amount(config.size, whole, "data.size") or whole
    if count > whole:
        raise ValueError(f"data.size={config.size}, but only {whole:,} usable training pairs are there. 0 takes all.")
    note = f"{count:,} of {whole:,} training pairs kept by hash (data.size={config.size})." if count < whole else ""
    return _by_hash(train, count, config.seed, "size"), note


def _counts_note(classes: Sequence[str], train: pa.Table, heldout: pa.Table) -> str:
    known = [pc.sum(pc.greater_equal(rows["label"], 0)).as_py() or 0 for rows in (train, heldout)]
    listed = ", ".join(classes[:20]) + (" …" if len(classes) > 20 else "")
    return (
        f"{train.num_rows:,} training pairs ({known[0]:,} labelled), {heldout.num_rows:,} held-out "
        f"({known[1]:,} labelled), {len(classes)} classes{': ' * bool(classes)}{listed}."
    )
