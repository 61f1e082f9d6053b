"""The recipe: one typed, frozen tree that says everything a run needs, and the hash that names it.

A recipe is resolved from layers (defaults, a named recipe, the command line), each a flat mapping of dotted paths:
`{"defense": "roclip", "defense.every": 2, "train.lr": "1e-3"}`. Values may be text; the field's type decides how it is read.
The same dotted path is the override, the sweep axis, the MLflow parameter and the report's axis.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, get_type_hints

from orchestrate import plugins
from orchestrate.secrets import credentials, masked
from orchestrate.values import coerce

DROP = 0.01  # share of the pairs that an audit gives up by default
MOST_PIXELS = 178_956_970  # Pillow refuses larger images itself, so a larger bound would be none
MOST_EPOCHS = 100_000  # what is planned goes through every epoch; no run has a use for so many
AUDIT = "audit"  # as data.exclude: by an audit that the run makes itself, first


@dataclass(frozen=True)
class Data:
    """Which pairs. `path`: "scenes" (built in), or a file, folder, glob or object-store URI."""

    path: str = "scenes"
    size: int | float = 0  # training pairs kept, by hash: a count, a share, 0 = all (scenes: 4,000)
    heldout: int | float = 1000  # held-out pairs: a count or a share
    captions: Literal["auto", "given", "every", "made"] = "auto"  # every: each caption of a training image is a pair, not the first alone
    classes: tuple[str, ...] = ()  # evaluation classes; empty = from labels or caption nouns
    templates: tuple[str, ...] = ()  # zero-shot prompts with {}
    image_column: str = ""
    caption_column: str = ""
    side: int = 0  # side in px of the stored square images; 0 = the model's
    max_bad: float = 0.01  # share of corrupt images and empty captions tolerated
    max_pixels: int = 64_000_000  # images larger than this are refused unread; at most 178,956,970, the decoder's own bound
    stream: Literal["auto", "always", "never"] = "auto"  # decode on the fly instead of once
    memory_gb: float = 8.0  # stream=auto: decoded sets above this stream
    seed: int = 0  # of selection and made captions
    cache: str = "~/.cache/antidote"  # where generated sets are kept
    exclude: str = ""  # train without the most suspicious pairs of an audit: its scores.parquet, or "audit": the run makes one first
    drop: int | float = DROP  # of them so many: a count, or a share of the audited pairs; 0 = none

    def __post_init__(self) -> None:
        _above(self, 0, "max_pixels")
        _most(self, MOST_PIXELS, "max_pixels")
        _least(self, 0, "side", "memory_gb", "seed", "drop")
        if self.drop != DROP and not self.exclude:
            raise ValueError(f"data.drop={self.drop}: say by which audit, as data.exclude={AUDIT} or data.exclude=…/scores.parquet.")
        if credentials(self.path):
            raise ValueError(
                f"data.path={masked(self.path)}: keep keys out of recipes, which are logged; set them in the environment of each node "
                "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, …) or give the nodes a role."
            )


@dataclass(frozen=True)
class Model:
    name: str = "tiny-rn"  # ours (models/configs) or any open_clip architecture
    image_size: int = 0  # px; 0 = the architecture's
    channels_last: bool = True


@dataclass(frozen=True)
class Train:
    epochs: int = 16
    batch: int = 128  # global: over all workers
    lr: float = 1e-3
    warmup: int = 50  # optimiser steps of linear warm-up, then cosine to 0
    weight_decay: float = 0.1  # none on norms, biases and the logit scale
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 0.0  # gradient norm bound; 0 = none
    accumulate: int = 1  # micro-batches a step; the contrastive batch stays the global one
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"

    def __post_init__(self) -> None:
        _above(self, 0, "epochs", "batch", "accumulate", "lr", "eps")
        _most(self, MOST_EPOCHS, "epochs")
        _least(self, 0, "warmup", "weight_decay", "clip_norm", "beta1", "beta2")
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise ValueError(f"train.{name}={getattr(self, name)}: must be below 1.")
        if self.batch % self.accumulate:
            raise ValueError(f"train.batch={self.batch} does not divide into train.accumulate={self.accumulate} micro-batches.")


@dataclass(frozen=True)
class Evaluate:
    every: int = 0  # epochs between evaluations; 0 = only after the last
    batch: int = 256
    probe: bool = True  # linear probe after the last epoch
    probe_size: int = 5000  # training pairs the probe is fitted on
    precision: Literal["fp32", "bf16"] = "bf16"

    def __post_init__(self) -> None:
        _above(self, 0, "batch", "probe_size")
        _least(self, 0, "every")


@dataclass(frozen=True)
class Cluster:
    """Where it runs. Nothing here changes what a run computes (sums over more workers differ in rounding only)."""

    address: str = ""  # "" = this machine; "auto" or host:port = a running cluster
    workers: int = 1  # training workers
    min_workers: int = 0  # fewest to go on with where nodes are lost (spot), back to `workers` when they return; 0 = always `workers`
    cpus: float = 1.0  # a worker
    gpus: float = 0.0  # a worker
    threads: int = 0  # torch threads a worker; 0 = the node's cores ÷ workers
    match_actors: int = 1
    match_cpus: float = 0.5  # an actor
    match_gpus: float = 0.0  # an actor
    match_batch: int = 512  # images a call
    readers: int = 2  # parallel decoding tasks
    max_failures: int = 3  # worker-group restarts from the last checkpoint
    timeout_s: float = 1800.0  # longest wait for one matching round or one read, then an error that says what it waited for
    runs: str = "runs"  # run directories and the default tracking store
    storage: str = ""  # s3://…, gs://… or a folder that all nodes reach: checkpoints and a copy of the run; "" = its directory
    storage_retry_s: float = 120.0  # how long storage that fails is tried again, then an error

    def __post_init__(self) -> None:
        _above(self, 0, "workers", "cpus", "match_actors", "match_batch", "readers", "timeout_s", "storage_retry_s")
        _least(self, 0, "gpus", "threads", "match_cpus", "match_gpus", "min_workers")
        if self.min_workers > self.workers:
            raise ValueError(f"cluster.min_workers={self.min_workers} is above cluster.workers={self.workers}: give at most as many.")

    @property
    def least(self) -> int:
        """Training workers without which a run does not start."""
        return self.min_workers or self.workers


@dataclass(frozen=True)
class Track:
    uri: str = ""  # "" = sqlite:///<runs>/mlflow.db; http://… = a server; "none" = metrics.jsonl only
    experiment: str = ""  # "" = the recipe's name
    report: bool = True  # write report.html at the end


@dataclass(frozen=True)
class Plugin:
    """A method: `use` as written ("targeted+stripes", "roclip"; of "./mine.py:KeepTop" the path is made absolute), its configured parts."""

    use: str
    parts: tuple[tuple[str, Any], ...]

    def as_dict(self) -> dict[str, Any]:
        if len(self.parts) == 1:
            return {"use": self.use, **dataclasses.asdict(self.parts[0][1])}
        return {"use": self.use, **{name: dataclasses.asdict(part) for name, part in self.parts}}


@dataclass(frozen=True)
class Recipe:
    name: str = "run"
    seed: int = 0
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    attack: Plugin | None = None
    defense: Plugin | None = None
    evaluate: Evaluate = field(default_factory=Evaluate)
    cluster: Cluster = field(default_factory=Cluster)
    track: Track = field(default_factory=Track)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.+-]*", self.name):
            raise ValueError(f"name={self.name!r}: it names the run's directory, so letters, digits, '.', '_', '+' and '-' only.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: must be 0 or more, and below 2^63.")

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values; `from_dict` of it is the same recipe."""
        tree: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Plugin):
                tree[f.name] = value.as_dict()
            elif dataclasses.is_dataclass(value) and not isinstance(value, type):
                tree[f.name] = dataclasses.asdict(value)
            else:
                tree[f.name] = value
        return json.loads(json.dumps(tree))

    @property
    def identity(self) -> str:
        """Hash of everything that changes numbers: 16 hex digits. Cluster, tracking and the recipe's name do not.

        A method from a file, and an audit's scores, count by the file's content, not by where it lies.
        """
        tree = self.as_dict()
        for method in METHODS:
            if (plugin := getattr(self, method)) is not None:
                uses = zip(_split(plugin.use), plugin.parts, strict=True)
                tree[method]["use"] = "+".join(plugins.source(use, type(part)) for use, (_, part) in uses)
        for key in ("name", "cluster", "track"):
            del tree[key]
        del tree["data"]["cache"]
        if self.data.exclude:
            tree["data"]["exclude"] = AUDIT if self.data.exclude == AUDIT else _content(self.data.exclude)
        else:  # so that runs without an audit keep the identities they had before there were any
            del tree["data"]["exclude"], tree["data"]["drop"]
        text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def directory(self) -> str:
        """Name of the run's directory: <recipe>-<hash8>."""
        return f"{self.name}-{self.identity[:8]}"


