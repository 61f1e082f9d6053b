"""An audit: which pairs of a set look poisoned. Index → model (given, or a young one) → scores → scores.parquet, clean set, page.

    OUT/  model/      the run that trained our own model        parts/  finished parts, which a killed audit goes on from
          scores.parquet   clean/ or clean-ids.txt   removed-ids.txt   audit.json   audit.html

Our own model learns from the very set that is doubted. It is an undefended CLIP that stops early, so that the many honest pairs are learnt
and of the few poisoned ones less (ours: a hope that docs/audit.md measures; a poison strong enough is learnt as early).
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
from defenses.detect import BATCH, K
from orchestrate import audit_scores, cluster, journal, prepared
from orchestrate.data.index import Dataset, fingerprint, open_dataset
from orchestrate.pairing import draw_pool
from orchestrate.progress import Phase
from orchestrate.recipe import DROP, Recipe, Track

PAIRS, MOST, LEAST = 100_000, 8, 2  # the young model sees about so many pairs, in so many epochs at most and at least
POOL, SHARE = 512, 0.02  # captions of the pool: RoCLIP's share of the pairs, or so many where that is more (ours)


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
    facts: dict[str, Any] = field(default_factory=dict)
    pool: list[str] = field(default_factory=list)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    sums: dict[str, np.ndarray] = field(default_factory=dict)
    scores: pa.Table = field(default_factory=lambda: pa.table({}))


def audit(recipe: Recipe, out: Path, options: Options) -> dict[str, Any]:
    """Score every pair of the recipe's data (poisoned by its attack, if it has one) and write `out`; returns audit.json's content.

    The same call goes on where a killed one stopped. ValueError for what the user can mend.
    """
    from orchestrate.train import read_images

    out = cluster.absolute(str(out))
    started = time.monotonic()
    recipe = replace(recipe, defense=None)
    with journal.held(out, "an audit in "):
        with cluster.connected(recipe.cluster) as resources:
            _check(recipe, resources)
            with Phase("data") as phase:
                dataset = open_dataset(recipe.data, lambda done, total: phase.at(done, total=total))
            model, cfg, told = _model(recipe, dataset, out, options)
            recipe = _as_seen(recipe, cfg)
            dataset, images = read_images(recipe, dataset, prepared.streams(recipe, dataset))
            found = _found(recipe, options, out, dataset, images)
            found.facts |= told
            _score(found, model, cfg)
        _table(found)
        found.facts["seconds"] = time.monotonic() - started
        return _write(found)


def _check(recipe: Recipe, has: dict[str, float]) -> None:
    c = recipe.cluster
    for kind, each in (("CPU", c.match_cpus), ("GPU", c.match_gpus)):
        if c.match_actors * each > has.get(kind, 0.0) + 1e-6:
            raise ValueError(
                f"{c.match_actors} scoring actors × {each:g} {kind}, but there are {has.get(kind, 0.0):g} {kind}: lower "
                f"cluster.match_actors or cluster.match_{kind.lower()}s."
            )


# --- the model --------------------------------------------------------------------------------------------------------------------


def _model(recipe: Recipe, dataset: Dataset, out: Path, options: Options) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """(model, its configuration, what to say of it)."""
    from models import export

    if options.checkpoint:
        model, cfg = export.load(options.checkpoint, options.model)
        return model, cfg, {"model": "given", "epochs": 0}
    from orchestrate.train import fit

    own = own_recipe(recipe, dataset, out, options.epochs)
    result = fit(own)
    model, cfg = export.load(Path(result["run"]) / "model")
    told = {"model": own.model.name, "epochs": own.train.epochs, "seconds/model": result["seconds/train"]}
    return model, cfg, told | {k: v for k, v in result.items() if k.startswith(("zeroshot/top1", "retrieval/r1", "asr/"))}


def own_recipe(recipe: Recipe, dataset: Dataset, out: Path, epochs: int) -> Recipe:
    """A young, undefended CLIP on the recipe's data, poison and all."""
    pairs = dataset.train.num_rows
    train = replace(recipe.train, epochs=epochs or max(LEAST, min(MOST, -(-PAIRS // pairs))))
    evaluation = replace(recipe.evaluate, probe=False, every=0)
    where = replace(recipe.cluster, runs=str(out / "model"))
    return replace(recipe, name="young", train=train, evaluate=evaluation, cluster=where, track=Track(uri="none", report=False))


def _as_seen(recipe: Recipe, cfg: dict[str, Any]) -> Recipe:
    """The recipe with pixels kept as large as the model takes them; a given checkpoint may not be the recipe's."""
    size = cfg["vision_cfg"]["image_size"]
    side = recipe.data.side or (size if isinstance(size, int) else size[0])
    return replace(recipe, data=replace(recipe.data, side=side))


def _has_tokens(model: Any, cfg: dict[str, Any]) -> str:
    """Why the model has no token features, "" where it has."""
    from orchestrate.encoder import Encoder

    encoder = Encoder(model, cfg)
    try:
        encoder.image_features(np.zeros((1, 32, 32, 3), np.uint8), True)
        encoder.text_features(["a"], True)
    except ValueError as error:
        return str(error)
    return ""


# --- scores -----------------------------------------------------------------------------------------------------------------------


def _found(recipe: Recipe, options: Options, out: Path, dataset: Dataset, images: Any) -> Audit:
    """The pairs to score: the recipe's training set; where nothing is planted, held-out pairs cut from the same files too."""
    ready = prepared.plan(recipe, dataset)
    table, parts = ready.table, [""] * ready.table.num_rows
    if ready.manifest:
        names = sorted((part["name"] for part in ready.manifest.header["parts"]), key=len, reverse=True)
        rows = zip(table["id"].to_pylist(), table["stamp"].to_pylist(), table["poison"].to_pylist(), strict=True)
        parts = [(s or next(n for n in names if i.startswith(f"poison-{n}-"))) if bad else "" for i, s, bad in rows]
    elif dataset.carved:
        table = pa.concat_tables([table, prepared.unpoisoned(dataset.heldout, recipe.seed)])
        parts = [""] * table.num_rows
    if table.num_rows <= 2 * K:
        raise ValueError(f"{table.num_rows} pairs are too few to audit: above {2 * K} are needed.")
    held = None if images is None else (images[0], prepared.place_of(table, images[1]))
    facts = {"data": dataset.name, "fingerprint": fingerprint(dataset), "pairs": table.num_rows, "seed": recipe.seed}
    facts |= {"attack": recipe.attack.use if recipe.attack else "none", "poison": sum(map(bool, parts)), "report": dataset.report}
    return Audit(recipe, options, out, dataset, table, parts, held, facts)


def _score(found: Audit, model: Any, cfg: dict[str, Any]) -> None:
    """Every pair through the actors, or from the parts that are there."""
    from orchestrate import audit_actors

    recipe, table = found.recipe, found.table
    count = table.num_rows
    found.pool = draw_pool(table, max(min(POOL, count), round(SHARE * count)), recipe.seed, 0).captions
    weights = {name: value.detach().cpu().numpy() for name, value in model.state_dict().items()}
    why_not = _has_tokens(model, cfg)
    found.facts["transport"] = why_not or "used"
    size = found.options.batch
    if found.images is None:  # neighbouring rows together, so that a file is read in stretches
        order = prepared.order(count, recipe.seed, 0, (audit_actors.TOGETHER * size, size))
    else:
        order = np.argsort(ranks(table["id"].to_pylist(), recipe.seed, "audit"), kind="stable")
    work = audit_actors.Work(recipe, table, found.images, order, weights, cfg, found.pool, not why_not)
    items = audit_actors.parts(count, size)
    folder = found.out / "parts"
    _claim(folder, _plan(found, weights))
    began = time.monotonic()
    fresh = 0
    with Phase("score", count, "pair") as phase:
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
    named = {"pairs": found.table.num_rows, "ids": ids, "weights": digest.hexdigest(), "batch": found.options.batch}
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
        scores: dict[str, Any] = {name: columns[name] for name in ("kdist", "slof", "dao", "clip", "transport") if name in columns}
        scores |= {"conflict": duplicates.conflict(columns["group"], captions), "repeats": duplicates.repeats(captions)}
        if found.options.rounds:
            scores["moved"] = audit_scores.moved(Path(found.options.rounds), table["id"], captions)
        header = {name: found.facts[name] for name in ("data", "fingerprint", "attack", "seed", "pairs", "epochs", "model")}
        found.scores = audit_scores.table(table["id"], scores, header)
        part = found.out / "scores.parquet.part"
        pq.write_table(found.scores, part, compression="zstd")
        part.replace(found.out / "scores.parquet")
    poison = np.array([bool(name) for name in found.parts])
    if poison.any():
        found.facts["measured"] = audit_scores.measured(found.scores, poison, np.array(found.parts))


def _write(found: Audit) -> dict[str, Any]:
    """The rest of the folder."""
    many = audit_scores.budget(found.options.drop, found.table.num_rows)
    gone = found.scores["rank"].to_numpy() <= many
    found.facts |= {"removed": many, "poison_removed": sum(bool(name) for name, out in zip(found.parts, gone, strict=True) if out)}
    journal.replace(found.out / "audit.json", (json.dumps(found.facts, indent=1, ensure_ascii=False) + "\n").encode())
    return found.facts
