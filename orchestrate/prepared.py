"""A recipe's data, ready to train on: clean index → readable index → manifest → poisoned table; and the pixels of either. No Ray."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from attacks.apply import apply
from attacks.base import Manifest, Probes, how_many, manifest, pick
from attacks.combine import Several
from attacks.materials import carried, materials
from defenses.base import Defense
from orchestrate import audit_scores
from orchestrate.data import reader
from orchestrate.data.index import Data, Dataset, fingerprint, open_dataset
from orchestrate.data.pixels import REFERENCE, Pixels
from orchestrate.progress import Phase
from orchestrate.recipe import AUDIT, Cluster, Recipe

PROBE_SALT = "probe"
Load = Callable[[pa.Table], np.ndarray]


def opened(config: Data) -> Dataset:
    """The index of a set, with its progress shown. Errors are `open_dataset`'s."""
    with Phase("data") as phase:
        return open_dataset(config, lambda done, total: phase.at(done, total=total))


def build_attack(recipe: Recipe, table: pa.Table | None = None) -> Several | None:
    """The recipe's attack; with the poisoned table of its plan also what its stamps need from there."""
    return Several(recipe.attack.parts, carried(table.schema.metadata) if table is not None else {}) if recipe.attack else None


def build_defense(recipe: Recipe) -> Defense:
    return recipe.defense.parts[0][1] if recipe.defense else Defense()


def needs(recipe: Recipe, streaming: bool | None = None) -> tuple[Cluster, bool, bool]:
    """What `capacity` counts: the recipe's cluster, whether it matches or audits, and whether it streams.

    Before its set is known (`streaming` None) a recipe streams where it says so.
    """
    matching = bool(build_defense(recipe).rounds(recipe.train.epochs)) or recipe.data.exclude == AUDIT  # whose actors are alike
    return recipe.cluster, matching, recipe.data.stream == "always" if streaming is None else streaming


def readable(recipe: Recipe) -> Dataset:
    """The index less the images that a run has found unreadable, so that whoever reads no other is given the run's own set and plan."""
    dataset = opened(recipe.data)
    return without_known(recipe, dataset, known_unreadable(recipe, dataset) or [])


@dataclass(frozen=True)
class Prepared:
    """`table`: what training reads (attacks.apply). `clean`: the index without poison. Both exclude unreadable images."""

    dataset: Dataset
    table: pa.Table
    manifest: Manifest | None
    probes: Probes

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.dataset)


def without_unreadable(dataset: Dataset, bad: Sequence[tuple[str, str]], max_bad: float) -> Dataset:
    """The data set less the rows whose images failed, `bad` = (id, reason); ValueError when they are too many."""
    if not bad:
        return dataset
    reasons = dict(bad)
    ids = pa.array(list(reasons))
    lost = [t.filter(pc.is_in(t["id"], value_set=ids)) for t in (dataset.train, dataset.heldout)]
    quarantine = [dataset.quarantine]
    for rows in lost:
        errors = [(i, reasons[name]) for i, name in enumerate(rows["id"].to_pylist())]
        quarantine.append(reader.quarantined(rows, errors))
    found = pa.concat_tables(quarantine)
    total = dataset.train.num_rows + dataset.heldout.num_rows + dataset.quarantine.num_rows
    reader.check_share(total, found, max_bad)
    keep = [t.filter(pc.invert(pc.is_in(t["id"], value_set=ids))) for t in (dataset.train, dataset.heldout)]
    note = f"{len(reasons):,} images could not be read and are quarantined."
    return replace(dataset, train=keep[0], heldout=keep[1], quarantine=found, report=[*dataset.report, note])


def plan(recipe: Recipe, dataset: Dataset, load: Load | None = None) -> Prepared:
    """Poison on paper: the manifest, the table it makes less what an audit leaves out of it, and the probes that measure it.

    What the run's own audit is to find (data.exclude=audit) is not known yet: see `without_suspects`.
    `load`: index rows → pixels, for attacks that study the set; decoded from its files where it is not given.
    """
    ready = _poisoned(recipe, dataset, load)
    return ready if recipe.data.exclude in ("", AUDIT) else without_suspects(ready, recipe.data.exclude, recipe.data.drop)


def without_suspects(ready: Prepared, scores: str, drop: int | float) -> Prepared:
    """Less the pairs that rank highest in a scores.parquet, so many or such a share of them."""
    return replace(ready, table=audit_scores.without(ready.table, scores, drop))


def left_out(ready: Prepared) -> tuple[int, int]:
    """Pairs that an audit keeps from training, and how many of them are poisoned."""
    planned = ready.manifest
    added = int(pc.sum(pc.equal(planned.table["op"], "add")).as_py() or 0) if planned else 0
    poison = int(pc.sum(ready.table["poison"]).as_py() or 0)
    return ready.dataset.train.num_rows + added - ready.table.num_rows, (planned.count if planned else 0) - poison


