"""One self-contained HTML page for one run or several: what happened, how sure that is, what was poisoned, how to repeat it.

The page opens offline and loads nothing: its own content policy forbids it. Everything that comes from data (captions, class
names, ids, paths) is escaped by the template. What a run has not left (no gallery, no results yet) is left out, not guessed.

    runs/roclip-1a2b3c4d/  recipe.json  metrics.jsonl  result.json  gallery.parquet  plans.parquet  data.json   →   report.html
"""

from __future__ import annotations

import base64
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrate import journal, pages
from orchestrate.mlflow_uri import masked
from orchestrate.report_text import (
    Success,
    attacks,
    doubts,
    duration,
    finite,
    headline,
    labels,
    markdown_table,
    percent,
    poison,
    success,
    text_table,
    undefended,
)

__all__ = ["headline", "markdown_table", "save_plots", "text_table", "write_report"]

CARDS, CAPTIONS, PAIRS, CLEAN, ROUNDS = (
    24,
    3,
    8,
    4,
    4,
)  # shown at most: of each kind, a card, a run, a run, before "more"
SKILLS = {"zero-shot": "zeroshot/top1", "linear probe": "probe/top1", "retrieval R@1": "retrieval/r1"}
FILES = ("recipe.json", "result.json", "metrics.jsonl")
IMAGES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp", b"GIF8": "gif"}


@dataclass(frozen=True)
class Run:
    """A run directory as read: every part may be empty."""

    folder: str
    recipe: Mapping[str, Any]
    result: Mapping[str, Any]
    data: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    gallery: Sequence[Mapping[str, Any]]
    plans: Sequence[Mapping[str, Any]] = ()
    label: str = ""
    color: str = ""

    @property
    def rounds(self) -> list[Mapping[str, Any]]:
        return [record for record in self.records if record.get("kind") == "match"]


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the page for these runs, the undefended one first. `out` is a file, or a folder that gets `report.html`.

    ValueError where a directory is no run.
    """
    out = Path(out)
    out = out / "report.html" if out.is_dir() or not out.suffix else out
    return pages.write(out, "page.html", _content(_read(run_dirs)), percent=percent, duration=duration)


def save_plots(run_dirs: Sequence[Path], folder: Path) -> list[Path]:
    """The page's figures as PDF and PNG for a paper. The files written."""
    from orchestrate import report_plots

    Path(folder).mkdir(parents=True, exist_ok=True)
    return report_plots.save(_series(_read(run_dirs)), Path(folder))


def _read(run_dirs: Sequence[Path]) -> list[Run]:
    """The runs with their labels and colours, undefended ones first, else in the order given."""
    from orchestrate.report_plots import PALETTE

    if not run_dirs:
        raise ValueError("No runs to report on: name at least one run directory.")
    runs = sorted((_read_run(Path(folder)) for folder in run_dirs), key=lambda run: not undefended(run.result))
    names = labels([run.result for run in runs])
    red, *others = PALETTE  # red is for the undefended model, and only for it
    palette = iter((others * len(runs))[: len(runs)])
    colors = [red if undefended(run.result) else next(palette) for run in runs]
    return [replace(run, label=name, color=color) for run, name, color in zip(runs, names, colors, strict=True)]


def _read_run(folder: Path) -> Run:
    if not any((folder / name).exists() for name in FILES):
        raise ValueError(f"{folder} is no run directory: it has none of {', '.join(FILES)}.")
    recipe, result, data = (_json(folder / name) for name in ("recipe.json", "result.json", "data.json"))
    known = {name: (recipe.get(name) or {}).get("use", "none") for name in ("attack", "defense")} if recipe else {}
    known |= {"recipe": recipe.get("name", folder.name), "seed": recipe.get("seed"), "identity": recipe.get("identity")}
    gallery, plans = (_rows(folder / name) for name in ("gallery.parquet", "plans.parquet"))
    return Run(folder.resolve().name, recipe, known | result, data, journal.read(folder / journal.NAME), gallery, plans)


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file; none where there is no file."""
    if not path.exists():
        return []
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none. ValueError where it is broken."""
    if not path.exists():
        return {}
    try:
        tree = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): restore it, or leave this run out.") from error
    return tree if isinstance(tree, dict) else {}


