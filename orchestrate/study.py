"""What an attacker finds out on a copy of the clean set (`attacks.base.Study`): pixels, masks, and a surrogate CLIP trained in place.

The surrogate depends on (set, pairs, epochs, seed) alone and is kept in the data cache, so planning again gives the same plan.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional as F

from attacks.base import pick
from attacks.combine import part_seed
from defenses.base import Defense
from defenses.transport import transport_cost
from models import clip, encode
from orchestrate import batches, masks, prepared
from orchestrate.data.index import SCENE_SIDE, Dataset, fingerprint
from orchestrate.encoder import Encoder
from orchestrate.progress import Phase
from orchestrate.recipe import Model, Recipe, Train
from orchestrate.step import Examples, Learner

ARCHITECTURE, BATCH = "tiny-rn", 128
READ = 512  # images read at once
VERSION = 2  # raise with any change to how surrogates are trained
EPSILON, TOL = 0.1, 1e-4  # of `transport`: OTCCLIP's own


@dataclass
class SetStudy:
    """A study of `dataset` as `recipe` stores it. load(rows with image_id and stamp) → uint8 (n, S, S, 3)."""

    recipe: Recipe
    dataset: Dataset
    load: Callable[[pa.Table], np.ndarray]
    encoder: Encoder | None = None
    told: list[Any] = field(default_factory=list)  # which surrogate `encoder` is
    features: dict[Any, Any] = field(default_factory=dict)  # split → (row of each id, features); captions → features

    @cached_property
    def rows(self) -> dict[str, dict[str, int]]:
        return {split: {i: n for n, i in enumerate(self._table(split)["id"].to_pylist())} for split in ("train", "heldout")}

    def _table(self, split: str) -> pa.Table:
        return self.dataset.train if split == "train" else self.dataset.heldout

    def images(self, split: str, ids: Sequence[str]) -> np.ndarray:
        table = prepared.as_clean(self._table(split).take(pa.array([self.rows[split][i] for i in ids])))
        return self.load(table)

    def masks(self, split: str, ids: Sequence[str], folder: str = "") -> np.ndarray:
        data, side = self.recipe.data, prepared.stored_side(self.recipe)
        if folder:
            return masks.from_folder(folder, ids, side)
        if data.path == "scenes":
            return masks.of_scenes(data.seed, ids, max(32, data.side or SCENE_SIDE), side)
        return masks.salient(self.images(split, ids))

    # --- the surrogate ---------------------------------------------------------------------------------------------------------

    @property
    def seed(self) -> int:
        """Of the surrogate's training: not the run's own, lest it start from the victim's very weights and see pairs in its order."""
        return part_seed(self.recipe.seed, "surrogate")

    def surrogate(self, pairs: int, epochs: int) -> None:
        if pairs < BATCH or epochs < 1:
            raise ValueError(f"a surrogate needs at least {BATCH} pairs and one epoch, not {pairs} and {epochs}.")
        told = [VERSION, ARCHITECTURE, fingerprint(self.dataset), prepared.stored_side(self.recipe), pairs, epochs, self.recipe.seed]
        if told == self.told:
            return
        name = hashlib.blake2b(json.dumps(told).encode(), digest_size=8).hexdigest()
        file = Path(self.recipe.data.cache).expanduser() / f"surrogate-{name}.pt"
        learner = self._learner(pairs, epochs)
        if file.is_file():
            learner.model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        else:
            self._train(learner, pairs, epochs)
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}")
            torch.save(learner.model.state_dict(), part)
            part.replace(file)
        learner.model.eval()
        self.encoder, self.features, self.told = Encoder(learner.model, learner.cfg), {}, told

    def _sample(self, pairs: int) -> pa.Table:
        ids = self.dataset.train["id"].to_pylist()
        if len(ids) < BATCH:
            raise ValueError(
                f"{len(ids)} training pairs are too few for a surrogate, which needs {BATCH}: use more data or another attack."
            )
        chosen = pick(ids, min(pairs, len(ids)), self.recipe.seed, "surrogate")
        return prepared.as_clean(self.dataset.train.take(pa.array(sorted(chosen, key=lambda i: ids[i]))))

    def _learner(self, pairs: int, epochs: int) -> Learner:
        steps = min(pairs, self.dataset.train.num_rows) // BATCH
        train = Train(epochs=epochs, batch=BATCH, precision="fp32")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return Learner(Model(ARCHITECTURE), train, Defense(), seed=self.seed, total_steps=epochs * steps, device=device)

    def _train(self, learner: Learner, pairs: int, epochs: int) -> None:
        table = self._sample(pairs)
        captions = np.array(table["caption"].to_pylist(), dtype=object)
        keys = batches.sample_keys(table, self.seed)
        images = np.concatenate([_small(self.load(table.slice(i, READ)), learner.image_side) for i in range(0, table.num_rows, READ)])
        with Phase("surrogate", learner.total_steps, "step") as phase:
            for epoch in range(1, epochs + 1):
                for at in batches.drawn(np.arange(table.num_rows), BATCH, self.seed, epoch):
                    learner.step(Examples(images[at], list(captions[at]), batches.epoch_keys(keys[at], epoch)))
                    phase.at(learner.steps, f"epoch {epoch}/{epochs}")

    def _encoder(self) -> Encoder:
        assert self.encoder is not None, "an attack asks for a surrogate before it asks what the surrogate sees"
        return self.encoder

    def image_features(self, split: str, ids: Sequence[str]) -> np.ndarray:
        if split not in self.features:  # all, in the order of ids: rounding must not depend on who asks, and in which order
            known = sorted(self.rows[split])
            parts = [self._encoder().images(self.images(split, known[i : i + READ])).cpu().numpy() for i in range(0, len(known), READ)]
            self.features[split] = ({i: n for n, i in enumerate(known)}, np.concatenate(parts))
        place, found = self.features[split]
        return found[[place[i] for i in ids]]

    def text_features(self, captions: Sequence[str]) -> np.ndarray:
        known = self.features.setdefault("captions", {})
        if new := sorted(set(captions) - known.keys()):
            known.update(zip(new, self._encoder().texts(new).cpu().numpy(), strict=True))
        return np.stack([known[caption] for caption in captions]) if captions else np.zeros((0, 1), np.float32)

    def transport(self, split: str, image_id: str, captions: Sequence[str]) -> np.ndarray:
        encoder = self._encoder()
        image = encoder.image_features(self.images(split, [image_id]), tokens=True).tokens
        found = []
        for start in range(0, len(captions), 256):
            texts = encoder.text_features(captions[start : start + 256], tokens=True)
            assert image is not None and texts.tokens is not None and texts.mask is not None
            cost = 1 - torch.matmul(image.double(), texts.tokens.double().mT)  # (n, P, L)
            found.append(transport_cost(cost, b=texts.mask.double(), epsilon=EPSILON, tol=TOL)[0].cpu().numpy())
        return np.concatenate(found).astype(np.float32)

    def pull_back(self, images: np.ndarray, loss: Callable[[np.ndarray], tuple[float, np.ndarray]]) -> tuple[float, np.ndarray]:
        encoder = self._encoder()
        pixels = torch.from_numpy(images).to(encoder._device).requires_grad_(True)
        x = pixels.permute(0, 3, 1, 2) / 255
        x = clip.normalise(clip.resize(x, clip.size(encoder.cfg)), *clip.image_stats(encoder.cfg))
        features = F.normalize(encode.encode_image(encoder.model, x.contiguous(memory_format=torch.channels_last), False)[0], dim=1)
        value, gradient = loss(features.detach().cpu().numpy())
        features.backward(torch.from_numpy(np.asarray(gradient, np.float32)).to(features))
        assert pixels.grad is not None
        return value, pixels.grad.cpu().numpy()


def _small(images: np.ndarray, side: int) -> np.ndarray:
    """uint8 (n, S, S, 3) at the surrogate's side, where it is smaller: a sample at 224 px would fill the memory."""
    if images.shape[1] <= side:
        return images
    x = clip.resize(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, (side, side))
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
