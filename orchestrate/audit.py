"""An audit: which pairs of a set look poisoned. Index → model (given, or a young one) → scores → scores.parquet, clean set, page.

OUT/  model/      the run that trained our own model        parts/  finished parts, which a killed audit goes on from
      scores.parquet   clean/ or kept.parquet (ids)   quarantine.parquet   audit.json   audit.html

"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from attacks.base import ranks
from defenses import duplicates
from defenses.detect import BATCH, FAMILIES, SCORES, K, combine
from orchestrate import audit_cause, audit_clean, audit_model, audit_page, audit_scores, batches, cluster, journal, prepared
from orchestrate.audit_cause import Trigger, Word
from orchestrate.data.index import Dataset, fingerprint
from orchestrate.pairing import draw_pool
from orchestrate.progress import Phase
from orchestrate.reading import planned, read_images
from orchestrate.recipe import AUDIT, DROP, Recipe

AUDITED = "audit.json"  # written last: who has it is done
LOOK = 20, 400  # suspicious pairs, at least and at most, in which something in common is looked for
# Captions of the pool: RoCLIP's share of the pairs, at least and at most so many (ours). Pool times pairs is what an audit costs, and the
# pool's features are every actor's memory: with a share alone neither would have a bound.
POOL, MOST, SHARE = 512, 4096, 0.02


@dataclass(frozen=True)
class Options:
    """What an audit is asked beside a recipe."""

    checkpoint: str = ""  # an export folder or a state dict; "" trains a model of its own
    model: str | None = None  # architecture of a bare state dict
    epochs: int = 0  # of the own model; 0 = by the number of pairs
    batch: int = BATCH  # pairs that are each other's neighbours
    drop: int | float = DROP  # budget of the clean set
    rounds: str = ""  # a run's directory, whose matching rounds say which captions moved
    copy_gb: float = 2.0  # largest set of which a clean copy is written

    def __post_init__(self) -> None:
        if self.batch <= 2 * K or self.epochs < 0 or self.copy_gb < 0:
            raise ValueError(
                f"--batch {self.batch}, --epochs {self.epochs}, --copy-gb {self.copy_gb}: give above {2 * K}, 0 or more, 0 or more."
            )
        if self.epochs and self.checkpoint:
            raise ValueError("--epochs is for the model that an audit trains itself: leave it out, or --checkpoint.")


@dataclass
class Audit:
    """An audit on its way: what the steps below read and fill in."""

    recipe: Recipe
    options: Options
    out: Path
    dataset: Dataset
    table: pa.Table  # the pairs, with the columns of a poisoned table
    parts: list[str]  # name of the attack's part for each pair, "" for clean ones
    images: tuple[Any, np.ndarray] | None  # decoded, and where each pair's lie; None: they stream
    unseen: np.ndarray  # (N,) 1 for held-out pairs, which our own model has not learnt: they compare with each other only
    facts: dict[str, Any] = field(default_factory=dict)
    pool: list[str] = field(default_factory=list)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    sums: dict[str, np.ndarray] = field(default_factory=dict)
    scores: pa.Table = field(default_factory=lambda: pa.table({}))


def audit(recipe: Recipe, out: Path, options: Options) -> dict[str, Any]:
    """Score every pair of the recipe's data (poisoned by its attack, if it has one) and write `out`; returns audit.json's content.

    The same call goes on where a killed one stopped. ValueError for what the user can mend.
    """
    out = cluster.absolute(str(out))
    started = time.monotonic()
    own = recipe.data.exclude == AUDIT  # what this very audit is to find
    recipe = replace(recipe, defense=None, data=replace(recipe.data, exclude="", drop=DROP) if own else recipe.data)
    if options.rounds:
        audit_scores.round_files(Path(options.rounds))  # what is missing is told before the work, not after it
    with journal.held(out, "an audit in "):
        with cluster.connected(recipe.cluster) as resources:
            _check(recipe, resources)
            dataset = prepared.opened(recipe.data)
            model, cfg, told = audit_model.get(recipe, dataset, out, options.checkpoint, options.model, options.epochs)
            recipe = audit_model.as_seen(recipe, cfg)
            dataset, images = read_images(recipe, dataset, prepared.streams(recipe, dataset))
            found = _found(recipe, options, out, dataset, images)
            found.facts |= told
            _score(found, model, cfg)
            _table(found)
            seen = _seen(found)
        found.facts["seconds"] = time.monotonic() - started
        return _write(found, seen)


def beforehand(recipe: Recipe, out: Path) -> Path:
    """scores.parquet of the audit that a run with data.exclude=audit makes of its own pairs, once, in `out`."""
    if not (out / AUDITED).exists():
        audit(recipe, out, Options(drop=recipe.data.drop, copy_gb=0))
    return out / "scores.parquet"


def _check(recipe: Recipe, has: dict[str, float]) -> None:
    c = recipe.cluster
    for kind, each in (("CPU", c.match_cpus), ("GPU", c.match_gpus)):
        if c.match_actors * each > has.get(kind, 0.0) + 1e-6:
            raise ValueError(
                f"{c.match_actors} scoring actors × {each:g} {kind}, but there are {has.get(kind, 0.0):g} {kind}: lower "
                f"cluster.match_actors or cluster.match_{kind.lower()}s."
            )


# --- scores -----------------------------------------------------------------------------------------------------------------------


def _found(recipe: Recipe, options: Options, out: Path, dataset: Dataset, images: Any) -> Audit:
    """The pairs to score: the recipe's training set; where nothing is planted, held-out pairs cut from the same files too."""
    ready = planned(recipe, dataset, images)
    table, parts = ready.table, [""] * ready.table.num_rows
    if ready.manifest:
        names = [part["name"] for part in ready.manifest.header["parts"]]
        swapped = names[0] if len(names) == 1 else "swapped"
        rows = zip(table["id"].to_pylist(), table["stamp"].to_pylist(), table["poison"].to_pylist(), strict=True)
        parts = [ready.manifest.part_of(name, stamp, swapped) if bad else "" for name, stamp, bad in rows]
    elif dataset.carved:
        table = pa.concat_tables([table, prepared.unpoisoned(dataset.heldout, recipe.seed)])
        parts = [""] * table.num_rows
    learnt = table.num_rows if options.checkpoint else ready.table.num_rows
    if table.num_rows <= 2 * K:
        raise ValueError(f"{table.num_rows} pairs are too few to audit: above {2 * K} are needed.")
    audit_scores.budget(options.drop, table.num_rows)
    held = None if images is None else (images[0], prepared.place_of(table, images[1]))
    facts = {"data": dataset.name, "fingerprint": fingerprint(dataset), "pairs": table.num_rows, "seed": recipe.seed}
    facts |= {"attack": recipe.attack.use if recipe.attack else "none", "poison": sum(map(bool, parts)), "report": dataset.report}
    return Audit(recipe, options, out, dataset, table, parts, held, (np.arange(table.num_rows) >= learnt).astype(int), facts)