def _content(runs: Sequence[Run]) -> dict[str, Any]:
    """What the template shows."""
    from markupsafe import Markup

    from orchestrate import report_plots

    results, series = [run.result for run in runs], _series(runs)
    figures = {"outcome": report_plots.outcome(series), "curves": report_plots.curves(series)}
    return {
        "title": " · ".join(dict.fromkeys(str(run.result.get("recipe") or run.folder) for run in runs)),
        "headline": headline(results),
        "doubts": [*doubts(results), *_different(runs), *_after_robust(runs)],
        "facts": _facts(runs[0]),
        "attacks": attacks(results),
        "rows": [_row(run, attacks(results)) for run in runs],
        "skills": [name for name, key in SKILLS.items() if any(finite(r.get(key)) is not None for r in results)],
        "figures": {name: Markup(svg) if svg else None for name, svg in figures.items()},  # drawn, and escaped, by us
        "matching": [_matching(run) for run in runs if run.rounds],
        "selections": [{"run": run, "epochs": epochs} for run in runs if (epochs := _selections(run))],
        "repairs": [repair for run in runs if (repair := _repair(run))],
        "poisons": next((cards for run in runs if (cards := _poisons(run))), []),
        "quality": [{"run": run, "rounds": rounds} for run in runs if (rounds := _quality(run))],
        "plans": [{"run": run} | drawn for run in runs if (drawn := _plans(run))],
        "pairs": [{"run": run, "groups": groups} for run in runs if (groups := _pairs(run))],
        "provenance": [_provenance(run) for run in runs],
    }


def _series(runs: Sequence[Run]) -> list[Any]:
    from orchestrate.report_plots import Series

    names = attacks([run.result for run in runs])
    return [
        Series(
            run.label,
            run.color,
            {name: success(run.result, name) for name in names},
            {name: finite(run.result.get(key)) for name, key in SKILLS.items()},
            run.records,
        )
        for run in runs
    ]


def _row(run: Run, names: Sequence[str]) -> dict[str, Any]:
    """One line of the main table."""
    count, _, rate = poison(run.result).partition(" ")
    return {
        "run": run,
        "skills": {name: percent(run.result.get(key)) for name, key in SKILLS.items()},
        "successes": [_bar(success(run.result, name)) for name in names],
        "poison": [count, rate.strip("()")],
        "train": duration(run.result.get("seconds/train")),
        "others": {"matching": duration(run.result.get("seconds/match")), "audit": duration(run.result.get("seconds/audit"))},
    }


def _bar(success: Success | None) -> dict[str, Any] | None:
    """A table cell: the numbers, and the places on a bar from 0 to 100 where they lie."""
    if success is None:
        return None
    low, high = (success.share if x is None else x for x in (success.low, success.high))
    level = "low" if high < 0.35 else "high" if success.share >= 0.5 else "middle"
    return {"s": success, "share": percent(success.share), "low": 100 * low, "high": 100 * high, "level": level}


def _matching(run: Run) -> dict[str, Any]:
    """The table of a run's matching rounds; a matcher reports a mean similarity or a mean distance."""
    measure = next((key for key in ("similarity", "distance") if any(key in r for r in run.rounds)), "distance")
    return {"run": run, "measure": f"mean {measure}", "rounds": [_round(record, measure) for record in run.rounds]}


def _round(record: Mapping[str, Any], measure: str) -> dict[str, Any]:
    """One line of that table."""
    count = {key: finite(record.get(key)) for key in ("epoch", "pairs", "pool", "poisoned")}
    share = {key: finite(record.get(key)) for key in ("moved", "poisoned_kept", "clean_kept")}
    close = finite(record.get(measure))
    counts = {key: _number(value) for key, value in count.items()}
    return counts | share | {"closeness": _number(close, 2), "seconds": duration(record.get("seconds"))}


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}" if digits else f"{int(value):,}"


def _selections(run: Run) -> list[dict[str, Any]]:
    """One line for each split into safe pairs and others."""
    return [
        {key: _number(finite(record.get(key))) for key in ("epoch", "pairs", "safe", "poisoned")}
        | {key: finite(record.get(key)) for key in ("share", "poison_in_safe", "poisoned_safe")}
        | {f"cosine_{key}": _number(finite(record.get(f"cosine/{key}")), 2) for key in ("clean", "poisoned")}
        for record in run.records
        if record.get("kind") == "select"
    ]


