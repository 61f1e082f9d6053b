"""The model an audit scores with: a checkpoint, or a young CLIP of its own, learnt from the very set that is doubted.

The young model is undefended and stops early, so that the many honest pairs are learnt and of the few poisoned ones less (ours: a hope that
docs/audit.md measures; a poison strong enough is learnt as early).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from orchestrate.data.index import Dataset
from orchestrate.recipe import Recipe, Track

PAIRS, MOST, LEAST = 100_000, 8, 2  # the young model sees about so many pairs, in so many epochs at most and at least


def get(
    recipe: Recipe, dataset: Dataset, out: Path, checkpoint: str, name: str | None, epochs: int
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """(model, its configuration, what to say of it): the checkpoint's (`name` as in `export.load`), or a young one in out/model."""
    from models import export

    if checkpoint:
        model, cfg = export.load(checkpoint, name)
        return model, cfg, {"model": "given", "epochs": 0}
    from orchestrate.train import fit

    own = young(recipe, dataset, out, epochs)
    result = fit(own)
    model, cfg = export.load(Path(result["run"]) / "model")
    told = {"model": own.model.name, "epochs": own.train.epochs, "seconds/model": result["seconds/train"]}
    return model, cfg, told | {k: v for k, v in result.items() if k.startswith(("zeroshot/top1", "retrieval/r1", "asr/"))}


def young(recipe: Recipe, dataset: Dataset, out: Path, epochs: int) -> Recipe:
    """A young, undefended CLIP on the recipe's data, poison and all."""
    pairs = dataset.train.num_rows
    train = replace(recipe.train, epochs=epochs or max(LEAST, min(MOST, -(-PAIRS // pairs))))
    evaluation = replace(recipe.evaluate, probe=False, every=0)
    where = replace(recipe.cluster, runs=str(out / "model"))
    return replace(recipe, name="young", train=train, evaluate=evaluation, cluster=where, track=Track(uri="none", report=False))


def as_seen(recipe: Recipe, cfg: dict[str, Any]) -> Recipe:
    """The recipe with pixels kept as large as the model takes them; a given checkpoint may not be the recipe's."""
    from models import clip

    return replace(recipe, data=replace(recipe.data, side=recipe.data.side or clip.side(cfg)))


def no_tokens(model: Any, cfg: dict[str, Any]) -> str:
    """Why the model has no token features, "" where it has."""
    from orchestrate.encoder import Encoder

    encoder = Encoder(model, cfg)
    try:
        encoder.image_features(np.zeros((1, 32, 32, 3), np.uint8), True)
        encoder.text_features(["a"], True)
    except ValueError as error:
        return str(error)
    return ""
