"""Repair a trained checkpoint, ours or any open_clip one, on trusted pairs (`Defense.repair`), in one process. No Ray."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from defenses.base import Repair
from orchestrate import batches, prepared, rundir, scoring
from orchestrate.progress import Phase
from orchestrate.recipe import Data, Recipe, Train, from_dict

SHOWN = ("zeroshot/", "probe/top1", "retrieval/r", "asr/")


def checkpoint_of(path: str) -> tuple[str, str]:
    """A run directory → (its model, its recipe.json); anything else is a checkpoint without a recipe."""
    folder = Path(path)
    if (folder / "recipe.json").is_file() and (folder / "model").is_dir():
        return str(folder / "model"), str(folder / "recipe.json")
    return path, ""


def recipe_of(tree: Mapping[str, Any], overrides: Mapping[str, Any]) -> Recipe:
    """The recipe whose data and attack are measured (a recipe.json's tree), with a defence that repairs; the tree's own is left out."""
    kept = {"name": "repair", **{key: value for key, value in tree.items() if key != "defense"}}
    recipe = from_dict(kept, {"defense": "cleanclip", **overrides}).recipe
    if prepared.build_defense(recipe).repair() is None:
        assert recipe.defense is not None
        raise ValueError(f"defense={recipe.defense.use} does not repair a trained model: take defense=cleanclip, or one of your own.")
    return recipe


def trusted_data(clean: str, words: Mapping[str, Any]) -> Data | None:
    """The `data` section of the trusted set, None without one: by the words alone, as the recipe's own (its size, its split, what it
    leaves out) is of the set that is measured on. ValueError for a word that says the same twice."""
    if not clean:
        return None
    if "defense.clean" in words:
        raise ValueError("--clean gives the trusted pairs, and defense.clean takes them from the recipe's own: give one of the two.")
    kept = {key: value for key, value in words.items() if key.startswith("data.") and key != "data.path"}
    return from_dict({"name": "repair"}, {**kept, "data": clean}).recipe.data


def repair(checkpoint: str, model: str | None, recipe: Recipe, clean: Data | None, out: Path) -> dict[str, Any]:
    """Fine-tune and write `out` (an open_clip folder with its card) and out/result.json, which is returned.

    clean: a data set of trusted pairs (`trusted_data`); None: `defense.clean` of the recipe's own pairs, those that its attack leaves
    alone. Figures before and after are of the recipe's data, with the recipe's attack where it has one; without a recipe's data, of the
    trusted set's. OSError where `out` is no folder that can be written to, before the fine-tuning.
    """
    from models import clip, export

    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
        pass  # a folder may be there and take nothing
    (built, cfg), plan = export.load(checkpoint, model), prepared.build_defense(recipe).repair()
    assert plan is not None
    ready, trusted = _data(recipe, clean, plan)
    before = scoring.figures(built, cfg, recipe, ready, "eval before")
    losses = fine_tune(built, cfg, plan, recipe, trusted, recipe.data.side or clip.side(cfg))
    after = scoring.figures(built, cfg, recipe, ready, "eval after")
    assert recipe.defense is not None
    result: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "defense": recipe.defense.use,
        "trusted": clean.path if clean else f"{trusted.num_rows:,} pairs of {recipe.data.path} that the attack leaves alone",
        "pairs": trusted.num_rows,
        "data": recipe.data.path if not clean or recipe.attack else clean.path,
        "attack": recipe.attack.use if recipe.attack else "none",
        "seed": recipe.seed,
        "losses": losses,
        "before": before,
        "after": after,
        "recipe": recipe.as_dict(),
    }
    facts = {
        "attack": result["attack"],
        "count": ready.manifest.count if ready.manifest else 0,
        "rate": ready.manifest.rate if ready.manifest else 0.0,
        "repaired by": recipe.defense.use,
        **{key: result[key] for key in ("trusted", "pairs", "data")},
        "before": {k: v for k, v in before.items() if k.startswith(SHOWN)},
        "after": {k: v for k, v in after.items() if k.startswith(SHOWN)},
    }
    export.save(built, cfg, out, export.card(facts))
    rundir.write_json(out / rundir.RESULT, result)
    return result


def _data(recipe: Recipe, clean: Data | None, plan: Repair) -> tuple[prepared.Prepared, Any]:
    """What is measured on, its plan of poison, and the trusted pairs' table (as `attacks.apply` makes it)."""
    config = recipe.data if not clean or recipe.attack else clean
    ready = prepared.plan(recipe, prepared.readable(dataclasses.replace(recipe, data=config)))
    if not clean:
        return ready, prepared.trusted_rows(ready.table, plan.clean, recipe.seed)
    if not recipe.attack:  # the trusted set is what is measured on
        return ready, ready.table
    every = dataclasses.replace(clean, heldout=0)  # nobody is measured on its held-out pairs
    alone = dataclasses.replace(recipe, attack=None, data=every)
    return ready, prepared.plan(alone, prepared.readable(alone)).table