def _repair(run: Run) -> dict[str, Any] | None:
    """What was measured right before a repair, and at its end; None for a run without one."""
    first = next((record["epoch"] for record in run.records if record.get("repair")), None)
    if first is None:
        return None
    measured = [record for record in run.records if record.get("kind") == "eval"]
    before, after = ([r for r in measured if (r["epoch"] >= first) == repaired] for repaired in (False, True))
    if not before or not after:
        return None
    names = attacks([run.result])
    stages = [
        {"name": f"{name} (epoch {int(record['epoch'])})", "zero_shot": percent(record.get("zeroshot/top1"))}
        | {"successes": [_bar(success(record, attack)) for attack in names]}
        for name, record in (("before the repair", before[-1]), ("after it", after[-1]))
    ]
    return {"run": run, "attacks": names, "stages": stages}


def _quality(run: Run) -> list[dict[str, Any]]:
    """How good the pool's nearest captions were in the first and the last round, by each matcher tried; the best of a round marked."""
    measured = [record for record in run.rounds if any(key.startswith("quality/") for key in record)]
    rounds = []
    for record in measured[:1] + measured[1:][-1:]:
        names = sorted({key.split("/")[1] for key in record if key.startswith("quality/")})
        shares = {kind: [finite(record.get(f"quality/{name}/{kind}")) for name in names] for kind in ("clean", "poisoned")}
        best = {kind: max((x for x in some if x is not None), default=None) for kind, some in shares.items()}
        lines = [
            {"name": name} | {kind: {"share": some[k], "best": len(names) > 1 and some[k] == best[kind]} for kind, some in shares.items()}
            for k, name in enumerate(names)
        ]
        rounds.append({"epoch": int(record["epoch"]), "pool": finite(record.get("pool")), "lines": lines})
    return rounds


def _plans(run: Run) -> dict[str, Any] | None:
    """Transport plans with their images; None where the run has none."""
    from orchestrate import report_plans

    plans = [row for row in run.plans if _image(row["png"])]
    drawn = report_plans.shown(plans, [str(name) for name in run.data.get("classes") or []])
    for pair in drawn["pairs"] if drawn else ():
        pair["image"] = _image(pair["png"])
    return drawn


def _different(runs: Sequence[Run]) -> list[str]:
    """Runs that were not given the same poison cannot be compared line by line."""
    attacked = [run.recipe for run in runs if run.recipe.get("attack")]
    parts = {
        name: len({json.dumps(recipe.get(name), sort_keys=True) for recipe in attacked})
        for name in ("attack", "data", "model", "train", "seed")
    }
    unlike = [name for name, values in parts.items() if values > 1]
    return [f"These runs differ in more than the defence ({', '.join(unlike)}): compare with care."] if unlike else []


def _after_robust(runs: Sequence[Run]) -> list[str]:
    """Right after a robust epoch the cosine of image and text can be collapsed for an epoch."""
    from orchestrate.report_plots import losses

    last = {run.label: (loss := losses(run.records)) and list(loss.values())[-1][1] for run in runs}
    names = [name for name, robust in last.items() if robust]
    said = f"{' and '.join(names)}: measured right after a robust epoch, where accuracy can dip for an epoch."
    return [said] if names else []


def _facts(run: Run) -> list[tuple[str, str]]:
    """The line under the title."""
    data, recipe = run.data, run.recipe
    source = (recipe.get("data") or {}).get("path") or run.result.get("data")
    train = finite(data.get("train"))
    pairs = f", {int(train):,} pairs" if train is not None else ""
    facts = {
        "attack": str(run.result.get("attack") or "none").replace("+", " + "),
        "poison": poison(run.result),
        "data": f"{Path(str(source)).name}{pairs}" if source else "–",
        "model": str((recipe.get("model") or {}).get("name", "–")),
        "epochs": str(run.result.get("epochs") or (recipe.get("train") or {}).get("epochs", "–")),
        "seed": str(run.result.get("seed", "–")),
    }
    return [(name, value) for name, value in facts.items() if value not in ("–", "None")]


