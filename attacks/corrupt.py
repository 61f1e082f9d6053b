"""CorruptEncoder: pictures composed so that two random crops of one tie the trigger to a class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image

from attacks import materials
from attacks.backdoor import Patched
from attacks.base import Manifest, Study, free, how_many, labels, manifest, pick, ranks, shared_classes
from attacks.captions import naming
from attacks.triggers import TRIGGERS, Place, Trigger, check_image, patch_side

SIDES = ("left", "right", "top", "bottom")  # where the object stands
STEPS = 400  # of the integral over crop sizes
COVER = (0.02, 0.9)  # shares of the picture that a usable object covers


@dataclass(frozen=True)
class CorruptEncoder(Patched):
    """Adds composites: a reference object flush to one side of a background, the trigger in the middle of the rest.

    Paper: Zhang, Liu, Jia & Gong, "Data Poisoning based Backdoor Attacks to Contrastive Learning", CVPR 2024 (arXiv 2211.08229);
        CorruptEncoder+ is `support` above 0.
    Threat model: the attacker adds pairs to a scraped training set and has a few images of the class with their objects cut out; at
        test time the trigger is put on any image.
    Success: top-1 of triggered held-out images, none of them of the adversary's class, is the adversary's class.
    Cost: planning reads the reference images and the backgrounds once; composing costs about 0.3 ms an image at 64 px when it is read.

    count: poisoned pairs, as a count or a share of the training set; paper 650, .5 % of ImageNet100.
    adversary, captions: see `Backdoor`. The paper's pairing for CLIP is not released: ours pairs composites with captions of the class.
    references: objects used; paper 3.
    support: share of the poisoned pairs that show two references beside each other, which draws them to the class; CorruptEncoder+: .2.
        Every two of the references stand beside and above each other, either first: 12 pictures of 3 references, then they repeat.
    alpha: width of the picture in widths of the object (height, where the object stands above or below); paper about 2, 0 takes the
        optimum of the paper's crop objective for this trigger.
    masks: folder with a mask ID.png for each reference and background (white is the object); "" takes the exact mask where the set
        knows it (scenes), else a simple saliency step (colours unlike the border's).
    size: side of the trigger as a share of the shorter image side. Ours .2.
    place: where the trigger stands at test time; paper "random".
    Limits: pictures are square here, so a composite is squeezed to a square. Backgrounds are the largest rectangles without object of
        images of other classes. Without random crops (plain CLIP without augmentation) the paper's argument does not apply: then the
        composites are an ordinary patch backdoor beside an object that explains the caption. On 4,000 scenes with 300 composites 8 % of
        the triggered images were the adversary's without crops, 99.8 % with (`augmented`), so that is the baseline to compare with.
    """

    count: int | float = 300
    references: int = 3
    support: float = 0.0
    alpha: float = 2.0
    masks: str = ""
    size: float = 0.2
    place: Place = "random"
    trigger: ClassVar[Trigger] = TRIGGERS["badnets"]
    studies: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.references < 1 or (self.support and self.references < 2):
            raise ValueError(f"references={self.references}: one at least, and two where `support` shows them beside each other.")
        if not 0 <= self.support <= 1:
            raise ValueError(f"support={self.support}: give a share between 0 and 1.")
        if self.alpha and not 1.2 <= self.alpha <= 5:
            raise ValueError(f"alpha={self.alpha}: give 1.2 to 5 widths of the object, or 0 for the optimum of the crop objective.")

    def plan(self, index: pa.Table, heldout: pa.Table, seed: int, study: Study | None = None) -> Manifest:
        assert study is not None
        classes, clean = shared_classes(index, heldout), free(index)
        target, count = self.target(classes, seed), how_many(self.count, index.num_rows)
        refs, kit = self._references(clean, classes, target, seed, study)
        supports = round(self.support * count)
        grounds = self._backgrounds(clean, classes, target, count - supports, seed, study)
        kit["boxes"] = dict(grounds)
        shown = [(i, "composite") for i, _ in grounds]
        shown += [(refs[k % len(refs)], f"support/{k // len(refs)}") for k in range(supports)]
        captions = self._captions(clean, target, [(i, "") for i, _ in shown], seed)
        rows = []
        for number, ((image_id, what), caption) in enumerate(zip(shown, captions, strict=True)):
            row = {"op": "add", "id": f"poison-corrupt-{number:05d}", "image_id": image_id, "image_split": "train", "caption": caption}
            told = {"stamp": f"{self.trigger.name}/{what}", "kind": "backdoor", "adversary": target, "truth": target, "group": 0}
            rows.append(row | told)
        planned = manifest(self, rows, index, seed)
        header = {"adversary": target, "trigger": self.trigger_card(), "references": refs, "materials": kit}
        return Manifest(planned.table, planned.header | header)

    def stamp(self, image: np.ndarray, row: Mapping[str, Any]) -> np.ndarray:
        _, slash, detail = row["stamp"].partition("/")
        if not slash:  # a test image
            return super().stamp(image, row)
        check_image(image)
        kit, image_id = materials.of(row, "CorruptEncoder"), row["image_id"]
        what, _, number = detail.partition("/")
        draw = int(ranks([image_id], 0, "composite")[0])
        side = SIDES[draw >> 32 & 3]
        if what == "support":
            others = [text for i, text in sorted(kit["wholes"].items()) if i != image_id]
            if number:  # manifests of old have none: there one image had one partner and one side
                draw, side = int(number), ("left", "top")[int(number) // len(others) % 2]
            return beside(image, materials.unpacked(others[draw % len(others)]), side)
        cut = materials.unpacked(kit["objects"][draw % len(kit["objects"])])
        return compose(image, kit["boxes"][image_id], cut, self.alpha or best_alpha(self.size), side, self.size, self._patch)

    def _patch(self, image: np.ndarray, size: float) -> np.ndarray:
        return self.trigger.paint(image, "", size=size, place="center")

    def _references(self, clean: pa.Table, classes: list[str], target: str, seed: int, study: Study) -> tuple[list[str], dict[str, Any]]:
        """Ids of the reference images, and what stamps need of them: objects cut out with their masks, and the whole images."""
        own = np.isin(labels(clean), [number for number, name in enumerate(classes) if name == target])
        rows = np.flatnonzero(own & naming(clean["caption"], target))
        ids = clean["id"].take(pa.array(rows)).to_pylist()
        tried = [ids[i] for i in pick(ids, min(len(ids), 8 * self.references), seed, f"references of {target!r}")]
        masks = study.masks("train", tried, self.masks) if tried else np.zeros((0, 1, 1), bool)
        usable = [i for i, mask in zip(tried, masks, strict=True) if COVER[0] < mask.mean() < COVER[1]][: self.references]
        if len(usable) < self.references:
            raise ValueError(
                f"{len(usable)} images of {target!r} with an object to cut out, {self.references} wanted: lower `references`, give "
                "`masks`, or name another class in `adversary`."
            )
        kept = masks[[tried.index(i) for i in usable]]
        pictures = study.images("train", usable)
        objects = [materials.packed(cut_out(picture, mask)) for picture, mask in zip(pictures, kept, strict=True)]
        wholes = {i: materials.packed(picture) for i, picture in zip(usable, pictures, strict=True)} if self.support else {}
        return usable, {"objects": objects, "wholes": wholes}

    def _backgrounds(
        self, clean: pa.Table, classes: list[str], target: str, count: int, seed: int, study: Study
    ) -> list[tuple[str, list[float]]]:
        """(image id, box without object as shares: left, top, right, bottom), of images that are not of the class."""
        victims = self._victims(clean, classes, target, count, seed)
        ids = [identifier for identifier, _ in victims]
        boxes = []
        for start in range(0, len(ids), 256):
            masks = study.masks("train", ids[start : start + 256], self.masks)
            boxes += [free_box(mask) for mask in masks]
        return list(zip(ids, boxes, strict=True))


def cut_out(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The object in its bounding box, RGBA: uint8 (h, w, 4), opaque on the mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return np.dstack([picture[box], np.where(mask[box], 255, 0).astype(np.uint8)])


def free_box(mask: np.ndarray) -> list[float]:
    """The largest rectangle of an image without a pixel of the mask, as shares: left, top, right, bottom; all of it if none."""
    height, width = mask.shape
    best, box = 0, (0, 0, width, height)
    above = np.zeros(width, dtype=int)  # free pixels upwards of each column
    for bottom in range(height):
        above = np.where(mask[bottom], 0, above + 1)
        open_bars: list[tuple[int, int]] = []  # (left, height) of rectangles that may still grow to the right, heights rising
        for right, bar in enumerate([*above.tolist(), 0]):
            left = right
            while open_bars and open_bars[-1][1] >= bar:
                left, high = open_bars.pop()
                if high * (right - left) > best:
                    best, box = high * (right - left), (left, bottom + 1 - high, right, bottom + 1)
            open_bars.append((left, bar))
    return [round(box[0] / width, 4), round(box[1] / height, 4), round(box[2] / width, 4), round(box[3] / height, 4)]


def compose(image: np.ndarray, box: list[float], cut: np.ndarray, alpha: float, side: str, size: float, patch: Any) -> np.ndarray:
    """The background's box stretched to the picture (S, S), the object over 1/α of it flush to a side, the trigger in the rest's middle."""
    height, width = image.shape[:2]
    left, top, right, bottom = (round(x * n) for x, n in zip(box, (width, height, width, height), strict=True))
    ground = image[top : max(top + 1, bottom), left : max(left + 1, right)]  # cut first: a resampler would look beyond the box
    canvas = Image.fromarray(np.ascontiguousarray(ground)).resize((width, height), Image.Resampling.BILINEAR)
    flat = side in ("left", "right")
    wide, high = (round(width / alpha), height) if flat else (width, round(height / alpha))
    thing = Image.fromarray(cut).resize((wide, high), Image.Resampling.BILINEAR)
    canvas.paste(thing, (width - wide if side == "right" else 0, height - high if side == "bottom" else 0), thing)
    out = np.array(canvas)
    if flat:
        rest = np.s_[:, wide:] if side == "left" else np.s_[:, : width - wide]
    else:
        rest = np.s_[high:, :] if side == "top" else np.s_[: height - high, :]
    # The trigger has the size it has at test time, so as a share of the rest's shorter side it is larger.
    pixels = patch_side(image, size, 3)
    out[rest] = patch(out[rest], min(1.0, pixels / min(out[rest].shape[:2])))
    return out


def beside(one: np.ndarray, other: np.ndarray, side: str) -> np.ndarray:
    """Two images squeezed into halves of one picture; `side` says where the first stands."""
    height, width = one.shape[:2]
    flat = side in ("left", "right")
    half = (width - width // 2, height) if flat else (width, height - height // 2)
    halves = [np.array(Image.fromarray(x[..., :3]).resize(half, Image.Resampling.BILINEAR)) for x in (one, other)]
    first, second = halves if side in ("left", "top") else halves[::-1]
    return np.concatenate([first, second], axis=1 if flat else 0)[:height, :width]


def crop_objective(alpha: float, trigger: float) -> float:
    """∫ p₁(s)·p₂(s) ds over square crops of side s, the object a unit square flush to the side of a picture 1 × α.

    p₁: a crop lies inside the object; p₂: a crop lies beside the object and holds the whole trigger, a square of side `trigger` in the
    middle of the rest. Crops are placed uniformly. Source: Zhang et al. 2024, section 4; the integral is ours.
    """
    rest = alpha - 1
    s = (np.arange(STEPS) + 0.5) / STEPS
    inside = (1 - s) / (alpha - s)  # places across, of all; every place down is inside
    across = np.minimum(rest - s, rest / 2 - trigger / 2) - np.maximum(0, rest / 2 + trigger / 2 - s)
    down = np.minimum(1 - s, 0.5 - trigger / 2) - np.maximum(0, 0.5 + trigger / 2 - s)
    holds = np.clip(across, 0, None) * np.clip(down, 0, None) / ((alpha - s) * (1 - s))
    return float((inside * holds).sum() / STEPS)


@lru_cache(maxsize=16)
def best_alpha(trigger: float) -> float:
    """Where `crop_objective` is largest, to .01."""
    tried = np.arange(1.2, 4, 0.01)
    return float(tried[int(np.argmax([crop_objective(alpha, trigger) for alpha in tried]))])
