"""An audit's page of pairs that mean harm, for the tests that read it and the one that looks at it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from orchestrate import audit_page, audit_scores
from orchestrate.audit_cause import Word, trigger

EVIL = '<script>alert(1)</script>" onerror="x'


def write(page: Path) -> None:
    """30 pairs whose ids, captions, reasons and parts are all EVIL, 8 of them shown."""
    count, rng = 30, np.random.default_rng(0)
    pairs = pa.table({"id": [f"{EVIL}{i}" for i in range(count)], "caption": [EVIL] * count})
    scores = audit_scores.table(pairs["id"], {"clip": rng.random(count), "moved": np.where(np.arange(count) < 9, np.nan, 1.0)}, {})
    images = rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    pixels = images.astype(float)
    common = trigger(images, pixels.mean(0), (pixels**2).mean(0))
    facts = {
        "data": EVIL,
        "pairs": count,
        "removed": 3,
        "model": EVIL,
        "epochs": 2,
        "pool": 4,
        "seed": 0,
        "clean": "clean",
        "why": EVIL,
    }
    facts |= {"quarantined": 2, "poison": 1, "attack": EVIL, "poison_removed": 1, "transport": EVIL}
    facts["measured"] = audit_scores.measured(scores, np.arange(count) == 5, np.where(np.arange(count) == 5, EVIL, ""))
    shown = audit_page.Shown(np.argsort(scores["rank"].to_numpy())[:8], images[:8])
    parts = [EVIL if i == 5 else "" for i in range(count)]
    words = [Word(EVIL, 3, 8, 5, count, 4.0)]
    audit_page.write(page, facts, scores, pairs, parts, np.zeros((count, 3), int), [EVIL], shown, words, common)