def _score(found: Audit, model: Any, cfg: dict[str, Any]) -> None:
    """Every pair through the actors, or from the parts that are there."""
    from orchestrate import audit_actors

    recipe, table = found.recipe, found.table
    count = table.num_rows
    found.pool = draw_pool(table, min(count, MOST, max(POOL, round(SHARE * count))), recipe.seed, 0).captions
    weights = {name: value.detach().cpu().numpy() for name, value in model.state_dict().items()}
    why_not = audit_model.no_tokens(model, cfg)
    found.facts["transport"] = why_not or "used"
    size = found.options.batch
    if found.images is None:  # neighbouring rows together, so that a file is read in stretches
        order = batches.order(count, recipe.seed, 0, (audit_actors.TOGETHER * size, size))
    else:
        order = np.argsort(ranks(table["id"].to_pylist(), recipe.seed, "audit"), kind="stable")
    work = audit_actors.Work(recipe, table, found.images, order, weights, cfg, found.pool, not why_not)
    items = audit_actors.parts(count, size)
    folder = found.out / "parts"
    _claim(folder, _plan(found, weights))
    began = time.monotonic()
    fresh = 0
    with cluster.native_stderr(found.out / "ray.log"), Phase("score", count, "pair") as phase:
        for number, done in enumerate(audit_actors.run(work, folder, items)):
            fresh = fresh if number else done
            rate = (done - fresh) / max(1e-6, time.monotonic() - began)
            phase.at(done, f"{rate:,.0f} pairs/s" if number else "")
    found.facts |= {
        "seconds/score": time.monotonic() - began,
        "actors": recipe.cluster.match_actors,
        "resumed": fresh,
        "pool": len(found.pool),
    }
    found.columns, found.sums = audit_actors.read(folder, items, count)


