"""The attack alone: plan, manifest, contact sheet. No training, no Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from attacks.base import pick, trigger_of
from attacks.sheet import contact_sheet
from orchestrate import prepared
from orchestrate.recipe import Recipe

EXAMPLES = 24


def write(recipe: Recipe, out: Path) -> Iterator[str]:
    """manifest.parquet and sheet.png in `out`; yields what was planned, line by line. ValueError for a recipe without attack."""
    if recipe.attack is None:
        raise ValueError("this recipe has no attack: name one, such as attack=targeted+stripes.")
    dataset = prepared.readable(recipe)
    ready = prepared.plan(recipe, dataset)
    assert ready.manifest is not None
    out.mkdir(parents=True, exist_ok=True)
    ready.manifest.write(str(out / "manifest.parquet"))
    table, header = ready.manifest.table, ready.manifest
    total = ready.table.num_rows
    yield f"{recipe.attack.use} on {dataset.name}, seed {recipe.seed}: {header.count:,} poisoned pairs, {header.rate:.2%} of {total:,}"
    groups = Counter((row["kind"], trigger_of(row["stamp"]), row["adversary"]) for row in table.to_pylist())
    for (kind, stamp, adversary), count in sorted(groups.items()):
        yield f"  {kind:<9} {stamp or '-':<10} → {adversary:<16} {count:>6,} pairs"
    if not groups:
        yield f"wrote {out / 'manifest.parquet'}; no pair is poisoned, so there is no sheet"
        return
    at = _examples(ready)
    pixels = prepared.pixels_of(recipe, prepared.build_attack(recipe, ready.table), ready.table, None, None)
    captions = ready.table.column("caption").to_pylist()
    contact_sheet(list(pixels.take(at)), [captions[i] for i in at], str(out / "sheet.png"))
    yield f"wrote {out / 'manifest.parquet'} and {out / 'sheet.png'}"


def _examples(ready: prepared.Prepared) -> np.ndarray:
    """Rows of the poisoned table for the sheet: alike many of each part, by hash."""
    stamps = ready.table.column("stamp").to_pylist()
    poison = ready.table.column("poison").to_pylist()
    ids = ready.table.column("id").to_pylist()
    parts: dict[str, list[int]] = {}
    for i, bad in enumerate(poison):
        if bad:
            parts.setdefault(trigger_of(stamps[i]), []).append(i)
    each = max(1, EXAMPLES // len(parts))
    chosen = [rows[k] for rows in parts.values() for k in pick([ids[i] for i in rows], min(each, len(rows)), 0, "sheet")]
    return np.array(chosen)