SECTIONS: dict[str, type] = {
    "data": Data, "model": Model, "train": Train, "evaluate": Evaluate, "cluster": Cluster, "track": Track,
}  # fmt: skip
LEAD = {"data": "path", "model": "name"}  # `data=PATH` is short for `data.path=PATH`
METHODS = ("attack", "defense")


@dataclass(frozen=True)
class Resolved:
    recipe: Recipe
    origins: dict[str, str]  # dotted path → the layer its value came from


def resolve(name: str, layers: Sequence[tuple[str, Mapping[str, Any]]]) -> Resolved:
    """Layers, later ones winning, → a recipe. ValueError on an unknown key, a bad value or an impossible combination."""
    chosen: dict[str, tuple[Any, str]] = {}
    for origin, layer in layers:
        for key in sorted(layer, key=lambda key: key not in METHODS):  # a layer's own options belong to the method it names
            value = layer[key]
            if key in METHODS and key in chosen and str(chosen[key][0]) != str(value):
                for former in [k for k in chosen if k.startswith(key + ".")]:  # another method: the former one's options are gone
                    del chosen[former]
            chosen.pop(key, None)  # the last given is the last in order
            chosen[key] = (value, origin)
    uses = {m: _use(chosen.get(m, ("none", ""))[0]) for m in METHODS}
    methods = {m: _parts(m, use) for m, use in uses.items()}
    known = dict(_paths(methods))
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {path: "default" for path in known}
    for key, (value, origin) in chosen.items():
        path = _find(key, known, methods)
        if path in tree and origins[path] == origin:
            raise ValueError(f"{path} is given twice: as {key} and by its other name.")
        tree[path] = value if path in METHODS else coerce(value, known[path], path)
        if path == "data.exclude" and tree[path] not in ("", AUDIT):
            tree[path] = os.path.abspath(os.path.expanduser(tree[path]))  # a sweep's trials run in folders of their own
        origins[path] = origin
    recipe = Recipe(
        name=str(tree.get("name", name)),
        seed=tree.get("seed", 0),
        attack=_plugin("attack", uses["attack"], methods["attack"], tree),
        defense=_plugin("defense", uses["defense"], methods["defense"], tree),
        **{s: _build(cls, s, tree) for s, cls in SECTIONS.items()},
    )
    return Resolved(recipe, origins)


