"""Score a checkpoint that exists: ours or anybody's. No Ray."""

from __future__ import annotations

from typing import Any

from orchestrate import prepared
from orchestrate.data.index import open_dataset
from orchestrate.progress import Phase
from orchestrate.recipe import Recipe


def score(checkpoint: str, model: str | None, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """(flat metrics, CLIP_benchmark's record) of a checkpoint on `recipe.data`, with the recipe's attack as probes where it has one."""
    from models import export
    from orchestrate.evaluate import benchmark_json, evaluate
    from orchestrate.hardening import hardening

    built, cfg = export.load(checkpoint, model)
    with Phase("data") as phase:
        dataset = open_dataset(recipe.data, lambda done, total: phase.at(done, total=total))
    ready = prepared.plan(recipe, dataset)
    side = cfg["vision_cfg"]["image_size"]
    side = recipe.data.side or (side if isinstance(side, int) else side[0])
    e = recipe.evaluate
    with Phase("eval", unit="image") as phase:
        metrics = evaluate(
            built,
            cfg,
            heldout=dataset.heldout,
            classes=dataset.classes,
            templates=dataset.templates,
            probes=ready.probes,
            load=prepared.loader(recipe, prepared.build_attack(recipe, ready.table), None, None, side),
            probe_train=prepared.probe_rows(dataset.train, e.probe_size, recipe.seed) if e.probe else None,
            train=dataset.train,
            batch=e.batch,
            precision=e.precision,
            seed=recipe.seed,
            progress=lambda stage, done, total: phase.at(done, stage, total),
            hardening=hardening(prepared.build_defense(recipe).hardener(), ready.table, e.probe_size, recipe.seed) if e.probe else None,
        )
    return metrics, benchmark_json(metrics, dataset.name, cfg.get("name", model or checkpoint), checkpoint)
