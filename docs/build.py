"""The generated parts of the docs: a page for each method, reference tables, excerpts of the command line, tables of results.

    python docs/build.py                        write what is stale
    python docs/build.py --check                write nothing; exit code 1 and the files' names where something is stale
    python docs/build.py --collect demo RUN…    make docs/results/demo.json from finished runs, then write
    python docs/build.py --sweep pool RUN… --by defense.pool_size,…    make docs/sweeps/pool.json from runs or sweeps, then write
    python docs/build.py --matrix scenes RUN…   make docs/matrices/scenes.json from runs or sweeps, then write; --add to what it has
    python docs/build.py --audits scenes OUT…   make docs/audits/scenes.json from the folders of audits, then write

A file of results is {"title", "command", "note", "results": [result.json, …]}; without the runs' directories and without folders of
data sets, so that no path of anybody's machine is published. Collecting again keeps title, command and note unless they are given.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from orchestrate import cli, compare, compare_matrix, measure, plugins, recipes, report_plots, scaffold  # noqa: E402
from orchestrate.recipe import SECTIONS  # noqa: E402
from orchestrate.report_text import Result, attacks, defence, doubts, duration, headline, markdown_table, poison  # noqa: E402

DOCS = ROOT / "docs"
RESULTS, SWEEPS, MATRICES, AUDITS, METHODS = (DOCS / name for name in ("results", "sweeps", "matrices", "audits", "methods"))
PICTURE = DOCS / "demo.png"
BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
LABELS = ("Paper", "Source", "Threat model", "Assumes", "Success", "Cost", "Limits")
SHOWN = ("roclip-badnets", "attack.count=100", "defense.every=1")
SHARES = {"zeroshot/top1": "zero-shot", "probe/top1": "probe", "retrieval/r1": "retrieval R@1"}
MANY = 24  # identities that one line may hold
KINDS = {"attack": "attack", "defense": "defence"}


# --- a method's card: its docstring ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Card:
    """What one class's docstring says: its first paragraph, labelled facts, and a line for each field it explains."""

    summary: str
    facts: dict[str, str]
    fields: dict[str, str]


def card(cls: type) -> Card:
    """The card of this class alone. ValueError for a line that is neither a label's nor a field's."""
    names = {f.name for f in dataclasses.fields(cls)}
    summary, _, body = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")
    found: dict[str, str] = {}
    keys: list[str] = []
    for line in body.splitlines():
        head, sign, rest = line.strip().partition(": ")
        words = [word.strip() for word in head.split(",")]
        if sign and (head in LABELS or names.issuperset(words)):
            keys = [head] if head in LABELS else words
            found |= dict.fromkeys(keys, rest)
        elif line.startswith("Parameters") or "see `" in line or not line.strip():
            keys = []  # a heading, or a pointer to the class below, whose card follows
        elif keys and line.startswith(" "):
            found |= {key: f"{found[key]} {line.strip()}" for key in keys}
        else:
            raise ValueError(f"{cls.__module__}.{cls.__name__}: the card's line {line!r} is no label ({', '.join(LABELS)}) and no field.")
    facts = {label: found[label] for label in LABELS if label in found}
    return Card(" ".join(summary.split()), facts, {name: text for name, text in found.items() if name in names})


def lineage(cls: type) -> list[type]:
    """The class and what it builds on, nearest first, of methods only."""
    bases = [base for base in cls.__mro__ if dataclasses.is_dataclass(base)]
    return bases if len(bases) == 1 else [base for base in bases if base.__name__ != "Defense"]


def whole_card(cls: type) -> Card:
    """The card with what it leaves to the classes below: missing facts and fields; limits add up."""
    cards = [card(base) for base in lineage(cls)]
    facts: dict[str, str] = {}
    for label in LABELS:
        said = [c.facts[label] for c in cards if label in c.facts]
        if said:
            facts[label] = " ".join(map(_sentence, said)) if label == "Limits" else _sentence(said[0])
    fields = {}
    for field in dataclasses.fields(cls):
        said = [c.fields[field.name] for c in cards if field.name in c.fields]
        if not said:
            raise ValueError(f"{cls.__module__}.{cls.__name__}: its docstring has no line for the field {field.name!r}.")
        fields[field.name] = said[0]
    return Card(cards[0].summary, facts, fields)


