"""Transport plans to look at: for a few pairs of the gallery, how a caption's words spread their mass over the image's patches. No Ray.

    gallery.parquet + trained model → plans.parquet: for each pair its original caption, and the one that the last robust round found for it

Plans and distances are those of the trained model, at the ε that the defence matches with; the captions were found by the model of that
round. W words, P patches, L tokens, d features.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from defenses.base import Defense, Features
from defenses.otcclip import TransportMatcher
from defenses.transport import transport_cost
from models import clip, tokens
from orchestrate.encoder import Encoder

POISONED, CLEAN = 4, 2  # pairs shown
TOL = 1e-6  # marginals, as in matching
COPIED = ("id", "section", "kind", "stamp", "truth", "adversary", "png")  # columns of the gallery
SCHEMA = pa.schema(
    [(name, pa.string()) for name in COPIED[:-1]]
    + [("png", pa.binary()), ("epoch", pa.int32()), ("which", pa.string()), ("caption", pa.string())]
    + [("words", pa.list_(pa.string())), ("plan", pa.list_(pa.float32()))]  # plan: W × P, row by row
    + [("rows", pa.int32()), ("columns", pa.int32()), ("distance", pa.float32()), ("epsilon", pa.float32())]
)
ORIGINAL, MATCHED, NEAREST = "original", "matched", "nearest"  # `which`; nearest: in the pool, though the pair kept its own caption


def write(folder: Path, defense: Defense, encoder: Encoder) -> None:
    """plans.parquet for a run whose last robust round matched by transport; nothing for any other."""
    gallery = [row for row in pq.read_table(folder / "gallery.parquet").to_pylist() if row["rounds"]]
    pairs = chosen(gallery)
    matcher = defense.matcher(pairs[0]["rounds"][-1]["epoch"]) if pairs else None
    if not isinstance(matcher, TransportMatcher) or clip.text_config(encoder.cfg).get("hf_tokenizer_name"):
        return  # of a foreign tokenizer nobody knows here which tokens make a word
    pq.write_table(pa.Table.from_pylist(plans(pairs, matcher.epsilon, encoder), SCHEMA), folder / "plans.parquet", compression="zstd")


def chosen(gallery: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """POISONED poisoned pairs, one of each kind first, and CLEAN clean ones of differing classes where there are; no image twice."""
    return [
        *_first([row for row in gallery if row["section"] == "poison"], ("kind", "stamp"), POISONED),
        *_first([row for row in gallery if row["section"] == "clean"], ("truth",), CLEAN),
    ]


def _first(rows: Sequence[Mapping[str, Any]], kind: Sequence[str], count: int) -> list[Mapping[str, Any]]:
    """`count` rows with differing images, taking turns between kinds."""
    seen, turns, order = set[bytes](), dict[Any, int](), []
    for i, row in enumerate(rows):
        if row["png"] not in seen:
            seen.add(row["png"])
            own = tuple(row[name] for name in kind)
            turns[own] = turns.get(own, -1) + 1
            order.append((turns[own], i))
    return [rows[i] for _, i in sorted(order)[:count]]


def plans(pairs: Sequence[Mapping[str, Any]], epsilon: float, encoder: Encoder) -> list[dict[str, Any]]:
    """Rows of SCHEMA: two for each of these rows of the gallery."""
    images = encoder.image_features(np.stack([_pixels(row["png"]) for row in pairs]), tokens=True)
    captions, kinds = [], []
    for row in pairs:
        last = row["rounds"][-1]
        captions += [row["caption"], last["nearest"]]
        kinds += [ORIGINAL, NEAREST if last["stays"] else MATCHED]
    texts = encoder.text_features(captions, tokens=True)
    twice = Features(*(None if x is None else x.repeat_interleave(2, 0) for x in images))  # type: ignore[arg-type]
    distance, plan = token_plans(twice, texts, epsilon)
    assert texts.mask is not None
    rows, columns = grid(plan.shape[1], clip.size(encoder.cfg))
    out = []
    for k, (caption, which) in enumerate(zip(captions, kinds, strict=True)):
        words, by_word = word_plan(encoder.cfg, caption, plan[k][:, texts.mask[k]])
        pair = pairs[k // 2]
        shown = {"epoch": pair["rounds"][-1]["epoch"], "which": which, "caption": caption, "words": words}
        shape = {"plan": by_word.flatten().tolist(), "rows": rows, "columns": columns}
        out.append({name: pair[name] for name in COPIED} | shown | shape | {"distance": float(distance[k]), "epsilon": epsilon})
    return out


def token_plans(images: Features, captions: Features, epsilon: float) -> tuple[Tensor, Tensor]:
    """Transport cost (N,) and plan (N, P, L) between each image and its caption, as matching computes them; float64, on the CPU."""
    assert images.tokens is not None and captions.tokens is not None and captions.mask is not None
    cost = 1 - torch.bmm(images.tokens.double(), captions.tokens.double().mT)
    distance, plan = transport_cost(cost, b=captions.mask.double(), epsilon=epsilon, tol=TOL)
    return distance.cpu(), plan.cpu()


def word_plan(cfg: Mapping[str, Any], caption: str, plan: Tensor) -> tuple[list[str], Tensor]:
    """Words (W) of a caption, and what each sends where (W, P), of the plan (P, L) of its tokens, none of them padding."""
    words, owner = tokens.words(clip.text_config(cfg), caption)
    assert len(owner) == plan.shape[1]
    return words, plan.new_zeros(len(words), len(plan)).index_add_(0, torch.tensor(owner), plan.T)


def grid(patches: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the patches of an image of this height and width; they lie row by row and are square."""
    height, width = image_size
    rows = round(math.sqrt(patches * height / width))
    assert patches % rows == 0
    return rows, patches // rows


def _pixels(png: bytes) -> np.ndarray:
    from PIL import Image

    return np.array(Image.open(io.BytesIO(png)).convert("RGB"))
