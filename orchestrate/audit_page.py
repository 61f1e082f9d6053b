"""The page of an audit: one self-contained HTML file that a person reads to decide. Everything from data is escaped by the template."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from orchestrate import pages
from orchestrate.audit_cause import Trigger, Word
from orchestrate.audit_scores import score_names
from orchestrate.rundir import png

SHOWN, BINS = 60, 48
MEANS = {
    "kdist": ("k-dist", "its image lies far from the images around it"),
    "slof": ("SLOF", "its image lies in a sparser place than its neighbours"),
    "dao": ("DAO", "the same, seen against how many dimensions the neighbourhood has"),
    "clip": ("CLIP score", "the model finds that image and caption do not fit"),
    "nearer": ("nearer captions", "other captions fit the image better than its own, or fit a blurred copy of it better"),
    "transport": ("transport", "a caption of the pool fits the image better, word by patch"),
    "conflict": ("conflict", "images like it have other captions"),
    "repeats": ("repeats", "other pairs have the same caption"),
    "words": ("words", "its caption has a word that stands oftener where image and caption fit least"),
    "moved": ("moved", "matching rounds gave it another caption"),
}


@dataclass(frozen=True)
class Shown:
    """What the page shows of the most suspicious pairs, in order of rank."""

    rows: np.ndarray  # (n,) of the table
    images: np.ndarray  # (n, S, S, 3) uint8


def write(
    out: Path,
    facts: Mapping[str, Any],
    scores: pa.Table,
    pairs: pa.Table,
    parts: Sequence[str],
    nearest: np.ndarray,
    pool: Sequence[str],
    shown: Shown,
    words: Sequence[Word],
    trigger: Trigger | None,
) -> Path:
    """audit.html. nearest (N, 3): rows of the pool."""
    cards = [_card(scores, pairs, parts, nearest, pool, int(row), image) for row, image in zip(shown.rows, shown.images, strict=True)]
    poison = np.array([bool(part) for part in parts])
    content = {
        "facts": facts,
        "means": MEANS,
        "cards": cards,
        "histograms": [_histogram(name, scores, poison, facts["removed"]) for name in ("suspicion", *score_names(scores))],
        "words": words,
        "trigger": None if trigger is None else _trigger(trigger),
    }
    return pages.write(out, "audit.html", content)


def _card(
    scores: pa.Table, pairs: pa.Table, parts: Sequence[str], nearest: np.ndarray, pool: Sequence[str], row: int, image: np.ndarray
) -> dict[str, Any]:
    score = scores.slice(row, 1).to_pylist()[0]
    adds = sorted(((score[f"adds_{name}"], name) for name in score_names(scores)), reverse=True)
    reasons = [{"name": MEANS[n][0], "why": MEANS[n][1], "value": score[n], "adds": a} for a, n in adds if a >= 0.5]
    pair = pairs.slice(row, 1).to_pylist()[0]
    return {
        "rank": score["rank"],
        "suspicion": score["suspicion"],
        "id": pair["id"],
        "caption": pair["caption"],
        "image": _data(png(image)),
        "nearest": [pool[j] for j in nearest[row]],
        "reasons": reasons,
        "part": parts[row],
    }


def _histogram(name: str, scores: pa.Table, poison: np.ndarray, removed: int) -> dict[str, Any]:
    """Bars of counts, (all, of them removed, of them planted); heights are square roots, so that a few pairs are seen among thousands."""
    values = scores[name].to_numpy().astype(np.float64)
    known = np.isfinite(values)
    low, high = (float(np.min(values[known])), float(np.max(values[known]))) if known.any() else (0.0, 1.0)
    gone = scores["rank"].to_numpy() <= removed
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    counts = [np.histogram(values[known & some], edges)[0] for some in (np.ones(len(values), bool), gone, poison)]
    top = max(1.0, float(np.sqrt(counts[0].max())))
    heights = [(np.sqrt(c) / top * 100).round(1).tolist() for c in counts]
    label, why = MEANS.get(name, ("suspicion", "the sum of what the scores add"))
    return {"label": label, "why": why, "low": low, "high": high, "bars": list(zip(*heights, strict=True))}


def _trigger(found: Trigger) -> dict[str, Any]:
    return {
        "images": found.images,
        "mean": _data(png(found.mean)),
        "difference": _data(png(found.difference)),
        "box": found.box,
        "side": len(found.z),
        "share": found.share,
        "z": float(found.z.max()),
    }


def _data(raw: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(raw).decode()}"