def methods() -> Iterator[tuple[str, str, type]]:
    """(kind, name, class) of every built-in attack and defence."""
    for kind, table in plugins.BUILT_IN.items():
        for name in table:
            yield kind, name, plugins.load(kind, name)


def method_page(kind: str, name: str, cls: type) -> str:
    said, source = whole_card(cls), Path(inspect.getfile(cls)).relative_to(ROOT)
    facts = dict(said.facts)
    if trigger := getattr(cls, "trigger", None):
        facts["Trigger"] = f"Stage: {trigger.stage}. Varies: {trigger.varies}. Range: {trigger.clamp}."
    lines = [f"<!-- Written by docs/build.py from the docstring of {cls.__name__}: edit it there. -->", "", f"# {name} ({KINDS[kind]})", ""]
    lines += [said.summary, ""]
    if facts:
        lines += [*table(["", ""], [[f"**{label}**", linked(text)] for label, text in facts.items()]), ""]
    lines += ["## Fields", ""]
    if said.fields:
        joined = f", or `{kind}.{name}.FIELD` where attacks are joined by `+`" if kind == "attack" else ""
        lines += [f"Set them as `{kind}.FIELD=…`{joined}.", ""]
        rows = [[f"`{f.name}`", kind_of(cls, f.name), f"`{plain(f.default)}`", said.fields[f.name]] for f in dataclasses.fields(cls)]
        lines += table(["field", "type", "default", "meaning"], rows)
    else:
        lines += ["None."]
    known = recipes.METHODS if kind == "defense" else recipes.ATTACKS
    stem = "clip-" if kind == "attack" else ""
    ready = [(f"antidote run {stem}{recipe}", part.shows) for recipe, part in known.items() if part.layer.get(kind) == name]
    width = max((len(command) for command, _ in ready), default=0)
    runs = [f"{command:<{width}}    # {shows}" for command, shows in ready] or [f"antidote run clip {kind}={name}"]
    lines += ["", "## Use", "", "```sh", *runs, "```", "", f"Code: [`{source}`](../../{source})."]
    return "\n".join(lines) + "\n"


def kind_of(cls: type, name: str) -> str:
    """A field's type in words."""
    hint = get_type_hints(cls)[name]
    if get_origin(hint) is Literal:
        return " or ".join(f"`{option}`" for option in get_args(hint))
    if get_origin(hint) is tuple:
        return f"list of {get_args(hint)[0].__name__}"
    return str(getattr(hint, "__name__", hint) if not get_args(hint) else hint).replace(" | None", "").replace(" | ", " or ")


def plain(value: Any) -> str:
    """A default as one would write it in an override."""
    if isinstance(value, float):
        return f"{value:.4g}" if value != int(value) else str(value)
    return {"": '""', (): "[]"}.get(value) or cli._value(value)


