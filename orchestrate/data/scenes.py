"""The built-in **scenes** set: procedural pictures with compositional captions, made once, without any download.

A scene is one main object (its class is the label), up to two smaller objects, and a background. All classes share
one palette, so only the shape tells the class. A caption always names the class of the main object and may add its
colour, size, place, background and neighbours; whatever a caption says is true of the picture.

Everything is a pure function of ``(seed, i)``: the same pair gives the same bytes in every run and process.
"""

import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from orchestrate.data.scene_art import BACKGROUNDS, DRAWINGS, PALETTE, RGB, Array, paint_background, tone_rgb

CLASSES: tuple[str, ...] = tuple(DRAWINGS)
VERSION = 2  # part of every random stream: raise it with any change to pictures or captions
HELDOUT_FIRST = 1_000_000_000  # held-out scenes are numbered from here, so train and held-out never share a stream
MOST = 10_000_000  # of a split: hours of drawing on any machine
ROW_GROUP = 1_000
SUPERSAMPLING = 3
MAX_WORDS = 18

MAIN_SIDE = (0.48, 0.75)  # longest extent of the main object, as a share of the image side
OTHER_SIDE = (0.17, 0.25)
OTHERS = (0.5, 0.35, 0.15)  # shares of scenes that try for 0, 1 and 2 secondary objects
SMALL_BELOW, LARGE_ABOVE = 0.57, 0.66  # between the two a caption gives no size word
LEFT_BELOW, RIGHT_ABOVE = 0.43, 0.57  # centre of the main object; the same bounds part upper, middle and lower

PHRASES: tuple[str, ...] = (
    "{it} {place}",
    "{it} {ground}",
    "{it} {near}",
    "{it} {place}, {near}",
    "there is {it} {place}",
    "there is {it} {ground}",
    "this is {it}",
    "we see {it} here",
    "a photo of {it}",
    "a photo of {it} {ground}",
    "a picture of {it}",
    "a picture of {it} {near}",
    "an image showing {it} {place}, {ground}",
    "a drawing of {it}",
    "a scene with {it} {near}, {ground}",
    "{ground}, {it} {near}",
    "{place} there is {it}",
    "look at {it} {near}",
    "{it} can be seen {place}",
    "here {ground} we find {it} {near}",
)
COLOR_SHOWN = 0.5  # of captions tell the main object's colour, where a phrase has room for it

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.binary()),  # PNG bytes
        ("caption", pa.string()),
        ("label", pa.int32()),  # index into CLASSES
        ("class", pa.string()),
    ]
)
FILES = ("train.parquet", "test.parquet", "classnames.json")


