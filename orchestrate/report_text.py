"""The words and numbers of a report: tables for a terminal or a paper, one headline sentence, and what to doubt.

Works on results alone (`result.json`: flat names, shares in [0, 1], seconds), so that a sweep, a test or a notebook can use it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrate import journal

Result = Mapping[str, Any]

NAMES = {
    "none": "No defence",
    "clip": "No defence",
    "augmented": "Augmentation only",
    "roclip": "RoCLIP",
    "safeclip": "SafeCLIP",
    "otcclip": "OTCCLIP",
    "cleanclip": "CleanCLIP",
    "hint": "HINT",
}
UNDEFENDED = ("", "none", "clip")
MISSING = "–"
CHANCE = 0.2  # an attack that reaches less than this on the undefended model has hardly taken


@dataclass(frozen=True)
class Success:
    """One attack's success in one run: `hits` of `total` with Wilson's interval, and the floor: without trigger, or of a random order.

    The floor of a targeted attack: other images of the targets' classes.

    `asked`: counted in text→image retrieval, captions for which an image of the attacker's comes first.
    """

    name: str
    share: float
    hits: int | None
    total: int | None
    low: float | None
    high: float | None
    clean: float | None
    backdoor: bool
    asked: bool = False
    chance: float | None = None

    @property
    def count(self) -> str:
        return MISSING if self.hits is None else f"{self.hits}/{self.total}"

    def __str__(self) -> str:
        """`15/16 = 93.8 % [71.7, 98.9], clean 0.0 %`: what a table for a paper prints."""
        text = percent(self.share) if self.hits is None else f"{self.count} = {percent(self.share)}"
        if self.low is not None and self.high is not None:
            text += f" [{100 * self.low:.1f}, {100 * self.high:.1f}]"
        floor = "" if self.chance is None else f", chance {percent(self.chance)}"
        return text + (f", clean {percent(self.clean)}" if self.clean is not None else floor)

    @property
    def floor(self) -> float:
        return self.clean or self.chance or 0.0


def percent(share: Any) -> str:
    """0.938 → "93.8 %"; a dash for what was not measured."""
    value = finite(share)
    return MISSING if value is None else f"{100 * value:.1f} %"


def duration(seconds: Any) -> str:
    """75.2 → "1 m 15 s"; a dash for what was not measured."""
    value = finite(seconds)
    if value is None:
        return MISSING
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} m" if hours else f"{minutes} m {rest:02d} s"


def finite(value: Any) -> float | None:
    """A value as a number, None where it is none, or not finite."""
    number = journal.number(value)
    return number if number is not None and math.isfinite(number) else None


def defence(result: Result) -> str:
    """The defence as a person calls it: `roclip` → RoCLIP, `roclip+mine` → RoCLIP + mine."""
    used = str(result.get("defense") or "none")
    name = " + ".join(NAMES.get(part, part) for part in used.split("+"))
    if removed := finite(result.get("audit/share")):
        audit = f"audit, {100 * removed:.2g} % removed"
        name = audit.capitalize() if used in UNDEFENDED else f"{name} + {audit}"
    return name if attacked(result) else f"{name}, clean data"


def undefended(result: Result) -> bool:
    return str(result.get("defense") or "none") in UNDEFENDED and not finite(result.get("audit/share"))


def attacked(result: Result) -> bool:
    return str(result.get("attack") or "none") != "none"


def labels(results: Sequence[Result]) -> list[str]:
    """A name for each run: its defence, and where two runs share one, the recipe's name and the seed too."""
    names = [defence(result) for result in results]
    for detail in ("recipe", "seed", "identity"):
        twice = {name for name in names if names.count(name) > 1}
        for name in twice:
            mine = [i for i, other in enumerate(names) if other == name]
            if len({str(results[i].get(detail)) for i in mine}) > 1:
                for i in mine:
                    names[i] = f"{name} · {'seed ' if detail == 'seed' else ''}{str(results[i].get(detail))[:40]}"
    return names


def attacks(results: Sequence[Result]) -> list[str]:
    """Names of the attacks measured in any run, in order of appearance, targeted ones first."""
    names: dict[str, None] = {}
    for key in (key for result in results for key in result):
        parts = str(key).split("/")
        if len(parts) == 2 and parts[0] == "asr":
            names[parts[1]] = None
    return sorted(names, key=lambda name: not name.startswith("targeted"))


def success(result: Result, name: str) -> Success | None:
    """How far attack `name` succeeded; None where the run did not measure it."""
    key = f"asr/{name}"
    share = finite(result.get(key))
    if share is None:
        return None
    low, high, clean, hits, total = (finite(result.get(f"{key}/{x}")) for x in ("low", "high", "clean", "hits", "total"))
    k, n = (None, None) if hits is None or total is None else (int(hits), int(total))
    triggered = f"{key}/zscore" in result or f"{key}/accuracy" in result
    asked = f"{key}/minrank" in result
    aimed = name.startswith("targeted") or f"{key}/truth" in result
    backdoor = triggered or (clean is not None and not asked and not aimed)
    return Success(name, share, k, n, low, high, clean, backdoor, asked, finite(result.get(f"{key}/chance")))