def linked(text: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def escaped(text: str) -> str:
    """`<` outside of code, where a reader of Markdown would take it for a tag."""
    return "`".join(part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(text.split("`")))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    clean = [[escaped(" ".join(cell.split())).replace("|", "\\|") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in [list(head), ["---"] * len(head), *clean]]


# --- blocks ---------------------------------------------------------------------------------------------------------------------


def block_methods() -> list[str]:
    rows = []
    for kind, name, cls in methods():
        facts = whole_card(cls).facts
        paper = re.search(r"arXiv \d{4}\.\d{4,5}", facts.get("Source", facts.get("Paper", "")))
        rows.append([f"[{name}](docs/methods/{name}.md)", KINDS[kind], card(cls).summary, linked(paper[0]) if paper else "–"])
    return table(["name", "kind", "what it does", "paper"], rows)


def block_recipes() -> list[str]:
    rows = [["method", f"`{name}`", part.shows] for name, part in recipes.METHODS.items()]
    rows += [["attack", f"`{name}`{' (default)' * (name == recipes.ATTACK)}", part.shows] for name, part in recipes.ATTACKS.items()]
    rows += [
        ["scale", f"`{name}`{' (default)' * (name == recipes.SCALE)}", f"{scale.shows}; {scale.time}"]
        for name, scale in recipes.SCALES.items()
    ]
    rows += [["suite", f"`{name}`", f"{shows} ({', '.join(members)})"] for name, (shows, members, _) in recipes.SUITES.items()]
    return table(["part", "name", "what it shows"], rows)


def said_by(*words: str) -> list[str]:
    """What the command line prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = cli.main(words)
    assert code == 0, f"antidote {' '.join(words)} failed"
    return out.getvalue().rstrip().splitlines()


def block_ls() -> list[str]:
    return ["```text", "$ antidote ls", *said_by("ls"), "```"]


def block_show() -> list[str]:
    """Head, what differs from the defaults, resources."""
    lines = said_by("show", *SHOWN)
    [one] = cli.resolved(SHOWN[0], SHOWN[1:])
    told = [line for line in lines[1:-1] if one.origins.get(line.split()[0], "default") != "default"]
    return ["```text", f"$ antidote show {' '.join(SHOWN)}", lines[0], *told, "  … (every other key, at its default)", lines[-1], "```"]


def block_verbs() -> list[str]:
    [verbs] = [action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction)]
    lines: list[str] = []
    for name, parser in verbs.choices.items():
        actions = [action for action in parser._actions if action.dest != "help"]
        told = (parser.description or "").rpartition("…: ")[2]
        lines += [f"### `antidote {' '.join([name, *map(_usage, actions)])}`", "", _sentence(told), ""]
        rows = [f"- `{_usage(a).strip('[]')}`: {_help(a)}" for a in actions if not a.choices]
        lines += [*map(escaped, rows), ""] if rows else []
    return lines[:-1]


def _help(action: argparse.Action) -> str:
    """As argparse shows it: there `%%` stands for `%`."""
    return (action.help or f"default: {action.default}").replace("%%", "%")


def _usage(action: argparse.Action) -> str:
    if action.option_strings:
        value = "" if action.nargs == 0 else f" {action.dest.upper()}"
        return f"[{action.option_strings[0]}{value}]"
    name = "|".join(action.choices) if action.choices else str(action.metavar or action.dest.upper())
    return {"*": f"[{name} …]", "+": f"{name} …"}.get(str(action.nargs), name)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def block_keys() -> list[str]:
    """Every recipe key with its type, default and the comment beside it in the source."""
    lines: list[str] = []
    for section, cls in SECTIONS.items():
        comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))
        said = cls.__doc__ or ""
        lines += [f"### {section}", "", *([said, ""] if not said.startswith(f"{cls.__name__}(") else [])]
        rows = [
            [f"`{section}.{f.name}`", kind_of(cls, f.name), f"`{plain(f.default)}`", comments.get(f.name, "")]
            for f in dataclasses.fields(cls)
        ]
        lines += [*table(["key", "type", "default", "meaning"], rows), ""]
    return lines[:-1]


def block_example() -> list[str]:
    return ["```python", *scaffold.source("defense", "keep_top")[1].rstrip().splitlines(), "```"]


def block_attack() -> list[str]:
    return ["```python", *scaffold.source("attack", "frame")[1].rstrip().splitlines(), "```"]


def block_columns() -> list[str]:
    from orchestrate.data import parquet, rows, tables

    names = {
        "image bytes (Parquet)": ("data.image_column", parquet.IMAGES),
        "image path (CSV, TSV, Parquet)": ("data.image_column", tables.PATHS),
        "caption": ("data.caption_column", rows.CAPTIONS),
        "class number": ("", rows.LABELS),
        "class name": ("", rows.CLASSES),
        "sample id": ("", rows.IDS),
    }
    body = [[what, ", ".join(f"`{n}`" for n in some), f"`{key}`" if key else "–"] for what, (key, some) in names.items()]
    return table(["what", "names looked for, in this order, in any case", "or name it"], body)


def block_demo() -> list[str]:
    picture = ["![The same poisoned pairs learnt four ways: attack success and accuracy](docs/demo.png)", ""] if PICTURE.exists() else []
    file = RESULTS / "demo.json"
    return picture + (result_section(read_results(file), level=0) if file.exists() else [missing("demo")])


def block_results() -> list[str]:
    files = sorted(RESULTS.glob("*.json"), key=lambda file: (file.stem != "demo", file.stem))
    lines: list[str] = []
    for file in files:
        lines += [*result_section(read_results(file), level=2), ""]
    return lines[:-1] or [missing("demo")]


def block_sweeps() -> list[str]:
    """For each file of a sweep: a row for each setting."""

    def rows(found: Mapping[str, Any], runs: list[compare.Run]) -> str:
        names = [*compare.metrics(runs), "seconds/match", "match/quality/cosine/clean"]
        names = [name for name in names if any(measure.value(run.result, name) is not None for run in runs)]
        return compare.table(compare.group(runs, found["by"]), names, "markdown")

    return of_runs(SWEEPS, rows) or ["*No sweeps here yet: `python docs/build.py --sweep NAME RUN…` puts them in.*"]


def block_matrices() -> list[str]:
    """For each file of a matrix: attacks × defences, below its picture."""

    def rows(found: Mapping[str, Any], runs: list[compare.Run]) -> str:
        picture = f"![Attack success by attack and defence](matrices/{found['name']}.png)\n\n"
        return picture + compare_matrix.table(compare_matrix.arranged(runs), "markdown")

    return of_runs(MATRICES, rows) or ["*No matrix here yet: `python docs/build.py --matrix NAME RUN…` puts one in.*"]


def of_runs(folder: Path, rows: Callable[[Mapping[str, Any], list[compare.Run]], str]) -> list[str]:
    """A section for each file of runs in the folder, around the table that `rows` makes of it."""
    lines: list[str] = []
    for file in sorted(folder.glob("*.json")):
        found = read_json(file) | {"name": file.stem}
        runs = kept_runs(found)
        lines += [f"## {found['title']}", "", "```sh", found["command"], "```", ""]
        lines += [*rows(found, runs).splitlines(), "", found["note"], "", f"*{origin([run.result for run in runs])}*", ""]
    return lines[:-1]


def kept_runs(found: Mapping[str, Any]) -> list[compare.Run]:
    """The runs that a file keeps (`told_at`)."""
    return [compare.Run(Path(), run["at"], run["result"]) for run in found["runs"]]


def block_audits() -> list[str]:
    """For each file of audits: tables of AUROC, average precision and what 1 % finds; what a set without poison shows."""
    lines: list[str] = []
    for file in sorted(AUDITS.glob("*.json")):
        found = json.loads(file.read_text())
        lines += [f"### {found['title']}", "", *([found["note"], ""] if found["note"] else [])]
        planted = [
            (f, part, m) for f in found["audits"] for part, m in f.get("measured", {}).items() if part != "all" or len(f["measured"]) == 1
        ]
        for what, key in (("AUROC", "auroc"), ("average precision", "average_precision"), ("found at 1 % removed", "recall")):
            if planted:
                lines += [f"**{what}**", "", *_audit_table(planted, key), ""]
        clean = [f for f in found["audits"] if not f.get("measured")]
        if clean:
            lines += [
                f"**{f['data']} without poison:** {f['removed']} of {f['pairs']:,} pairs left out, all honest; {_shared(f)}." for f in clean
            ]
            lines += [""]
    return lines[:-1] or ["*No results here yet: `python docs/build.py --audits NAME OUT…` puts them in.*"]


def _audit_table(planted: Sequence[tuple[Mapping[str, Any], str, Mapping[str, Any]]], key: str) -> list[str]:
    names = list(dict.fromkeys(name for _, _, scores in planted for name in scores))
    rows = []
    for facts, part, scores in planted:
        first = scores["combined"]
        attack = facts["attack"] if part == "all" else f"{part} (of {facts['attack']})"
        most = f", of {100 * first['ceiling']:.0f} % possible" if key == "recall" else ""
        rows.append([f"{facts['data']}, {attack}", f"{first['poison']} of {first['pairs']:,}{most}"])
        rows[-1] += [f"{100 * scores[n][key]:.0f} %" if key == "recall" else f"{scores[n][key]:.3f}" if n in scores else "–" for n in names]
    return table(["set, attack", "poison", *names], rows)


def _shared(facts: Mapping[str, Any]) -> str:
    said = ", ".join(f"{word} ({here} of {of})" for word, here, of in facts["words"][:3])
    region = facts["region"]
    where = (
        f"a region is marked in their images ({region[2] - region[0]} × {region[3] - region[1]} px)" if region else "no region is marked"
    )
    return (f"the words they share most: {said}; " if said else "no word stands out; ") + where


def missing(name: str) -> str:
    return f"*No results here yet: `python docs/build.py --collect {name} RUN…` puts them in.*"


def result_section(found: Mapping[str, Any], level: int) -> list[str]:
    """Title, command, table, what the numbers say and what to doubt, and where they come from."""
    results: list[Result] = found["results"]
    lines = [f"{'#' * level} {found['title']}", ""] if level else []
    lines += ["```sh", found["command"], "```", ""] if level and found["command"] else []
    repeated = len({str(r.get("seed")) for r in results}) > 1
    lines += [*(seeds_table(results) if repeated else markdown_table(results).splitlines()), ""]
    lines += quality_table(results) if level else []
    if level and not repeated:
        lines += [f"- {text}" for text in headline(results)] + [f"- Doubt: {text}" for text in doubts(results)] + [""]
    lines += [found["note"], ""] if found["note"] else []
    return [*lines, f"*{origin(results)}*"]


def seeds_table(results: Sequence[Result]) -> list[str]:
    """A row for each defence: means over the seeds with their 95 % intervals (`compare.Estimate`), and all hits of all trials."""
    names = attacks(results)
    shares = [m for m in SHARES if any(m in r for r in results)]
    head = ["defence", "seeds", *(SHARES[m] for m in shares), *(f"ASR {name}" for name in names), "poison", "training", "matching"]
    rows = []
    for label, runs in by_defence(results).items():
        mean = lambda metric, runs=runs: compare.cell(compare.estimate(runs, metric), metric)
        row = [label, str(len(runs)), *map(mean, shares)]
        for name in names:
            floor = f", clean {mean(f'asr/{name}/clean')}" if any(f"asr/{name}/clean" in run.result for run in runs) else ""
            row.append(f"{mean(f'asr/{name}')}{floor}")
        seconds = [[float(run.result.get(f"seconds/{kind}", 0)) for run in runs] for kind in ("train", "match")]
        rows.append([*row, poison(runs[0].result), *(duration(sum(some) / len(some)) for some in seconds)])
    return table(head, rows)


def by_defence(results: Sequence[Result]) -> dict[str, list[compare.Run]]:
    """The runs of each defence, in order of appearance, as `compare.estimate` takes them."""
    found: dict[str, list[compare.Run]] = {}
    for result in results:
        found.setdefault(defence(result), []).append(compare.Run(Path(), {"seed": result["seed"]}, result))
    return found


def quality_table(results: Sequence[Result]) -> list[str]:
    """What the pool's nearest captions of the last round say, by cosine and by transport on the same features; means over the runs."""
    asked = {"poisoned": "poisoned pairs freed of the adversary's class", "clean": "clean pairs that keep their own class"}
    found = [(f"{what}, by {way}", f"match/quality/{way}/{kind}") for kind, what in asked.items() for way in ("cosine", "transport")]
    rows = []
    for label, runs in by_defence([r for r in results if any(key in r for _, key in found)]).items():
        rows.append([label, *(compare.cell(compare.estimate(runs, key), key) for _, key in found)])
    return ["**Nearest captions of the last round**", "", *table(["defence", *(name for name, _ in found)], rows), ""] if rows else []


def origin(results: Sequence[Result]) -> str:
    """Where figures come from; of many runs the identities stand in the file only."""

    def each(key: str) -> str:
        found = dict.fromkeys(str(r[key]) for r in results if key in r)
        return f"{len(found)} of them" if len(found) > MANY else ", ".join(found) or "–"

    versions = ", ".join(f"{name} {each(f'versions/{name}')}" for name in ("torch", "ray", "python"))
    return f"Data {each('data')}; epochs {each('epochs')}; seed {each('seed')}; identity {each('identity')}; {versions}."


def read_results(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_text())
    if not isinstance(found, dict) or set(found) != {"title", "command", "note", "results"}:
        raise ValueError(f"{file} is not {{title, command, note, results}}: write it with --collect.")
    return found


BLOCKS: dict[str, Callable[[], list[str]]] = {
    name.removeprefix("block_"): call for name, call in list(globals().items()) if name.startswith("block_")
}


# --- files ----------------------------------------------------------------------------------------------------------------------


def filled(text: str) -> str:
    """The text with every generated block as it should be."""

    def fill(block: re.Match[str]) -> str:
        if block[2] not in BLOCKS:
            raise ValueError(f"no generated block is called {block[2]!r}; there are {', '.join(BLOCKS)}.")
        return block[1] + "\n".join(BLOCKS[block[2]]()) + "\n" + block[3]

    return BLOCK.sub(fill, text)


def wanted() -> dict[Path, str]:
    """Every file with generated content → its text as it should be."""
    pages = {METHODS / f"{name}.md": method_page(kind, name, cls) for kind, name, cls in methods()}
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
    return pages | {file: filled(file.read_text()) for file in found}


def stale(files: Mapping[Path, str]) -> list[Path]:
    """Files that are not as they should be, and pages of methods that are gone."""
    changed = [file for file, text in files.items() if not file.exists() or file.read_text() != text]
    return changed + [file for file in METHODS.glob("*.md") if file not in files]


def collect(name: str, runs: Sequence[Path], title: str | None, command: str | None, note: str | None, add: bool = False) -> Path:
    """docs/results/NAME.json from run directories. With `add` its other results stay."""
    file = RESULTS / f"{name}.json"
    results = [published(json.loads((run / "result.json").read_text())) for run in runs]
    if add and file.exists():
        results = joined(read_results(file)["results"], results, lambda result: result.get("identity"))
    return kept(file, {"title": title, "command": command, "note": note}, {"results": results}, read_results)


def joined(before: Sequence[dict[str, Any]], now: list[dict[str, Any]], identity: Callable[[dict[str, Any]], Any]) -> list[dict[str, Any]]:
    """What was there and is not given anew, then what is."""
    fresh = {identity(one) for one in now}
    return [old for old in before if identity(old) not in fresh] + now


def read_json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def kept(
    file: Path, words: Mapping[str, str | None], content: Mapping[str, Any], read: Callable[[Path], dict[str, Any]] = read_json
) -> Path:
    """Write a file of results: its content anew, of its words those that are given (not None); the others stay as they were, or empty."""
    before = read(file) if file.exists() else dict.fromkeys(words, "") | {"title": file.stem}
    given = {key: value for key, value in words.items() if value is not None}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({**before, **given, **content}, indent=1, ensure_ascii=False) + "\n")
    return file


def published(result: dict[str, Any]) -> dict[str, Any]:
    """A result without the paths of somebody's machine."""
    return {key: value for key, value in result.items() if key != "run"} | {"data": Path(str(result.get("data", ""))).name}


def collect_sweep(name: str, folders: Sequence[Path], by: str, title: str | None, command: str | None, note: str | None) -> Path:
    """docs/sweeps/NAME.json from runs and sweeps; by: the paths that make a row, by comma, "" = all that varies but the seed."""
    runs = compare.load(folders)
    paths = [compare.check_path(path, runs) for path in by.split(",")] if by else compare.varying(runs)
    told = [told_at(run, paths) for run in runs]
    return kept(SWEEPS / f"{name}.json", {"title": title, "command": command, "note": note}, {"by": paths, "runs": told})


def told_at(run: compare.Run, paths: Sequence[str]) -> dict[str, Any]:
    """A run as a file keeps it: its values in the paths, its seed and its result."""
    return {"at": {path: run.at(path) for path in paths} | {"seed": run.seed}, "result": published(dict(run.result))}


def collect_matrix(name: str, folders: Sequence[Path], title: str | None, command: str | None, note: str | None, add: bool) -> Path:
    """docs/matrices/NAME.json and its heat map from runs and sweeps. With `add` its other runs stay: it is made in parts."""
    file = MATRICES / f"{name}.json"
    runs = compare.load(folders)
    told = [told_at(run, [path for path in run.flat if path.startswith(("attack.", "defense."))]) for run in runs]
    if add and file.exists():
        told = joined(read_json(file)["runs"], told, lambda run: run["result"]["identity"])
    kept(file, {"title": title, "command": command, "note": note}, {"runs": told})
    report_plots.on_paper(compare_matrix.picture, compare_matrix.arranged(kept_runs({"runs": told})), file.with_suffix(""), ["png"])
    return file


def collect_audits(name: str, folders: Sequence[Path], title: str | None, note: str | None) -> Path:
    """docs/audits/NAME.json from the folders of audits."""
    audits = [json.loads((folder / "audit.json").read_text()) for folder in folders]
    for facts in audits:
        facts.pop("report", None)
        facts["data"] = Path(str(facts["data"])).name
    return kept(AUDITS / f"{name}.json", {"title": title, "note": note}, {"audits": audits})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The generated parts of the docs.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where something is stale")
    parser.add_argument("--collect", metavar="NAME", help="make docs/results/NAME.json from the runs")
    parser.add_argument("--sweep", metavar="NAME", help="make docs/sweeps/NAME.json from the runs and sweeps")
    parser.add_argument("--by", default="", help="of the sweep: what makes a row, by comma (default: all that varies but the seed)")
    parser.add_argument("--matrix", metavar="NAME", help="make docs/matrices/NAME.json from runs and sweeps")
    parser.add_argument("--add", action="store_true", help="of results or the matrix: keep the runs that it has and that are not given")
    parser.add_argument("--audits", metavar="NAME", help="make docs/audits/NAME.json from folders of audits")
    for key in ("title", "command", "note"):
        parser.add_argument(f"--{key}", help="of the collected results")
    parser.add_argument("runs", nargs="*", type=Path, help="run directories to collect")
    args = parser.parse_args(argv)
    if args.add and not (args.collect or args.matrix):
        parser.error("--add is for --collect and --matrix")
    if args.collect:
        print(f"wrote {collect(args.collect, args.runs, args.title, args.command, args.note, args.add).relative_to(ROOT)}")
    if args.sweep:
        made = collect_sweep(args.sweep, args.runs, args.by, args.title, args.command, args.note)
        print(f"wrote {made.relative_to(ROOT)}")
    if args.matrix:
        made = collect_matrix(args.matrix, args.runs, args.title, args.command, args.note, args.add)
        print(f"wrote {made.relative_to(ROOT)}")
    if args.audits:
        print(f"wrote {collect_audits(args.audits, args.runs, args.title, args.note).relative_to(ROOT)}")
    files = wanted()
    for file in stale(files):
        if args.check:
            print(f"stale: {file.relative_to(ROOT)}", file=sys.stderr)
        elif file in files:
            file.parent.mkdir(exist_ok=True)
            file.write_text(files[file])
            print(f"wrote {file.relative_to(ROOT)}")
        else:
            file.unlink()
            print(f"removed {file.relative_to(ROOT)}")
    if args.check and stale(files):
        print("refresh with: python docs/build.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