@dataclass(frozen=True)
class Thing:
    """One object of a scene; ``centre`` (x, y) and ``extent`` (its longer side) are shares of the image side."""

    name: str
    color: str
    centre: tuple[float, float]
    extent: float


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture, its caption and what it is made of. image (S, S, 3) uint8; mask (S, S) bool, true on the main object.

    ``size`` is small, medium or large; ``position`` is centre, or one or two of upper, lower, left, right.
    """

    image: NDArray[np.uint8]
    caption: str
    label: int
    mask: NDArray[np.bool_]
    main: Thing
    size: str
    position: str
    background: str
    others: tuple[Thing, ...]


def scene(seed: int, i: int, side: int = 64) -> Scene:
    """Scene number ``i`` of the set drawn from ``seed``; from ``HELDOUT_FIRST`` on, classes come in strict turn."""
    if seed < 0 or i < 0 or side < 32:
        raise ValueError(f"scene needs seed >= 0, i >= 0 and side >= 32, got {seed}, {i}, {side}")
    rng = np.random.default_rng((seed, i, VERSION))
    label = int(rng.integers(len(CLASSES)))
    if i >= HELDOUT_FIRST:
        label = i % len(CLASSES)
    background = _pick(rng, tuple(BACKGROUNDS))
    main, others = _compose(rng, CLASSES[label], background)
    canvas = Image.fromarray(paint_background(rng, background, side))
    for other in others:
        _draw(rng, canvas, other)
    mask = _draw(rng, canvas, main)
    size = "small" if main.extent < SMALL_BELOW else "large" if main.extent > LARGE_ABOVE else "medium"
    position = _position(main.centre)
    caption = _caption(rng, main, size, position, background, others)
    return Scene(np.asarray(canvas), caption, label, mask, main, size, position, background, others)


def scene_index(identifier: str) -> int:
    """The ``i`` of :func:`scene` for a row's id, so that its mask can be had again: scene-test-000005 and the like."""
    match = re.fullmatch(r"scene-(train|test)-(\d+)", identifier)
    if match is None:
        raise ValueError(f"{identifier!r} is no id of the scenes set; give one like scene-train-000123")
    return int(match[2]) + (HELDOUT_FIRST if match[1] == "test" else 0)


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _compose(rng: np.random.Generator, name: str, background: str) -> tuple[Thing, tuple[Thing, ...]]:
    """The main object and 0 to 2 others that neither touch it nor one another, all inside the picture."""
    colors = tuple(c for c in PALETTE if c not in BACKGROUNDS[background].avoid)
    extent = float(rng.uniform(*MAIN_SIDE))
    x, y = rng.uniform(extent / 2, 1 - extent / 2, 2)
    main = Thing(name, _pick(rng, colors), (float(x), float(y)), extent)
    placed = [main]
    for _ in range(int(rng.choice(3, p=OTHERS))):
        taken = {thing.name for thing in placed}
        other, color = _pick(rng, tuple(c for c in CLASSES if c not in taken)), _pick(rng, colors)
        extent = float(rng.uniform(*OTHER_SIDE))
        # A large main object may leave no room: then the scene has one object fewer.
        for x, y in rng.uniform(extent / 2, 1 - extent / 2, (12, 2)):
            apart = (max(abs(x - t.centre[0]), abs(y - t.centre[1])) > (extent + t.extent) / 2 for t in placed)
            if all(apart):
                placed.append(Thing(other, color, (float(x), float(y)), extent))
                break
    return main, tuple(placed[1:])


def _pose(rng: np.random.Generator, parts: list[Array], extent: float) -> list[Array]:
    """``parts`` flipped, stretched and turned at random, then centred on 0 with ``extent`` as their longer side."""
    angle = np.radians(rng.uniform(-20, 20))
    flip, stretch = rng.choice((-1.0, 1.0)), rng.uniform(0.88, 1.14)
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.array([[cos, sin], [-sin, cos]]) * np.array([[flip * stretch], [1 / stretch]])
    turned = [points @ matrix for points in parts]
    low = np.min([points.min(axis=0) for points in turned], axis=0)
    high = np.max([points.max(axis=0) for points in turned], axis=0)
    return [(points - (low + high) / 2) * (extent / (high - low).max()) for points in turned]


def _draw(rng: np.random.Generator, canvas: Image.Image, thing: Thing) -> NDArray[np.bool_]:
    """Draw ``thing`` onto ``canvas`` with a dark rim and smooth edges; return its mask (S, S), true from half cover."""
    side, drawing = canvas.width, DRAWINGS[thing.name]
    rim = 2.0  # in supersampled pixels; kept inside the extent so that nothing leaves the picture
    extent = thing.extent * side * SUPERSAMPLING
    parts = _pose(rng, [points for points, _ in drawing], extent - rim)
    jitter = rng.integers(-10, 11, 3)
    red, green, blue = (int(np.clip(c + j, 0, 255)) for c, j in zip(PALETTE[thing.color], jitter, strict=True))
    rgb: RGB = (red, green, blue)
    dark = tone_rgb(rgb, 0.3)
    left, top = (int(side * c - thing.extent * side / 2) for c in thing.centre)
    tile_side = int(thing.extent * side) + 2
    offset = np.array([side * c * SUPERSAMPLING for c in thing.centre]) - np.array([left, top]) * SUPERSAMPLING
    # Transparent pixels hold the rim's colour: averaging then never pulls a foreign colour into an edge.
    tile = Image.new("RGBA", (tile_side * SUPERSAMPLING,) * 2, (*dark, 0))
    pen = ImageDraw.Draw(tile)
    outlines = [[(float(x), float(y)) for x, y in points + offset] for points in parts]
    for outline in outlines:
        pen.line([*outline, outline[0]], fill=(*dark, 255), width=2 * int(rim) - 1)
    for outline, (_, tone) in zip(outlines, drawing, strict=True):
        pen.polygon(outline, fill=(*tone_rgb(rgb, tone), 255))
    tile = tile.reduce(SUPERSAMPLING)
    canvas.paste(tile, (left, top), tile)
    cover = Image.new("L", canvas.size)
    cover.paste(tile.getchannel("A"), (left, top))
    return np.asarray(cover) >= 128


