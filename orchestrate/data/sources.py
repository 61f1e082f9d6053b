"""What a set of files is: sniffed, split into train and held-out, and read into one table of raw rows.

A source reads metadata only; image bytes stay where they are until `orchestrate.data.reader` asks for them.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Sequence

from orchestrate.data import parquet, tables, webdataset
from orchestrate.data.files import File, Listing, child, open_file, sizes
from orchestrate.data.rows import IMAGE_FILES, Reader, Source, Wish, scrubbed

KINDS = {".tar": "tar", ".parquet": "parquet", ".pq": "parquet", ".csv": "table", ".tsv": "table"}


def read(listing: Listing, wish: Wish) -> tuple[str, dict[str, Source], list[str]]:
    """Sniff the format, split the files, read both splits: (format, {"train": …, "heldout": … if there is one}, notes).

    ValueError when the files are of no known kind.
    """
    kind, reader, files, notes = sniff(listing, wish)
    splits, more = split(files, listing.single)
    counts = " and ".join(f"{len(some)} {name} file{'s'[: len(some) > 1]}" for name, some in splits.items())
    parts = {name: reader(listing, some, wish) for name, some in splits.items()}
    return f"{kind}, {counts.replace('heldout', 'held-out')}", parts, notes + more


def sniff(listing: Listing, wish: Wish) -> tuple[str, Reader, list[File], list[str]]:
    """(name of the format, its reader, the files it reads, notes on files left out)."""
    groups: dict[str, list[File]] = {}
    for file in listing.files:
        groups.setdefault(_kind(file.name), []).append(file)
    tars, parquets, texts = (groups.get(kind, []) for kind in ("tar", "parquet", "table"))
    notes = []
    if tars:
        stems = {file.name.removesuffix(".tar") for file in tars}
        side = [file for file in parquets if file.name.removesuffix(".parquet") in stems]
        if side:
            notes.append(f"{len(side)} Parquet files beside the tars repeat what the tars hold and are not read.")
        notes += _left_out([file for file in parquets if file not in side] + texts, "the set is read from its tars")
        return ("img2dataset tars" if side else "WebDataset tars"), webdataset.read, tars, notes
    if parquets:
        name, reader = parquet.flavour(parquets[0], wish)
        return name, reader, parquets, _left_out(texts, "the set is read from its Parquet files")
    if texts:
        return "CSV/TSV", tables.read, texts, []
    found = ", ".join(f"{len(files)} {kind}" for kind, files in sorted(groups.items()))
    packed = next((file for file in listing.files if re.search(r"\.(tgz|tar\.\w+|zip|gz)$", file.name)), None)
    mend = "Write a CSV with the columns filepath and title."
    mend = f"Unpack {packed.name} first: images are read in place." if packed else mend
    raise ValueError(f"{listing.root} holds no Parquet, tar, CSV or TSV file; found: {found}. {mend}")


def _kind(name: str) -> str:
    ending = posixpath.splitext(name.lower())[1]
    if ending in IMAGE_FILES:
        return "images"
    return KINDS.get(ending, ending or "other files")


def _left_out(files: list[File], why: str) -> list[str]:
    names = ", ".join(file.name for file in files[:3]) + (" …" if len(files) > 3 else "")
    return [f"Not used, as {why}: {names}."] if files else []


def split(files: Sequence[File], single: bool) -> tuple[dict[str, list[File]], list[str]]:
    """Files by what their names say: train*, test* (held-out), val* (held-out when there is no test).

    A file's own name counts before its folders'. Without any train file, all are train files.
    """
    parts: dict[str, list[File]] = {"train": [], "test": [], "val": [], "": []}
    for file in files:
        parts[split_of(file.name)].append(file)
    if single or not parts["train"]:
        return {"train": list(files)}, []
    held = "test" if parts["test"] else "val"
    notes = _left_out(parts[""], "their names belong to no split, unlike the others'")
    notes += _left_out(parts["val"], "the test files are held out") if held == "test" else []
    return {"train": parts["train"]} | ({"heldout": parts[held]} if parts[held] else {}), notes


def split_of(name: str) -> str:
    """train, test, val or "", from a relative path: `train-00000.parquet`, `cc3m_train.csv`, `test/00000.tar`."""
    for part in reversed(name.lower().split("/")):
        found = re.search(r"(?:^|[-_.])(train|test|val)(?:ing|id|idation)?(?=$|[-_.\d])", part)
        if found:
            return found[1]
    return ""


def class_file(listing: Listing) -> list[str]:
    """Class names from `classnames.json` / `classes.json` (a list) or the same as .txt (one a line); [] if none.

    Looked for among the set's files, else beside them: a glob such as `cifar10/*.parquet` names no class file.
    """
    names = ("classnames.json", "classes.json", "classnames.txt", "classes.txt")
    uris = [file.uri for file in listing.files if posixpath.basename(file.name) in names]
    if not listing.whole:
        uris = uris or list(sizes([child(listing.root, name) for name in names]))
    if not uris:
        return []
    what = "a JSON list of class names" if uris[0].endswith(".json") else "UTF-8 text with a class name a line"
    try:
        with open_file(uris[0]) as file:
            text = file.read().decode("utf-8-sig")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        found = json.loads(text) if uris[0].endswith(".json") else lines
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{uris[0]} cannot be read: {error}. It must be {what}, in the order of the labels.") from error
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{uris[0]} must be {what}, in the order of the labels.")
    return [scrubbed(name) for name in found]