def _poisoned(recipe: Recipe, dataset: Dataset, load: Load | None) -> Prepared:
    attack = build_attack(recipe)
    seed = recipe.seed
    if attack is None:
        return Prepared(dataset, unpoisoned(dataset.train, seed), None, Probes())
    if not dataset.classes:
        raise ValueError(f"{recipe.data.path} has no classes to attack: name some with data.classes=dog,cat,… or take attack=none.")
    study = None
    if attack.studies:
        from orchestrate.study import SetStudy  # trains a model

        study = SetStudy(recipe, dataset, load or loader(recipe, None, None, None))
    planned = attack.plan(dataset.train, dataset.heldout, seed, study)
    probes = attack.probes(dataset.train, dataset.heldout, seed, study)
    return Prepared(dataset, apply(dataset.train, dataset.heldout, planned), planned, probes)


def unpoisoned(index: pa.Table, seed: int) -> pa.Table:
    """An index with the columns of a poisoned table."""
    return apply(index, index.slice(0, 0), manifest(Defense(), [], index, seed))


def plan_key(recipe: Recipe, dataset: Dataset) -> str:
    """Recipes of equal keys have equal plans on this data set."""
    attack = recipe.attack.as_dict() if recipe.attack else None
    left = [] if recipe.data.exclude in ("", AUDIT) else [recipe.data.exclude, recipe.data.drop]
    return json.dumps([fingerprint(dataset), attack, recipe.seed, *left], sort_keys=True)


def check_same_poison(run_dir: Path, prepared: Prepared) -> None:
    """ValueError where this plan differs from the one that the run's first epochs have learned from, before `write` replaces it.

    A surrogate's weights are those of the host that trained it, and so is what an attack makes of them.
    """
    file = run_dir / "manifest.parquet"
    if prepared.manifest is None or not file.is_file():
        return
    old, new = Manifest.read(str(file)), prepared.manifest
    before, now = ({row["id"]: row for row in plan.table.to_pylist()} for plan in (old, new))
    differ = [i for i in sorted(before.keys() | now.keys()) if before.get(i) != now.get(i)]
    look = [json.dumps(materials(plan.header), sort_keys=True) for plan in (old, new)]
    what = f"{len(differ):,} of {len(before):,} pairs, such as {differ[0]!r}" if differ else "what its triggers look like"
    if differ or look[0] != look[1]:
        raise ValueError(
            f"{run_dir} was trained on another poison than its recipe plans here; it differs in {what}. If another host began the run, "
            "bring its data.cache along, where the attack's surrogate lies; or begin anew with --force."
        )


def write(run_dir: Path, prepared: Prepared) -> None:
    """manifest.parquet, quarantine.parquet and data.json beside the run."""
    dataset = prepared.dataset
    if prepared.manifest:
        prepared.manifest.write(str(run_dir / "manifest.parquet"))
    pq.write_table(dataset.quarantine, run_dir / "quarantine.parquet")
    told = {
        "name": dataset.name,
        "report": dataset.report,
        "quarantined": dataset.quarantine.num_rows,
        "train": dataset.train.num_rows,
        "pairs": prepared.table.num_rows,
        "heldout": dataset.heldout.num_rows,
        "fingerprint": prepared.fingerprint,
        "classes": dataset.classes,
        "templates": list(dataset.templates),
    }
    (run_dir / "data.json").write_text(json.dumps(told, indent=1, ensure_ascii=False))


def pixels_of(recipe: Recipe, attack: Any, table: pa.Table, images: np.ndarray | None, place: np.ndarray | None, side: int = 0) -> Pixels:
    return Pixels(table, attack, side or stored_side(recipe), recipe.data.max_pixels, images, place)


def stored_side(recipe: Recipe) -> int:
    """Side in px of images as they are kept, stamped and cropped from."""
    return recipe.data.side or model_side(recipe)


def model_side(recipe: Recipe) -> int:
    """Side in px of the model's input."""
    from models import clip

    return clip.side(clip.config(recipe.model.name, recipe.model.image_size or None))


def as_clean(table: pa.Table) -> pa.Table:
    """An index table with the columns that `Pixels` wants, no trigger anywhere."""
    n = table.num_rows
    return table.append_column("image_id", table["id"]).append_column("stamp", pa.repeat(pa.scalar(""), n))


# --- where pixels lie ----------------------------------------------------------------------------------------------------------


def places(distinct_rows: pa.Table) -> dict[Any, int]:
    """Image reference → position in the decoded array."""
    columns = [distinct_rows.column(name).to_pylist() for name in REFERENCE]
    return {key: i for i, key in enumerate(zip(*columns, strict=True))}


def place_of(table: pa.Table, where: dict[Any, int]) -> np.ndarray:
    """For each row the position of its pixels in the decoded array, int64 (rows,)."""
    columns = [table.column(name).to_pylist() for name in REFERENCE]
    return np.fromiter((where[key] for key in zip(*columns, strict=True)), np.int64, table.num_rows)


def streams(recipe: Recipe, dataset: Dataset) -> bool:
    """Whether images are decoded when needed rather than once."""
    if recipe.data.stream != "auto":
        return recipe.data.stream == "always"
    side = stored_side(recipe)
    return (dataset.train.num_rows + dataset.heldout.num_rows) * side * side * 3 > recipe.data.memory_gb * 1e9