def _plan(found: Audit, weights: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the parts depend on."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(weights):
        digest.update(name.encode() + np.ascontiguousarray(weights[name]).tobytes())
    ids = hashlib.blake2b("\n".join(found.table["id"].to_pylist()).encode(), digest_size=8).hexdigest()
    named = {
        "pairs": found.table.num_rows,
        "ids": ids,
        "weights": digest.hexdigest(),
        "batch": found.options.batch,
        "scores": [*FAMILIES["outlier"], *FAMILIES["pair"]],
        "stream": found.images is None,
    }
    return named | {"data": found.facts["fingerprint"], "attack": found.recipe.as_dict()["attack"], "seed": found.recipe.seed}


def _claim(folder: Path, plan: dict[str, Any]) -> None:
    """ValueError where the folder holds parts of another audit."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "plan.json"
    if file.exists() and json.loads(file.read_text()) != json.loads(json.dumps(plan)):
        raise ValueError(f"{folder.parent} holds an audit of other data, another model or another seed: give another --out, or remove it.")
    journal.replace(file, json.dumps(plan, indent=1).encode())


def _table(found: Audit) -> None:
    """scores.parquet, and what it is worth where the poison is known."""
    table, columns = found.table, found.columns
    captions = table["caption"].to_pylist()
    with Phase("rank"):
        found.columns["group"] = duplicates.groups(columns.pop("signs"), columns.pop("thumbs"))
        scores: dict[str, Any] = {name: columns[name] for name in SCORES if name in columns}
        scores |= {"conflict": duplicates.conflict(columns["group"], captions), "repeats": duplicates.repeats(captions)}
        misfit = combine(scores, {"pair": FAMILIES["pair"]}, found.unseen)
        scores["words"] = audit_cause.shared(captions, np.sum(list(misfit.values()), axis=0))
        if found.options.rounds:
            scores["moved"] = audit_scores.moved(Path(found.options.rounds), table["id"], captions)
        header = {name: found.facts[name] for name in ("data", "fingerprint", "attack", "seed", "pairs", "epochs", "model")}
        found.scores = audit_scores.table(table["id"], scores, header, found.unseen)
        part = found.out / "scores.parquet.part"
        pq.write_table(found.scores, part, compression="zstd")
        part.replace(found.out / "scores.parquet")
    poison = np.array([bool(name) for name in found.parts])
    if poison.any():
        found.facts["measured"] = audit_scores.measured(found.scores, poison, np.array(found.parts))


@dataclass(frozen=True)
class Seen:
    """Pixels of the most suspicious pairs: those of the page, and of those with something in common different images."""

    rows: np.ndarray
    images: np.ndarray
    words: list[Word]
    trigger: Trigger | None


def _seen(found: Audit) -> Seen:
    """Look at the most suspicious pairs: what the clean set leaves out, but some at least and not too many."""
    from orchestrate.audit_actors import local_pixels

    pixels = local_pixels(found.recipe, found.table, found.images)
    order = np.argsort(found.scores["rank"].to_numpy())
    budget = audit_scores.budget(found.options.drop, len(order))
    top = order[: min(len(order), max(LOOK[0], min(LOOK[1], budget)))]
    captions = found.table["caption"].to_pylist()
    words = audit_cause.words(captions, top)
    named = [i for i in top if words and words[0].text in audit_cause.words_of(captions[i])]
    trigger = None
    for rows in (np.array(named, int), top):
        different = rows[np.sort(np.unique(found.columns["group"][rows], return_index=True)[1])]  # of near-duplicates one
        if len(different) >= audit_cause.FEW:
            trigger = audit_cause.trigger(pixels.take(different), found.sums["mean"], found.sums["square"])
            break
    return Seen(order[: audit_page.SHOWN], pixels.take(order[: audit_page.SHOWN]), words, trigger)


def _write(found: Audit, seen: Seen) -> dict[str, Any]:
    """The rest of the folder."""
    scores, facts = found.scores, found.facts
    many = audit_scores.budget(found.options.drop, found.table.num_rows)
    kept = scores["rank"].to_numpy() > many
    facts |= {"removed": many, "poison_removed": sum(bool(name) for name, stays in zip(found.parts, kept, strict=True) if not stays)}
    facts |= audit_clean.write(found.out, found.table, kept, found.dataset.heldout, found.options.copy_gb, found.recipe.attack is not None)
    facts["quarantined"] = found.dataset.quarantine.num_rows
    pq.write_table(found.dataset.quarantine, found.out / "quarantine.parquet")
    facts |= {"words": [[word.text, word.here, word.of] for word in seen.words], "region": seen.trigger.box if seen.trigger else None}
    nearest = found.columns["nearest"]
    shown = audit_page.Shown(seen.rows, seen.images)
    page = found.out / "audit.html"
    audit_page.write(page, facts, scores, found.table, found.parts, nearest, found.pool, shown, seen.words, seen.trigger)
    journal.replace(found.out / AUDITED, (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode())
    return facts
