"""Which classes a set is evaluated on, and the label of each row: given, or made from nouns in the captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from orchestrate.data.nouns import noun_labels
from orchestrate.data.rows import RAW, Source

LABEL = RAW.get_field_index("label")


def given_names(parts: Mapping[str, Source], beside: Sequence[str], classes: Sequence[str]) -> tuple[list[str], str]:
    """(class names, a sentence on where labels and names come from); no names when the rows hold no labels.

    `beside`: names found in a class file; `classes`: the recipe's, used when nothing else names the labels. ValueError
    for a label without a name.
    """
    rows = pa.concat_tables(part.rows for part in parts.values())
    words = sorted(pc.unique(rows["class"]).drop_null().to_pylist())
    if not pc.any(pc.greater_equal(rows["label"], 0)).as_py():
        return words, "Labels and class names from the rows." if words else ""
    choices = (
        (beside, "the class file"),
        (parts["train"].classes, "the Parquet's metadata"),
        (_paired(rows) if words else [], "the rows' class column"),
        (classes, "data.classes"),
    )
    names, origin = next(((list(names), origin) for names, origin in choices if names), ([], ""))
    if not names:
        return [], "Label numbers without class names are not used: give names in data.classes or classnames.json."
    blank = next((i for i, name in enumerate(names) if not name.strip()), None)
    if blank is not None:
        raise ValueError(f"Class number {blank} has no name in {origin}. Give it one, or leave its rows out.")
    wrong = rows.filter(pc.greater_equal(rows["label"], len(names))).slice(0, 1).to_pylist()
    if wrong:
        raise ValueError(
            f"{wrong[0]['path']}, row {wrong[0]['row']}: label {wrong[0]['label']}, but {origin} names {len(names)} "
            f"classes (0 to {len(names) - 1}). Add the missing names."
        )
    return names, f"Labels from the rows, class names from {origin}."


def _paired(rows: pa.Table) -> list[str]:
    """Class names from rows that hold both the number and the name."""
    pairs = rows.select(["label", "class"]).group_by(["label", "class"]).aggregate([]).drop_null().to_pylist()
    names = {pair["label"]: pair["class"] for pair in pairs if pair["label"] >= 0}
    clash = next((p for p in pairs if p["label"] >= 0 and names[p["label"]] != p["class"]), None)
    if clash:
        both = f"{names[clash['label']]!r} and {clash['class']!r}"
        raise ValueError(f"Label {clash['label']} is called both {both} in the rows. Settle it with a classnames.json.")
    return [names.get(i, f"class {i}") for i in range(max(names, default=-1) + 1)]


def labelled(rows: pa.Table, names: Sequence[str]) -> pa.Table:
    """Rows with label numbers also where they only hold class names; −1 where there are no names at all."""
    if not names:
        return rows.set_column(LABEL, "label", pa.repeat(pa.scalar(-1, pa.int32()), rows.num_rows))
    known = pc.fill_null(pc.index_in(rows["class"], value_set=pa.array(names, pa.string())), -1)
    label = pc.if_else(pc.greater_equal(rows["label"], 0), rows["label"], known)
    return rows.set_column(LABEL, "label", label.cast(pa.int32()))


def evaluation(
    given: Sequence[str], classes: Sequence[str], train: pa.Table, heldout: pa.Table
) -> tuple[list[str], pa.Table, pa.Table, str]:
    """(classes to evaluate on, train, held-out, a sentence): labels renumbered to those classes.

    The set's own classes (`given`), of which `classes` may choose some; without any, nouns in the captions: `classes`,
    or those found in all of train. ValueError when `classes` names one that a labelled set has not.
    """
    if given:
        return _chosen(given, classes, train, heldout)
    names, labels, counts = noun_labels(_all_captions(train), classes)
    if not names:
        return [], train, heldout, "No labels, and no noun is frequent enough to be a class: name some in data.classes."
    _, held, rest = noun_labels(_all_captions(heldout), names)
    train = train.set_column(LABEL, "label", pa.array(labels, pa.int32()))
    heldout = heldout.set_column(LABEL, "label", pa.array(held, pa.int32()))
    listed = ", ".join(f"{name} {count:,} + {rest[name]:,}" for name, count in counts.items())
    origin = "data.classes" if classes else "frequent nouns of the training captions"
    return (
        names,
        train,
        heldout,
        (
            f"Labels are MADE: classes are {origin}, and a pair has a label where its captions name just one of them "
            f"(train + held-out: {listed})."
        ),
    )


def _chosen(given: Sequence[str], classes: Sequence[str], train: pa.Table, heldout: pa.Table) -> tuple[list[str], pa.Table, pa.Table, str]:
    wanted = list(classes) or list(given)
    unknown = [name for name in wanted if name not in given]
    if unknown:
        raise ValueError(f"data.classes: {', '.join(unknown)} is no class of this set. It has: {', '.join(given)}.")
    if wanted == list(given):
        return wanted, train, heldout, ""
    renumber = pa.array([wanted.index(name) if name in wanted else -1 for name in given], pa.int32())
    train, heldout = _relabel(train, renumber), _relabel(heldout, renumber)
    return wanted, train, heldout, f"Evaluated on {len(wanted)} of its {len(given)} classes (data.classes)."


def _relabel(rows: pa.Table, renumber: pa.Array) -> pa.Table:
    known = pc.if_else(pc.greater_equal(rows["label"], 0), rows["label"], pa.scalar(None, pa.int32()))
    return rows.set_column(LABEL, "label", pc.fill_null(renumber.take(known.combine_chunks()), -1))


def _all_captions(rows: pa.Table) -> list[list[str]]:
    pairs = zip(rows["caption"].to_pylist(), rows["captions"].to_pylist(), strict=True)
    return [[caption, *(c for c in more or () if c)] for caption, more in pairs]