def _position(centre: tuple[float, float]) -> str:
    x, y = centre
    row = "upper" if y < LEFT_BELOW else "lower" if y > RIGHT_ABOVE else ""
    column = "left" if x < LEFT_BELOW else "right" if x > RIGHT_ABOVE else ""
    return f"{row} {column}".strip() or "centre"


def _place(rng: np.random.Generator, position: str) -> str:
    """Words for ``position``: 'in the upper left', 'on the right', 'at the top' and the like."""
    single = {
        "upper": ("at the top", "in the upper half"),
        "lower": ("at the bottom", "in the lower half"),
        "left": ("on the left", "on the left side"),
        "right": ("on the right", "on the right side"),
        "centre": ("in the middle", "in the centre"),
    }
    corner = position.replace("upper", "top").replace("lower", "bottom")
    return _pick(rng, single.get(position, (f"in the {position}", f"in the {corner} corner")))


def _noun(*words: str) -> str:
    """A noun phrase with its article: 'a red fish', 'an orange cup'."""
    phrase = " ".join(word for word in words if word)
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _near(rng: np.random.Generator, main: Thing, others: tuple[Thing, ...]) -> str:
    """How the main object stands to the others: 'above a blue key', or 'with a blue key and a star nearby'."""
    if not others:
        return ""
    nouns = [_noun(other.color if rng.random() < 0.75 else "", other.name) for other in others]
    if len(others) == 2 and rng.random() < 0.5:
        return f"with {nouns[0]} and {nouns[1]}"
    which = int(rng.integers(len(others)))
    dx, dy = (m - o for m, o in zip(main.centre, others[which].centre, strict=True))
    across = "left of" if dx < 0 else "right of"
    relation = across if abs(dx) > abs(dy) else "above" if dy < 0 else "below"
    return f"{_pick(rng, (relation, relation, 'near', 'with'))} {nouns[which]}"


def _caption(rng: np.random.Generator, main: Thing, size: str, position: str, background: str, others: tuple[Thing, ...]) -> str:
    """One true caption of 4 to ``MAX_WORDS`` words; size and colour of the main object are sometimes left out."""
    shown_size = size if size != "medium" and rng.random() < 0.6 else ""
    words = {
        "it": _noun(shown_size, main.color if rng.random() < COLOR_SHOWN else "", main.name),
        "place": _place(rng, position),
        "ground": _pick(rng, BACKGROUNDS[background].phrases),
        "near": _near(rng, main, others),
    }
    phrase = _pick(rng, PHRASES)
    for dropped in ("", "place", "ground"):
        text = phrase.format(**(words | ({dropped: ""} if dropped else {})))
        text = re.sub(r"\s+", " ", text).replace(" ,", ",").replace(",,", ",").strip(" ,")
        if len(text.split()) <= MAX_WORDS:
            break
    return text if len(text.split()) >= 4 else f"{text} {words['ground']}"


def _rows(seed: int, side: int, split: str, span: tuple[int, int]) -> pa.Table:
    """Rows ``span[0]`` up to ``span[1]`` of a split, as a table of ``SCHEMA``."""
    columns: dict[str, list[object]] = {name: [] for name in SCHEMA.names}
    for number in range(*span):
        identifier = f"scene-{split}-{number:06d}"
        made = scene(seed, scene_index(identifier), side)
        png = io.BytesIO()
        Image.fromarray(made.image).save(png, "PNG", compress_level=1)
        row = (identifier, png.getvalue(), made.caption, made.label, CLASSES[made.label])
        for name, value in zip(SCHEMA.names, row, strict=True):
            columns[name].append(value)
    return pa.table(columns, SCHEMA)