def check_size(recipe: Recipe, table: pa.Table) -> None:
    """ValueError for a batch that the set or the workers cannot make up."""
    train, parts = recipe.train, recipe.cluster.workers * recipe.train.accumulate
    if table.num_rows < train.batch:
        raise ValueError(
            f"{table.num_rows:,} training pairs do not fill one batch of train.batch={train.batch}: lower it, or use more data."
        )
    if train.batch < parts:
        raise ValueError(
            f"train.batch={train.batch} is smaller than cluster.workers={recipe.cluster.workers} × train.accumulate={train.accumulate}: "
            "each takes at least one pair."
        )
    defense = build_defense(recipe)
    kind = type(defense)
    if (kind.matcher, kind.selector) != (Defense.matcher, Defense.selector) and not defense.rounds(train.epochs):
        raise ValueError(
            f"train.epochs={train.epochs} end before {kind.__name__} matches or selects any pair: train longer, or shorten what comes "
            "before (such as defense.warmup, or defense.every)."
        )
    if (hardener := defense.hardener()) is not None:
        from orchestrate.hardening import hardening

        if not recipe.evaluate.probe:
            raise ValueError(f"{kind.__name__} hardens the probe, which evaluate.probe=false leaves out: leave it true.")
        if hardening(hardener, table, recipe.evaluate.probe_size, recipe.seed) is None:
            raise ValueError(
                f"{kind.__name__} hardens a probe of labelled images, and no class is known of {recipe.data.path}, or of too few images: "
                "give labels, or data.classes that the captions name; or more in evaluate.probe_size."
            )
    if (plan := defense.repair()) is not None:
        trusted = len(trusted_positions(table, plan.clean, recipe.seed))
        if trusted < plan.batch or plan.batch < recipe.cluster.workers:
            raise ValueError(
                f"the repair's batch of {plan.batch} must hold a pair for each of cluster.workers={recipe.cluster.workers}, and its "
                f"{trusted:,} trusted pairs must fill one: change defense.batch, or give more with defense.clean."
            )


# --- what evaluation needs -----------------------------------------------------------------------------------------------------


def probe_rows(clean: pa.Table, count: int, seed: int) -> pa.Table:
    """Labelled clean training rows for the linear probe, at most `count`, by hash."""
    labelled = clean.filter(pc.greater_equal(clean["label"], 0))
    ids = labelled.column("id").to_pylist()
    return labelled.take(pa.array(pick(ids, min(count, len(ids)), seed, PROBE_SALT)))


def trusted_rows(table: pa.Table, amount: int | float, seed: int) -> pa.Table:
    """Pairs of a poisoned table that the attack has not touched, by hash: a count, or a share of all such pairs."""
    return table.take(pa.array(trusted_positions(table, amount, seed)))


def trusted_positions(table: pa.Table, amount: int | float, seed: int) -> np.ndarray:
    """The same as positions in `table`, int64 (n,), ascending."""
    clean = np.flatnonzero(~table.column("poison").to_numpy(zero_copy_only=False))
    ids = table.column("id").take(pa.array(clean)).to_pylist()
    count = min(len(ids), how_many(amount, len(ids)))
    return np.sort(clean[pick(ids, count, seed, "trusted")])


def loader(recipe: Recipe, attack: Any, images: np.ndarray | None, where: dict[Any, int] | None, side: int = 0) -> Any:
    """Evaluation's `load`: index rows with image_id and stamp → uint8 pixels, by the very function that training reads with."""

    def load(rows: pa.Table) -> np.ndarray:
        place = place_of(rows, where) if where is not None else None
        return pixels_of(recipe, attack, rows, images, place, side).take(np.arange(rows.num_rows))

    return load


# --- images found unreadable while checking a set that streams -------------------------------------------------------------------


def known_unreadable(recipe: Recipe, dataset: Dataset) -> list[tuple[str, str]] | None:
    """(id, reason) from an earlier check of the same set, None if it was never checked."""
    file = _checked(recipe, dataset)
    return [tuple(x) for x in json.loads(file.read_text())] if file.is_file() else None


def without_known(recipe: Recipe, dataset: Dataset, known: Sequence[tuple[str, str]]) -> Dataset:
    """`without_unreadable` by an earlier check; its ValueError says where that is kept."""
    try:
        return without_unreadable(dataset, known, recipe.data.max_bad)
    except ValueError as error:
        raise ValueError(f"{error}\nSo an earlier check found them. If they are mended, delete {_checked(recipe, dataset)}.") from None


def remember_unreadable(recipe: Recipe, dataset: Dataset, bad: Sequence[tuple[str, str]]) -> None:
    file = _checked(recipe, dataset)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(list(bad)))
    part.replace(file)


def _checked(recipe: Recipe, dataset: Dataset) -> Path:
    name = f"checked-{fingerprint(dataset)}-{recipe.data.max_pixels}.json"
    return Path(recipe.data.cache).expanduser() / name
