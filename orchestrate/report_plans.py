"""A run's transport plans as the page draws them: patches in the colours of the words that claim them, words in their colours.

plans.parquet (see `plans`) → for each pair its image, and for each of its two captions tinted patches, coloured words, a distance
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrate.report_plots import PALETTE
from orchestrate.report_text import finite

RED, AMBER, BLUE, GREEN, VIOLET, *_ = PALETTE
OTHERS = (BLUE, AMBER, VIOLET)  # of the other words only so many are coloured, those that claim most: red and green must stand out
FULL, FAINT = 0.66, 0.05  # opacity of the strongest tint, and what is too little to be drawn
LONGEST = 3  # words in a class's name or synonym, at most
TITLES = {"matched": "matched in epoch {}", "nearest": "nearest in the pool, epoch {} (own stayed)"}


def shown(plans: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> dict[str, Any] | None:
    """What the template needs: `pairs`, each with two `sides`; `top`, the claim that gets a full tint; `epsilon`. None without plans."""
    sides = [_side(row) for row in plans]
    if not sides:
        return None
    top = max(1.1, float(np.quantile(np.concatenate([side["times"] for side in sides]), 0.98)))  # not the largest: one patch may stand out
    pairs: dict[str, dict[str, Any]] = {}
    for row, side in zip(plans, sides, strict=True):
        pairs.setdefault(row["id"], {**row, "sides": []})["sides"].append(side)
    for pair in pairs.values():
        _color(pair, classes, top)
    return {"pairs": list(pairs.values()), "top": f"{top:.1f}", "epsilon": f"{plans[0]['epsilon']:g}"}


def _side(row: Mapping[str, Any]) -> dict[str, Any]:
    """One caption beside the image: for each patch the word (P,) that claims it, and how strongly (P,)."""
    plan = np.asarray(row["plan"], np.float64).reshape(len(row["words"]), -1)
    word, times = claims(plan)
    original = "planted caption" if row["section"] == "poison" else "own caption"
    title = TITLES.get(row["which"], original).format(row["epoch"])
    return {"title": title, "distance": finite(row["distance"]), "text": row["words"], "word": word, "times": times}


def claims(plan: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each patch of a plan (W, P) the word (P,) that sends it the largest part of its mass, and that part over an even share (P,).

    Parts and not masses: else a word of many tokens, which has more mass, would claim every patch.
    """
    part = plan / plan.sum(1, keepdims=True) * plan.shape[1]
    return part.argmax(0), part.max(0)


def _color(pair: dict[str, Any], classes: Sequence[str], top: float) -> None:
    """Add to each side its `words` and `patches`. Red: the attacker's class; green: the true one; others alike beside both captions."""
    truth, adversary = pair["truth"], pair["adversary"]
    strength: dict[str, float] = {}
    for side in pair["sides"]:
        side["opacity"] = FULL * (np.log(side["times"]) / np.log(top)).clip(0, 1)
        side["named"] = _class_words(side["text"], truth, adversary, classes)
        for word, opacity in zip(side["word"], side["opacity"], strict=True):
            if opacity >= FAINT and not side["named"].get(word):
                text = side["text"][word]
                strength[text] = strength.get(text, 0.0) + opacity
    ranked = sorted(strength, key=lambda text: -strength[text])
    color = dict(zip(ranked, OTHERS, strict=False))
    nearest = min((side["distance"] for side in pair["sides"] if side["distance"] is not None), default=None)
    for side in pair["sides"]:
        mine = [{"bad": RED, "good": GREEN}.get(side["named"].get(k, ""), color.get(text)) for k, text in enumerate(side["text"])]
        side["patches"] = _patches(side, mine, pair["columns"])
        claimed = {patch["word"] for patch in side["patches"]}
        side["words"] = [
            {"text": text, "kind": side["named"].get(k, ""), "color": mine[k] if k in claimed else None}
            for k, text in enumerate(side["text"])
        ]
        side["nearer"] = side["distance"] is not None and side["distance"] == nearest


def _patches(side: Mapping[str, Any], colors: Sequence[str | None], columns: int) -> list[dict[str, Any]]:
    """The patches that a coloured word claims, in units of a patch."""
    drawn = []
    for at, (word, times, opacity) in enumerate(zip(side["word"], side["times"], side["opacity"], strict=True)):
        if opacity >= FAINT and colors[word]:
            y, x = divmod(at, columns)
            told = f"{side['text'][word]} · {times:.1f} × an even part"
            drawn.append({"x": x, "y": y, "color": colors[word], "opacity": f"{opacity:.2f}", "word": int(word), "told": told})
    return drawn


def _class_words(words: Sequence[str], truth: str, adversary: str, classes: Sequence[str]) -> dict[int, str]:
    """Which words name the attacker's class ("bad") or the true one ("good"): the shortest runs of words that do."""
    from orchestrate.pairing import named_classes

    names = [*classes, *(name for name in (truth, adversary) if name and name not in classes)]
    spans = [(i, n) for n in range(1, LONGEST + 1) for i in range(len(words) - n + 1)]
    kinds: dict[int, str] = {}
    for (i, n), found in zip(spans, named_classes([" ".join(words[i : i + n]) for i, n in spans], names), strict=True):
        kind = next((kind for name, kind in ((adversary, "bad"), (truth, "good")) if name and name in {names[k] for k in found}), "")
        if kind and not any(k in kinds for k in range(i, i + n)):
            kinds |= dict.fromkeys(range(i, i + n), kind)
    return kinds