def _poisons(run: Run) -> list[dict[str, Any]]:
    """Poisoned images, a card for each image and what it is meant to become, with some of its captions; grouped by attack."""
    cards: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in run.gallery:
        if row.get("section") != "poison" or not (image := _image(row.get("png"))):
            continue
        kind, stamp = row.get("kind") or "poison", row.get("stamp") or ""
        before = _image(row.get("original_png"))
        shown = {**row, "image": image, "before": before if before != image else None, "captions": []}
        card = cards.setdefault((kind, stamp, image, row.get("adversary")), shown)
        card["captions"].append(row.get("caption") or "")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for (kind, stamp, *_), card in cards.items():
        captions = list(dict.fromkeys(card["captions"]))
        card |= {"captions": captions[:CAPTIONS], "more": max(0, len(captions) - CAPTIONS)}
        groups.setdefault((kind, stamp), []).append(card)
    heads = [{"kind": kind, "stamp": stamp} for kind, stamp in groups]
    return [head | {"cards": some[:CARDS], "total": len(some)} for head, some in zip(heads, groups.values(), strict=True)]


def _pairs(run: Run) -> list[dict[str, Any]]:
    """Pairs before and after matching: poisoned ones, a few of each kind of poison, then clean ones."""
    matched = [row for row in run.gallery if row.get("rounds") and _image(row.get("png"))]
    poisoned = _spread([row for row in matched if row.get("section") == "poison"], PAIRS)
    clean = [row for row in matched if row.get("section") == "clean"][:CLEAN]
    groups = [("Poisoned pairs", poisoned, "adversary"), ("Clean pairs", clean, "truth")]
    return [
        {"title": title, "cards": [_pair(row, str(row.get(field) or ""), run) for row in rows], "field": field}
        for title, rows, field in groups
        if rows
    ]


def _spread(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """`count` rows, taking turns between kinds of poison and, within a kind, between images."""
    turns: dict[Any, int] = {}
    order = []
    for i, row in enumerate(rows):
        kind = (row.get("kind"), row.get("stamp"))
        seen = turns[(kind, row.get("png"))] = turns.get((kind, row.get("png")), -1) + 1
        nth = turns[kind] = turns.get(kind, -1) + 1
        order.append((seen, nth, i))
    return [rows[i] for *_, i in sorted(order)[:count]]


def _pair(row: Mapping[str, Any], name: str, run: Run) -> dict[str, Any]:
    """One pair and the captions it learned from; `names` says whether a caption names class `name`."""
    from orchestrate.pairing import named_classes

    classes = list(run.data.get("classes") or [])
    classes += [name] if name and name not in classes else []
    rounds = [dict(one) for one in row["rounds"]]
    named = named_classes([str(one.get("caption") or "") for one in rounds], classes)
    for one, some in zip(rounds, named, strict=True):
        one["names"] = name in {classes[i] for i in some}
        one["similarity"] = finite(one.get("similarity"))
    return {
        "row": row,
        "image": _image(row.get("png")),
        "name": name,
        "first": rounds[:ROUNDS],
        "rest": rounds[ROUNDS:],
    } | {
        "kept": sum(one["names"] for one in rounds),
        "rounds": rounds,
    }


def _image(content: Any) -> str | None:
    """Image bytes as a data URI, None where they are no image that a browser shows."""
    content = bytes(content or b"")
    kind = next((kind for magic, kind in IMAGES.items() if content.startswith(magic)), None)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}" if kind else None


def _provenance(run: Run) -> dict[str, Any]:
    """What a reader needs to run it again and to see that it is the same."""
    result = run.result
    versions = dict(result.get("versions") or {}) if isinstance(result.get("versions"), Mapping) else {}
    versions |= {key.removeprefix("versions/"): value for key, value in result.items() if key.startswith("versions/")}
    seconds = {key.removeprefix("seconds/"): duration(value) for key, value in result.items() if key.startswith("seconds/")}
    recipe = {key: value for key, value in run.recipe.items() if key != "identity"}
    return {
        "run": run,
        "command": f"antidote run {shlex.quote(os.path.join('runs', run.folder, 'recipe.json'))}",
        "identity": run.recipe.get("identity") or result.get("identity") or "–",
        "recipe": masked(json.dumps(recipe, indent=2, ensure_ascii=False)),
        "versions": sorted(versions.items()),
        "seconds": seconds,
        "fingerprint": run.data.get("fingerprint") or "–",
        "quarantined": run.data.get("quarantined"),
        "train": run.data.get("train"),
        "heldout": run.data.get("heldout"),
        "sentences": [str(line) for line in run.data.get("report") or []],
        "classes": [str(name) for name in run.data.get("classes") or []],
    }