def fine_tune(model: Any, cfg: Mapping[str, Any], plan: Repair, recipe: Recipe, trusted: Any, side: int) -> list[float]:
    """Train `model` in place on the trusted pairs, as `plan` says; the mean loss of each epoch. The model is back on the CPU at the end."""
    import torch

    from orchestrate.step import Examples, Learner

    steps = trusted.num_rows // plan.batch
    if not steps:
        raise ValueError(f"{trusted.num_rows} trusted pairs do not fill one batch of defense.batch={plan.batch}: lower it, or give more.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    learner = Learner(
        recipe.model,
        stage(recipe.train, plan),
        plan.method,
        seed=recipe.seed,
        total_steps=steps * plan.epochs,
        device=device,
        start=(model, cfg),
    )
    pixels = prepared.pixels_of(recipe, None, trusted, None, None, side)
    captions = np.array(trusted.column("caption").to_pylist(), dtype=object)
    keys, losses = batches.sample_keys(trusted, recipe.seed), []
    with Phase(f"repair on {trusted.num_rows:,} pairs", steps * plan.epochs, "step") as phase, ThreadPoolExecutor(1) as reader:
        for epoch in range(1, plan.epochs + 1):
            order = batches.drawn(np.arange(trusted.num_rows), plan.batch, recipe.seed, epoch)
            fresh, total = batches.epoch_keys(keys, epoch), 0.0
            waiting = reader.submit(pixels.take, order[0])
            for i, rows in enumerate(order):
                shown = waiting.result()
                if i + 1 < steps:
                    waiting = reader.submit(pixels.take, order[i + 1])
                total += float(learner.step(Examples(shown, list(captions[rows]), fresh[rows]), epoch=epoch))
                phase.at(learner.steps, f"epoch {epoch}/{plan.epochs}, loss {total / (1 + (learner.steps - 1) % steps):.3f}")
            losses.append(total / steps)
            if not np.isfinite(total):
                raise ValueError(f"the loss of epoch {epoch} is {total / steps}: lower defense.lr (now {plan.lr:g}).")
    model.to("cpu")
    return losses


def stage(train: Train, plan: Repair) -> Train:
    """The training section of the repair stage."""
    of_batch = dataclasses.replace(train, epochs=plan.epochs, batch=plan.batch, accumulate=1)
    return dataclasses.replace(of_batch, lr=plan.lr, warmup=plan.warmup, weight_decay=plan.weight_decay)


def lines(result: Mapping[str, Any]) -> list[str]:
    """Before and after, a line a figure."""
    told = [f"{'':<28} {'before':>8} {'after':>8}"]
    for key, value in result["before"].items():
        if isinstance(value, float) and key in result["after"]:
            told.append(f"{key:<28} {value:>8.4f} {result['after'][key]:>8.4f}")
    return told