def from_dict(tree: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Resolved:
    """A recipe.json, strictly: unknown keys are errors. Keys that only describe (identity, antidote) are left out."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"a recipe is a JSON object with sections such as data and train, not a {type(tree).__name__}.")
    flat = {k: v for k, v in flatten(tree).items() if k not in ("identity", "antidote")}
    return resolve(str(tree.get("name", "run")), [("recipe.json", flat), ("command line", overrides or {})])


def packed(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain values for another process, with the text of its methods' files, which that machine may not have."""
    used = [getattr(recipe, method) for method in METHODS if getattr(recipe, method) is not None]
    return {"recipe": recipe.as_dict(), "files": plugins.texts(use for plugin in used for use in _split(plugin.use))}


def unpacked(tree: Mapping[str, Any]) -> Recipe:
    """The recipe that `packed` took apart."""
    plugins.receive(tree["files"])
    return from_dict(tree["recipe"]).recipe


def field_at(key: str, attack: str | None, defense: str | None) -> tuple[str, Any]:
    """A key as typed → (its whole dotted path, its field's type) in a recipe with these methods. ValueError: unknown, with a suggestion."""
    methods = {m: _parts(m, _use(use)) for m, use in (("attack", attack), ("defense", defense))}
    known = dict(_paths(methods))
    path = _find(key, known, methods)
    return path, known[path]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested plain values → dotted paths. A method's `use` becomes the method's own key; None becomes "none"."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            if "use" in value:
                flat[path] = value["use"]
                value = {k: v for k, v in value.items() if k != "use"}
            flat.update(flatten(value, path + "."))
        else:
            flat[path] = "none" if value is None and path in METHODS else value
    return flat


def parse_overrides(words: Sequence[str]) -> dict[str, str]:
    """`["defense.every=1", …]` → mapping. ValueError for a word without `=` and for a key given twice."""
    found: dict[str, str] = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign or not key:
            raise ValueError(f"{word!r} is no override: write key=value, such as defense.every=1.")
        if key in found:
            raise ValueError(f"{key} is given twice ({found[key]!r} and {value!r}).")
        found[key] = value
    return found


def _content(path: str) -> str:
    """A hash of a file's content; of its path where there is none, for a recipe can be named whose run will be refused."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except (OSError, ValueError):  # ValueError: a path with a null byte, which no file has
        return f"no file {path}"


def _use(value: Any) -> str | None:
    return None if value in (None, "none", "") else "+".join(map(plugins.absolute, _split(str(value))))


def _split(use: str) -> list[str]:
    return use.split("+")


def _parts(kind: str, use: str | None) -> tuple[tuple[str, type], ...]:
    """The classes that `use` names, loaded; a part is called by its name, or by its class where it comes from a file or module."""
    parts = tuple((name.rpartition(":")[2], plugins.load(kind, name)) for name in _split(use)) if use else ()
    if kind == "defense" and len(parts) > 1:
        raise ValueError(f"defense={use}: a run has one defence, only attacks are joined by +.")
    if len({name for name, _ in parts}) < len(parts):
        raise ValueError(f"{kind}={use}: two parts have one name.")
    return parts


def _paths(methods: Mapping[str, tuple[tuple[str, type], ...]]) -> Iterator[tuple[str, Any]]:
    """Every valid dotted path with its type."""
    yield from (("name", str), ("seed", int), ("attack", str), ("defense", str))
    for section, cls in SECTIONS.items():
        yield from _fields(cls, section)
    for method, parts in methods.items():
        for name, cls in parts:
            yield from _fields(cls, method if len(parts) == 1 else f"{method}.{name}")


def _fields(cls: type, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = _hints(cls)
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _fields(hint, f"{prefix}.{f.name}")
        else:
            yield f"{prefix}.{f.name}", hint


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _find(key: str, known: Mapping[str, Any], methods: Mapping[str, tuple[tuple[str, type], ...]]) -> str:
    key = f"{key}.{LEAD[key]}" if key in LEAD else key
    if key in known:
        return key
    method, _, rest = key.partition(".")
    part, _, option = rest.partition(".")
    if method in METHODS and [part] == [name for name, _ in methods[method]] and f"{method}.{option}" in known:
        return f"{method}.{option}"  # attack.targeted.copies where `targeted` is the only part
    if method in METHODS and rest and not methods[method]:
        raise ValueError(f"unknown key {key!r}: this recipe has no {method}. Name one first, such as {method}={plugins.names(method)[0]}.")
    raise ValueError(f"unknown key {key!r}. {_hint(key, list(known))}")


def _hint(key: str, known: Sequence[str]) -> str:
    """What may have been meant: by the last word of the key, in its own section first."""
    section, word = key.partition(".")[0], key.rpartition(".")[2]
    own = [k for k in known if k.startswith(section + ".")]
    for some in (own, known):
        words = get_close_matches(word, sorted({k.rpartition(".")[2] for k in some}))
        if close := [k for w in words for k in some if k.rpartition(".")[2] == w]:
            return f"Did you mean {' or '.join(close[:3])}?"
    return f"There are {', '.join(own)}." if own else f"Top-level keys: name, seed, attack, defense, {', '.join(SECTIONS)}."


def _build(cls: type, prefix: str, tree: Mapping[str, Any]) -> Any:
    hints = _hints(cls)
    values: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        hint, path = hints[f.name], f"{prefix}.{f.name}"
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            values[f.name] = _build(hint, path, tree)
        elif path in tree:
            values[f.name] = tree[path]
        elif f.default is f.default_factory is dataclasses.MISSING:
            raise ValueError(f"{path} has no default: give it, as {path}=….")
    try:
        return cls(**values)
    except ValueError as error:
        known = str(error).startswith(f"{prefix}.")  # our own sections say their name; a method knows its fields only
        raise ValueError(str(error) if known else f"{prefix}.{error}" if re.match(r"\w+=", str(error)) else f"{prefix}: {error}") from None


def _plugin(method: str, use: str | None, parts: tuple[tuple[str, type], ...], tree: Mapping[str, Any]) -> Plugin | None:
    if use is None:
        return None
    built = tuple((name, _build(cls, method if len(parts) == 1 else f"{method}.{name}", tree)) for name, cls in parts)
    return Plugin(use, built)


def _above(config: Any, bound: int, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > bound:
            raise ValueError(f"{type(config).__name__.lower()}.{name}={getattr(config, name)}: must be above {bound}.")


def _least(config: Any, bound: int, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= bound:
            raise ValueError(f"{type(config).__name__.lower()}.{name}={getattr(config, name)}: must be {bound} or more.")


def _most(config: Any, bound: int, *names: str) -> None:
    for name in names:
        if not getattr(config, name) <= bound:
            raise ValueError(f"{type(config).__name__.lower()}.{name}={getattr(config, name)}: must be {bound:,} or less.")