def table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of a paper: a row for each run, a column for each attack that any of them measured."""
    names = attacks(results)
    probed = any(finite(result.get("probe/top1")) is not None for result in results)
    found = any(finite(result.get("retrieval/r1")) is not None for result in results)
    head = ["defence", "zero-shot", *(["probe"] if probed else []), *(["retrieval R@1"] if found else [])]
    audited = any(finite(result.get("seconds/audit")) is not None for result in results)
    head += [f"ASR {name}" for name in names] + ["poison", "training", "matching", *(["audit"] if audited else [])]
    rows = []
    for label, result in zip(labels(results), results, strict=True):
        row = [label, percent(result.get("zeroshot/top1"))]
        row += [percent(result.get("probe/top1"))] if probed else []
        row += [percent(result.get("retrieval/r1"))] if found else []
        row += [str(success(result, name) or MISSING) for name in names]
        row += [poison(result), duration(result.get("seconds/train")), duration(result.get("seconds/match"))]
        rows.append([*row, *([duration(result.get("seconds/audit"))] if audited else [])])
    return head, rows


def poison(result: Result) -> str:
    """Count and rate: "680 (14.5 %)"; at small scale the count decides, so it comes first."""
    count = finite(result.get("poison/count"))
    if count is None:
        return MISSING
    rate = finite(result.get("poison/rate"))
    digits = 1 if rate is None or rate >= 0.01 else 3
    return f"{int(count):,}" + (f" ({100 * rate:.{digits}f} %)" if rate is not None else "")


def text_table(results: Sequence[Result]) -> str:
    """The table as aligned plain text, for a terminal."""
    return aligned(*table(results))


def markdown_table(results: Sequence[Result]) -> str:
    """The table in Markdown."""
    return markdown(*table(results))


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as plain text in columns."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    rule = ["─" * width for width in widths]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in [head, rule, *rows])


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def headline(results: Sequence[Result]) -> list[str]:
    """What the numbers say, one plain sentence for each attack and one for accuracy. Computed, never assumed."""
    names = labels(results)
    base = next((i for i, r in enumerate(results) if undefended(r) and attacked(r)), None)
    order = [base] if base is not None else []
    order += [i for i in range(len(results)) if i != base]
    said = []
    for attack in attacks(results):
        measured = [(i, s) for i in order if (s := success(results[i], attack))]
        if measured:
            said.append(_attack_sentence(attack, measured, base, names))
    accuracy = [(i, percent(results[i].get("zeroshot/top1"))) for i in order]
    parts = [f"{value} {_with(i, base, names, plain=True)}" for i, value in accuracy if value != MISSING]
    if parts:
        said.append(f"Zero-shot accuracy: {', '.join(parts)}.")
    return said or ["No results yet: the run has not been evaluated."]


def _attack_sentence(attack: str, measured: list[tuple[int, Success]], base: int | None, names: list[str]) -> str:
    (first, one), *others = measured
    amount = f"{one.hits} of {one.total}" if one.hits is not None else percent(one.share)
    who = "the undefended model" if first == base else f"the model trained with {names[first]}"
    if one.asked:
        text = f"Asked with captions, {who} finds an image of the attack {attack} first for {amount}"
    elif one.backdoor:
        text = f"Shown the {attack} trigger, {who} sees the attacker's class in {amount} images"
    else:
        text = f"{who[0].upper()}{who[1:]} gives {amount} {_targets(attack)} the attacker's label"
    rest = [f"{_with(i, base, names)} {s.count if s.total != one.total else _of(s)}" for i, s in others]
    return "; ".join([text, *rest]) + "."


def _targets(attack: str) -> str:
    return "poisoned images" if attack == "targeted" else f"images attacked by {attack}"


def _of(success: Success) -> str:
    return f"{success.hits} of {success.total}" if success.hits is not None else percent(success.share)


def _with(i: int, base: int | None, names: list[str], plain: bool = False) -> str:
    if i == base:
        return "undefended"
    name = names[i]
    if name.startswith("No defence"):
        return name.replace("No defence, ", "undefended on ").replace("No defence", "undefended")
    return f"with {name[0].lower() + name[1:] if name.startswith('Augmentation') else name}"


def doubts(results: Sequence[Result]) -> list[str]:
    """What keeps these numbers from meaning what they seem to: a weak attack, too few trials."""
    names, said = labels(results), []
    base = next((r for r in results if undefended(r) and attacked(r)), None)
    for attack in attacks(results):
        floor = success(base, attack) if base is not None else None
        if floor is None:
            continue
        if floor.share < max(CHANCE, 2 * floor.floor):
            said.append(
                f"The attack {attack} hardly took on the undefended model ({floor}): low numbers elsewhere prove little. "
                "Raise the poison count before judging a defence."
            )
            continue
        for name, result in zip(names, results, strict=True):
            other = success(result, attack)
            if other is None or result is base or other.high is None or floor.low is None:
                continue
            if other.share < floor.share and other.high >= floor.low:
                said.append(f"{attack}: {name} may be no better than no defence, for their intervals overlap.")
    return said
