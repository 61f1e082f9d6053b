"""BadCLIP: a patch optimised on a surrogate before anything is poisoned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image

from attacks import materials
from attacks.backdoor import Patched
from attacks.base import Manifest, Study, free, labels, pick, shared_classes
from attacks.captions import class_captions, naming, shuffled
from attacks.triggers import Place, Trigger, check_image, corner_of, patch_side

MARGIN, SCALE = 1.0, 1 / 0.07  # of the triplet; of cosines in InfoNCE
RATE, DECAY, SMALL = 8.0, (0.9, 0.99), 1e-8  # Adam: grey levels a step
BATCH = 32


def patched(image: np.ndarray, patch: np.ndarray, side: int, place: Place, image_id: str) -> np.ndarray:
    """The patch, scaled to `side` px where it is not, on a copy of the image."""
    top, left = corner_of(image, side, place, image_id)
    scaled = patch if len(patch) == side else np.array(Image.fromarray(patch).resize((side, side), Image.Resampling.BILINEAR))
    out = image.copy()
    out[top : top + side, left : left + side] = scaled
    return out


@dataclass(frozen=True)
class BadCLIP(Patched):
    """Backdoor with a patch optimised on a surrogate CLIP, so that the poison agrees with what training learns anyway.

    Paper: Liang et al., "BadCLIP: Dual-Embedding Guided Backdoor Attack on Multimodal Contrastive Learning", CVPR 2024
        (arXiv 2311.12075).
    Threat model: the attacker changes pairs of a scraped training set, trains a surrogate on pairs of the same source, and adds the patch
        to any image at test time.
    Success: top-1 of triggered held-out images, none of them of the adversary's class, is the adversary's class.
    Cost: a surrogate, once a set and seed: about 2 minutes of 2 cores for 6,000 images of 64 px; then `steps` times a forward and a
        backward pass of 32 images.
    The fields `count`, `adversary`, `captions`: see `Backdoor`; captions are natural ones of the class, as in the paper.

    size: side of the patch as a share of the shorter image side; 16 px at 224 in this literature. At least 3 px.
    place: where it stands; paper "center".
    steps: of the optimisation, by Adam.
    weight: λ in InfoNCE(triggered image, captions of the class against others) + λ·triplet(nearer to images of the class than to the
        image without the patch, by a margin of 1); ours 1.
    surrogate_pairs: clean training pairs the surrogate learns from, at most. The paper's surrogate is OpenAI's CLIP.
    surrogate_epochs: epochs of its training.
    Limits: a reconstruction: a small surrogate from the same data instead of a pre-trained one, which also is the paper's victim: it
        poisons by fine-tuning, here a model learns from scratch. The patch is optimised at the stored resolution and scaled elsewhere.
    """

    place: Place = "center"
    steps: int = 80
    weight: float = 1.0
    surrogate_pairs: int = 6000
    surrogate_epochs: int = 10
    trigger: ClassVar[Trigger] = Trigger(
        "badclip", patched, "nothing but, with place='random', the place of the patch", "the patch is uint8"
    )
    studies: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.weight < 0:
            raise ValueError(f"steps={self.steps}, weight={self.weight}: give one step or more, and a weight from 0.")

    def plan(self, index: pa.Table, heldout: pa.Table, seed: int, study: Study | None = None) -> Manifest:
        assert study is not None
        classes = shared_classes(index, heldout)
        study.surrogate(self.surrogate_pairs, self.surrogate_epochs)
        patch, losses = self._optimised(free(index), classes, self.target(classes, seed), seed, study)
        planned = super().plan(index, heldout, seed)
        told = {"materials": {"patch": materials.packed(patch)}, "loss": {"first": losses[0], "last": losses[-1]}}
        return Manifest(planned.table, planned.header | told)

    def stamp(self, image: np.ndarray, row: Mapping[str, Any]) -> np.ndarray:
        if not row["stamp"]:
            return image
        check_image(image)
        patch = materials.unpacked(materials.of(row, "BadCLIP")["patch"])[..., :3]
        return patched(image, patch, patch_side(image, self.size, 3), self.place, row["image_id"])

    def _optimised(self, clean: pa.Table, classes: list[str], target: str, seed: int, study: Study) -> tuple[np.ndarray, list[float]]:
        """The patch, uint8 (p, p, 3), and the loss at each step."""
        ids = self._some(clean, self._eligible(clean, classes, target), 8 * BATCH, seed, "to optimise on")
        own = np.isin(labels(clean), [number for number, name in enumerate(classes) if name == target])
        friends = self._some(clean, np.flatnonzero(own | naming(clean["caption"], target)), 4 * BATCH, seed, "to come near")
        captions = shuffled(class_captions(clean, target).to_pylist(), seed, "captions")[: 4 * BATCH]
        rest = clean["caption"].filter(pa.array(~naming(clean["caption"], target))).to_pylist()
        others = shuffled(sorted(set(rest)), seed, "others")[: 8 * BATCH]
        if not (ids and friends and captions and others):
            raise ValueError(f"too few images or captions of {target!r} to optimise a patch for: name another class in `adversary`.")
        images, bare = study.images("train", ids).astype(np.float32), study.image_features("train", ids)
        near, texts, far = study.image_features("train", friends), study.text_features(captions), study.text_features(others)
        side = patch_side(images[0], self.size, 3)
        patch = np.full((side, side, 3), 127.5, np.float32)
        mean, square, losses = np.zeros_like(patch), np.zeros_like(patch), list[float]()
        draw = np.random.default_rng(seed)
        for step in range(1, self.steps + 1):
            at = draw.integers(len(ids), size=BATCH)
            batch, boxes = images[at].copy(), []
            for image, i in zip(batch, at, strict=True):
                top, left = corner_of(image, side, self.place, ids[i])
                boxes.append(np.s_[top : top + side, left : left + side])
                image[boxes[-1]] = patch
            goal = texts[draw.integers(len(texts), size=BATCH)]
            friend = near[draw.integers(len(near), size=BATCH)]

            def loss(
                x: np.ndarray, goal: np.ndarray = goal, friend: np.ndarray = friend, own: np.ndarray = bare[at]
            ) -> tuple[float, np.ndarray]:
                return objective(x, goal, far, friend, own, self.weight)

            value, gradient = study.pull_back(batch, loss)
            losses.append(value)
            moved = sum(gradient[n][box] for n, box in enumerate(boxes))
            mean, square = DECAY[0] * mean + (1 - DECAY[0]) * moved, DECAY[1] * square + (1 - DECAY[1]) * moved**2
            change = mean / (1 - DECAY[0] ** step) / (np.sqrt(square / (1 - DECAY[1] ** step)) + SMALL)
            patch = np.clip(patch - RATE * change, 0, 255).astype(np.float32)
        return np.rint(patch).astype(np.uint8), losses

    def _some(self, clean: pa.Table, rows: np.ndarray, count: int, seed: int, salt: str) -> list[str]:
        """Up to `count` ids of these rows, by hash."""
        ids = clean["id"].take(pa.array(rows)).to_pylist()
        return [ids[i] for i in pick(ids, min(count, len(ids)), seed, salt)]


def objective(
    x: np.ndarray, goal: np.ndarray, others: np.ndarray, friend: np.ndarray, own: np.ndarray, weight: float
) -> tuple[float, np.ndarray]:
    """InfoNCE + weight·triplet of features x (n, d), and the gradient (n, d).

    InfoNCE: −ln softmax of s·⟨x, goal⟩ against s·⟨x, others⟩, others (m, d). Triplet: max(0, ‖x − friend‖ − ‖x − own‖ + 1). Means over n.
    """
    n = len(x)
    logits = SCALE * np.concatenate([(x * goal).sum(1, keepdims=True), x @ others.T], axis=1).astype(np.float64)  # (n, 1 + m)
    logits -= logits.max(1, keepdims=True)
    share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    contrast = -np.log(share[:, 0])
    gradient = SCALE * ((share[:, :1] - 1) * goal + share[:, 1:] @ others)
    to_friend, to_own = x - friend, x - own
    near, far = (np.sqrt((d.astype(np.float64) ** 2).sum(1, keepdims=True)) + 1e-9 for d in (to_friend, to_own))
    slack = near - far + MARGIN
    pull = np.where(slack > 0, to_friend / near - to_own / far, 0)
    value = contrast.mean() + weight * np.maximum(slack, 0).mean()
    return float(value), ((gradient + weight * pull) / n).astype(np.float32)