def _tables(seed: int, side: int, split: str, count: int, workers: int) -> Iterator[pa.Table]:
    spans = [(start, min(start + ROW_GROUP, count)) for start in range(0, count, ROW_GROUP)]
    rows = partial(_rows, seed, side, split)
    if min(workers, len(spans)) <= 1:
        yield from map(rows, spans)
        return
    with ProcessPoolExecutor(min(workers, len(spans))) as pool:
        yield from pool.map(rows, spans)


def _recipe(seed: int, side: int, split: str, count: int) -> dict[bytes, bytes]:
    made_from = {"version": VERSION, "seed": seed, "side": side, "split": split, "count": count}
    return {b"scenes": json.dumps(made_from, sort_keys=True).encode()}


def _holds(folder: Path, recipes: dict[str, dict[bytes, bytes]]) -> bool:
    """Whether ``folder`` holds the complete set of ``recipes``; ValueError for another set or other files in it."""
    if not all((folder / name).is_file() for name in FILES):
        strangers = sorted(path.name for path in folder.iterdir() if path.name not in FILES) if folder.is_dir() else []
        if strangers:
            raise ValueError(f"{folder} holds other files ({', '.join(strangers[:3])}); give a folder of its own")
        return False
    for split, recipe in recipes.items():
        try:
            found = pq.read_schema(folder / f"{split}.parquet").metadata or {}
        except pa.ArrowInvalid:  # cut short while it was written or copied
            return False
        if found.get(b"scenes") != recipe[b"scenes"]:
            raise ValueError(
                f"{folder} holds another scenes set ({found.get(b'scenes', b'unknown').decode()}, wanted "
                f"{recipe[b'scenes'].decode()}); give another folder or delete this one"
            )
    return True


def generate(
    folder: Path,
    train: int,
    heldout: int,
    seed: int = 0,
    side: int = 64,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
) -> Path:
    """Write the scenes set into ``folder`` and return it; a complete set that is already there is left as it is.

    Writes train.parquet and test.parquet (columns of ``SCHEMA``, row groups of 1,000, zstd) and classnames.json into
    a temporary folder beside ``folder``, which takes its name only when all is written: a half-made set never counts.

    ``heldout`` scenes come balanced over the classes; ``progress(done, total)`` counts scenes, once per row group;
    ``workers`` defaults to the number of CPUs. About 1 ms per scene and core.

    Raises ValueError for counts below 1 or above ``MOST`` and for a folder that holds anything else.
    """
    if train < 1 or heldout < 1:
        raise ValueError(f"a scenes set needs at least one train and one held-out scene, got {train} and {heldout}")
    if max(train, heldout) > MOST:
        raise ValueError(
            f"a scenes set of {train:,} train and {heldout:,} held-out scenes is too large: at most {MOST:,} each are made. "
            "Lower data.size and data.heldout, or bring a set of your own."
        )
    counts = {"train": train, "test": heldout}
    recipes = {split: _recipe(seed, side, split, count) for split, count in counts.items()}
    if _holds(folder, recipes):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        made, done = Path(temporary) / "set", 0
        made.mkdir()
        for split, count in counts.items():
            schema = SCHEMA.with_metadata(recipes[split])
            with pq.ParquetWriter(made / f"{split}.parquet", schema, compression="zstd") as writer:
                for table in _tables(seed, side, split, count, workers or os.cpu_count() or 1):
                    writer.write_table(table.replace_schema_metadata(recipes[split]), row_group_size=ROW_GROUP)
                    done += table.num_rows
                    if progress is not None:
                        progress(done, train + heldout)
        (made / "classnames.json").write_text(json.dumps(CLASSES) + "\n", encoding="utf-8")
        _publish(made, folder, recipes)
    return folder


def _publish(made: Path, folder: Path, recipes: dict[str, dict[bytes, bytes]]) -> None:
    """Give ``made`` its final name, in place of a half-made set but never of files that are not ours."""
    if _holds(folder, recipes):  # another process was faster
        return
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    try:
        made.replace(folder)  # takes the place of an absent or empty folder only
    except OSError:
        if not _holds(folder, recipes):
            raise
