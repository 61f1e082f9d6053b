"""Score a checkpoint that exists: ours or anybody's. No Ray."""

from __future__ import annotations

from typing import Any

from orchestrate import prepared
from orchestrate.progress import Phase
from orchestrate.recipe import Recipe


def score(checkpoint: str, model: str | None, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """(flat metrics, CLIP_benchmark's record) of a checkpoint on `recipe.data`, with the recipe's attack as probes where it has one."""
    from models import export
    from orchestrate.evaluate import benchmark_json

    built, cfg = export.load(checkpoint, model)
    dataset = prepared.readable(recipe)
    metrics = figures(built, cfg, recipe, prepared.plan(recipe, dataset))
    return metrics, benchmark_json(metrics, dataset.name, cfg.get("name", model or checkpoint), checkpoint)


def figures(model: Any, cfg: dict[str, Any], recipe: Recipe, ready: prepared.Prepared, what: str = "eval") -> dict[str, Any]:
    """Everything `evaluate` measures of a model on a prepared set, read from its files; `what` names the phase."""
    from models import clip
    from orchestrate.evaluate import evaluate
    from orchestrate.hardening import hardening

    dataset, e, hardener = ready.dataset, recipe.evaluate, prepared.build_defense(recipe).hardener()
    load = prepared.loader(recipe, prepared.build_attack(recipe, ready.table), None, None, recipe.data.side or clip.side(cfg))
    with Phase(what, unit="image") as phase:
        return evaluate(
            model,
            cfg,
            heldout=dataset.heldout,
            classes=dataset.classes,
            templates=dataset.templates,
            probes=ready.probes,
            load=load,
            probe_train=prepared.probe_rows(dataset.train, e.probe_size, recipe.seed) if e.probe else None,
            train=dataset.train,
            batch=e.batch,
            precision=e.precision,
            seed=recipe.seed,
            progress=lambda stage, done, total: phase.at(done, stage, total),
            hardening=hardening(hardener, ready.table, e.probe_size, recipe.seed) if e.probe else None,
        )
