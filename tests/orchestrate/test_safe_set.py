"""On scenes, with the real parts in one process: what SafeCLIP trusts first holds far less poison than chance would give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from attacks.base import how_many
from orchestrate import batches, prepared, recipes
from orchestrate.data import reader
from orchestrate.data.index import open_dataset
from orchestrate.encoder import Encoder
from orchestrate.pairing import selection_facts
from orchestrate.step import Learner

pytestmark = pytest.mark.ray  # starts none, but takes as long as what does


def test_the_first_safe_set_holds_less_than_half_of_the_poison_of_a_random_one(tmp_path: Path) -> None:
    """4.5 % of the pairs are poisoned; of the 380 safe ones 6 were (1.6 %) when this was written. A random set would hold 17."""
    torch.set_num_threads(1)
    words = {"data.size": 3000, "data.heldout": 140, "data.cache": str(tmp_path), "train.batch": 64, "attack.blended.count": 60}
    words |= {"defense.bridge": 1, "defense.posterior": 0.9, "defense.least": 0.0}
    [found] = recipes.get("safeclip", words)
    recipe = found.recipe
    dataset = open_dataset(recipe.data, None)
    table, defense = prepared.plan(recipe, dataset).table, prepared.build_defense(recipe)
    rows = pa.concat_tables([dataset.train, dataset.heldout])
    images, errors = reader.load(rows, prepared.stored_side(recipe), recipe.data.max_pixels)
    assert not errors
    place = prepared.place_of(table, prepared.places(rows))
    pixels = prepared.pixels_of(recipe, prepared.build_attack(recipe), table, images, place)
    captions, keys = np.array(table["caption"].to_pylist(), dtype=object), batches.sample_keys(table, recipe.seed)
    steps = len(captions) // recipe.train.batch
    queue = how_many(defense.queue_size, len(captions))
    learner = Learner(recipe.model, recipe.train, defense, seed=0, total_steps=steps * recipe.train.epochs, queue=queue)
    epoch = 1
    while (selector := defense.selector(epoch)) is None:
        fresh = batches.epoch_keys(keys, epoch)
        for rows in batches.drawn(np.arange(len(captions)), recipe.train.batch, recipe.seed, epoch):
            learner.step(batches.examples(rows, pixels.take(rows), captions, fresh, {}), epoch=epoch)
        epoch += 1
    encoder, cosine = Encoder(learner.model, learner.cfg), []
    for low in range(0, len(captions), 256):
        some = np.arange(low, min(low + 256, len(captions)))
        cosine.append((encoder.images(pixels.take(some)) * encoder.texts(list(captions[some]))).sum(1).numpy())
    told = selection_facts(table, np.concatenate(cosine), selector.split(np.concatenate(cosine), None))
    assert told["poisoned"] > 60 and told["share"] > 0.05
    assert told["poison_in_safe"] < 0.5 * told["poisoned"] / told["pairs"], told
