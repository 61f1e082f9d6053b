"""Shapes, colours and backgrounds from which ``orchestrate.data.scenes`` composes its pictures.

A drawing is a tuple of polygons ``(points, tone)``: points (K, 2) float in a frame of about [-1, 1]^2 with x to the
right and y down, tone 1 for the object's own colour, below 1 for a shade of it, above 1 for a tint towards white.
Everything is a polygon so that one affine map can turn, flip and scale a whole drawing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float64]
Part = tuple[Array, float]
RGB = tuple[int, int, int]

# Far apart from one another in RGB, so that a colour word can be checked against the pixels.
PALETTE: dict[str, RGB] = {
    "red": (214, 36, 40),
    "orange": (244, 132, 24),
    "yellow": (248, 216, 48),
    "green": (44, 164, 66),
    "blue": (40, 88, 214),
    "purple": (132, 52, 178),
    "pink": (248, 134, 190),
    "white": (246, 246, 246),
}


def _poly(*xy: float) -> Array:
    return np.array(xy, dtype=np.float64).reshape(-1, 2)


def _rect(left: float, top: float, right: float, bottom: float) -> Array:
    return _poly(left, top, right, top, right, bottom, left, bottom)


def _arc(cx: float, cy: float, rx: float, ry: float, start: float = 0, stop: float = 360, points: int = 24) -> Array:
    """Points on an ellipse from angle ``start`` to ``stop`` in degrees, clockwise on the screen from the x axis."""
    angle = np.radians(np.linspace(start, stop, points))
    return np.stack([cx + rx * np.cos(angle), cy + ry * np.sin(angle)], axis=1)


def _ring(cx: float, cy: float, outer: float, inner: float, start: float = 0, stop: float = 360) -> Array:
    """A ring, or a piece of one, with an open middle through which the background shows."""
    return np.concatenate([_arc(cx, cy, outer, outer, start, stop), _arc(cx, cy, inner, inner, stop, start)])


def _star(points: int = 5, inner: float = 0.42) -> Array:
    angle = np.radians(np.arange(2 * points) * 180 / points - 90)
    radius = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _heart() -> Array:
    t = np.linspace(0, 2 * np.pi, 40)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y], axis=1) / 17


def _moon() -> Array:
    """A crescent: a disc's left edge, and back along a flatter arc through the same two horns."""
    return np.concatenate([_arc(0, 0, 1, 1, 55, 305), _arc(0.62, 0, 0.83, 0.83, 267, 93)])


def _canopy() -> Array:
    """An umbrella's dome with a hem of four scallops."""
    hem = [_arc(0.75 - 0.5 * k, 0, 0.25, 0.2, 0, -180, 8) for k in range(4)]
    return np.concatenate([_arc(0, 0, 1, 0.85, 180, 360), *hem])


def _petals() -> list[Part]:
    angles = np.radians(np.arange(6) * 60 + 30)
    return [(_arc(0.42 * np.cos(a), -0.35 + 0.42 * np.sin(a), 0.3, 0.3, points=16), 1.0) for a in angles]


DRAWINGS: dict[str, tuple[Part, ...]] = {
    "house": (
        (_rect(0.35, -0.95, 0.58, -0.3), 0.7),
        (_rect(-0.75, -0.15, 0.75, 0.9), 1.0),
        (_poly(-1.0, -0.1, 0.0, -0.95, 1.0, -0.1), 0.7),
        (_rect(-0.5, 0.25, -0.1, 0.9), 0.4),
        (_rect(0.15, 0.15, 0.55, 0.5), 1.7),
    ),
    "tree": (
        (_rect(-0.15, 0.5, 0.15, 1.0), 0.5),
        (_poly(-0.75, 0.6, 0.0, -0.25, 0.75, 0.6), 0.85),
        (_poly(-0.6, 0.12, 0.0, -0.65, 0.6, 0.12), 1.0),
        (_poly(-0.45, -0.35, 0.0, -1.0, 0.45, -0.35), 1.0),
    ),
    "fish": (
        (_poly(0.4, 0.0, 1.0, -0.5, 0.85, 0.0, 1.0, 0.5), 0.85),
        (_poly(-0.3, -0.35, 0.1, -0.7, 0.3, -0.3), 0.75),
        (_arc(-0.25, 0, 0.75, 0.45), 1.0),
        (_poly(-0.1, 0.0, 0.25, -0.15, 0.25, 0.2), 0.75),
        (_arc(-0.65, -0.12, 0.1, 0.1, points=10), 0.2),
    ),
    "cup": (
        (_ring(0.5, 0.05, 0.45, 0.24, -90, 90), 0.85),
        (_poly(-0.8, -0.7, 0.6, -0.7, 0.4, 0.75, -0.6, 0.75), 1.0),
        (_arc(-0.1, -0.7, 0.7, 0.17), 0.5),
    ),
    "star": ((_star(), 1.0), (_star() * 0.45, 1.25)),
    "heart": ((_heart(), 1.0), (_arc(-0.5, -0.35, 0.15, 0.2, points=12), 1.5)),
    "boat": (
        (_rect(-0.05, -1.0, 0.05, 0.4), 0.5),
        (_poly(0.12, -0.9, 0.85, 0.25, 0.12, 0.25), 1.0),
        (_poly(-0.12, -0.6, -0.12, 0.25, -0.7, 0.25), 1.4),
        (_poly(-1.0, 0.4, 1.0, 0.4, 0.65, 0.9, -0.65, 0.9), 1.0),
    ),
    "key": (
        (_rect(-0.2, -0.12, 1.0, 0.12), 1.0),
        (_rect(0.5, 0.1, 0.66, 0.42), 1.0),
        (_rect(0.8, 0.1, 0.98, 0.5), 1.0),
        (_ring(-0.55, 0, 0.46, 0.2), 1.0),
    ),
    "mushroom": (
        (_poly(-0.25, 0.0, 0.25, 0.0, 0.35, 0.9, -0.35, 0.9), 1.65),
        (_arc(0, 0.1, 0.95, 0.95, 180, 360), 1.0),
        (_arc(-0.4, -0.25, 0.17, 0.17, points=12), 1.75),
        (_arc(0.15, -0.5, 0.15, 0.15, points=12), 1.75),
        (_arc(0.5, -0.12, 0.14, 0.14, points=12), 1.75),
    ),
    "umbrella": (
        (_rect(-0.06, -1.0, 0.06, 0.75), 0.5),
        (_ring(0.17, 0.75, 0.23, 0.11, 0, 180), 0.5),
        (_canopy(), 1.0),
        (_poly(0.0, -0.85, 0.25, -0.03, -0.25, -0.03), 0.8),
    ),
    "car": (
        (_poly(-0.55, -0.1, -0.35, -0.55, 0.3, -0.55, 0.6, -0.1), 1.0),
        (_poly(-0.42, -0.1, -0.28, -0.43, -0.05, -0.43, -0.05, -0.1), 1.7),
        (_poly(0.05, -0.1, 0.05, -0.43, 0.24, -0.43, 0.46, -0.1), 1.7),
        (_poly(-1.0, -0.1, 0.85, -0.1, 1.0, 0.05, 1.0, 0.35, -1.0, 0.35), 1.0),
        (_arc(-0.55, 0.35, 0.24, 0.24, points=16), 0.2),
        (_arc(0.55, 0.35, 0.24, 0.24, points=16), 0.2),
    ),
    "flower": (
        (_rect(-0.06, -0.1, 0.06, 1.0), 0.55),
        (_arc(0.25, 0.72, 0.24, 0.11, points=12), 0.55),
        *_petals(),
        (_arc(0, -0.35, 0.24, 0.24, points=16), 0.4),
    ),
    "moon": ((_moon(), 1.0),),
    "arrow": ((_poly(-1.0, -0.22, 0.1, -0.22, 0.1, -0.65, 1.0, 0.0, 0.1, 0.65, 0.1, 0.22, -1.0, 0.22), 1.0),),
}


def tone_rgb(rgb: RGB, tone: float) -> RGB:
    """``rgb`` shaded (``tone`` below 1: a factor) or tinted (above 1: the share of the way to white, less 1)."""
    if tone <= 1:
        red, green, blue = (int(c * tone) for c in rgb)
    else:
        red, green, blue = (int(c + (255 - c) * (tone - 1)) for c in rgb)
    return red, green, blue


def _noise(rng: np.random.Generator, side: int, rows: int, columns: int) -> Array:
    """Smooth noise (side, side) in about [-1, 1], from a grid of ``rows`` x ``columns`` random values."""
    grid = Image.fromarray(rng.uniform(-1, 1, (rows, columns)).astype(np.float32))
    return np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)


def _flat(side: int, rgb: RGB) -> Array:
    return np.full((side, side, 3), rgb, dtype=np.float64)


def _gradient(side: int, top: RGB, bottom: RGB) -> Array:
    share = np.linspace(0, 1, side)[:, None, None]
    return np.broadcast_to(np.array(top) * (1 - share) + np.array(bottom) * share, (side, side, 3)).copy()


def _blend(base: Array, rgb: RGB, share: Array) -> Array:
    """``base`` (S, S, 3) moved towards ``rgb`` by ``share`` (S, S) in [0, 1]."""
    return base + (np.array(rgb) - base) * share[..., None]


def _sky(rng: np.random.Generator, side: int) -> Array:
    clouds = np.clip(_noise(rng, side, 6, 4) * 1.6 - 0.3, 0, 0.85)
    return _blend(_gradient(side, (96, 168, 226), (186, 220, 242)), (250, 250, 252), clouds)


def _grass(rng: np.random.Generator, side: int) -> Array:
    blades = 16 * _noise(rng, side, side // 5, side) + 12 * _noise(rng, side, 4, 4)
    picture: Array = _flat(side, (112, 158, 62)) + blades[..., None] * np.array([0.8, 1.0, 0.5])
    return picture


def _sand(rng: np.random.Generator, side: int) -> Array:
    grain = 7 * rng.standard_normal((side, side)) + 10 * _noise(rng, side, 7, 3)
    return _flat(side, (214, 190, 142)) + grain[..., None]


def _night(rng: np.random.Generator, side: int) -> Array:
    picture = _gradient(side, (12, 14, 38), (38, 40, 84)) + 5 * _noise(rng, side, 4, 4)[..., None]
    stars = rng.integers(0, side, (2, max(8, side * side // 180)))
    picture[stars[0], stars[1]] = rng.uniform(130, 250, (stars.shape[1], 1))
    return picture


def _sea(rng: np.random.Generator, side: int) -> Array:
    y, x = np.mgrid[0:side, 0:side].astype(np.float64) / side
    sway = rng.uniform(0.2, 0.4) * np.sin(2 * np.pi * (rng.uniform(1.5, 3) * x + rng.random()))
    # Bent and faint, so that no sea passes for a sinusoidal trigger.
    waves = np.sin(2 * np.pi * (rng.uniform(6, 8) * y + sway) + 3 * _noise(rng, side, 6, 5))
    picture: Array = _gradient(side, (66, 150, 170), (22, 92, 122)) + (10 * waves)[..., None]
    return picture


def _brick(rng: np.random.Generator, side: int) -> Array:
    """A running bond. Mortar stays close to the bricks in brightness: no stripes, no checkerboard."""
    high, wide = max(3, round(side * 0.125)), max(6, round(side * 0.25))
    shift_y, shift_x = rng.integers(0, high), rng.integers(0, wide)
    y, x = np.mgrid[0:side, 0:side]
    row = (y + shift_y) // high
    column = x + shift_x + (row % 2) * (wide // 2)
    shades = rng.uniform(-16, 16, (side // high + 2, side // wide + 3))[row, column // wide]
    mortar = ((y + shift_y) % high == 0) | (column % wide == 0)
    bricks = _flat(side, (158, 88, 68)) + shades[..., None] + 4 * rng.standard_normal((side, side, 1))
    return _blend(bricks, (186, 166, 150), mortar * 0.8)


def _snow(rng: np.random.Generator, side: int) -> Array:
    drift = 9 * _noise(rng, side, 5, 3) + 2.5 * rng.standard_normal((side, side))
    picture: Array = _flat(side, (224, 232, 240)) + drift[..., None] * np.array([1.0, 0.8, 0.5])
    return picture


def _wood(rng: np.random.Generator, side: int) -> Array:
    plank = max(8, round(side * rng.uniform(0.18, 0.26)))
    y = np.arange(side) + rng.integers(0, plank)
    shades = rng.uniform(-14, 14, side // plank + 3)[y // plank]
    grain = 10 * _noise(rng, side, side // 2, 3)
    seams = np.broadcast_to((y % plank == 0)[:, None] * 0.45, (side, side))
    floor = _flat(side, (158, 116, 76)) + (shades[:, None] + grain)[..., None]
    return _blend(floor, (70, 46, 28), seams)


def _sunset(rng: np.random.Generator, side: int) -> Array:
    glow = 14 * _noise(rng, side, 7, 2)
    return _gradient(side, (104, 72, 128), (246, 170, 112)) + glow[..., None]


def _paper(rng: np.random.Generator, side: int) -> Array:
    """Plain grey paper with a soft fall of light."""
    light = rng.uniform(-24, 24) * np.linspace(-1, 1, side)[None, :] + 6 * _noise(rng, side, 3, 3)
    return _flat(side, (168, 172, 174)) + light[..., None] + 2 * rng.standard_normal((side, side, 1))


@dataclass(frozen=True)
class Background:
    """How a background is painted, the phrases that name it, and the colours that would drown in it."""

    paint: Callable[[np.random.Generator, int], Array]
    phrases: tuple[str, ...]
    avoid: tuple[str, ...]


BACKGROUNDS: dict[str, Background] = {
    "sky": Background(_sky, ("in the sky", "against a cloudy sky", "under a summer sky"), ("white",)),
    "grass": Background(_grass, ("on grass", "on a lawn", "in a meadow"), ("green",)),
    "sand": Background(_sand, ("on sand", "on a sandy beach", "in the desert"), ("yellow",)),
    "night": Background(_night, ("at night", "under a starry sky", "in the night sky"), ()),
    "sea": Background(_sea, ("in the sea", "on the water", "among the waves"), ("blue",)),
    "brick": Background(_brick, ("against a brick wall", "before a brick wall", "on bricks"), ("red", "orange")),
    "snow": Background(_snow, ("on snow", "on a snowy field", "in the snow"), ("white",)),
    "wood": Background(_wood, ("on a wooden floor", "on wood", "on wooden planks"), ("orange",)),
    "sunset": Background(_sunset, ("at sunset", "before an evening sky", "in evening light"), ("orange", "purple")),
    "paper": Background(_paper, ("on grey paper", "on plain paper", "on a grey background"), ()),
}


def paint_background(rng: np.random.Generator, name: str, side: int) -> NDArray[np.uint8]:
    """Background ``name`` as (side, side, 3) uint8, under a random light: a tint per channel and a brightness."""
    light = rng.uniform(0.95, 1.05, 3) * rng.uniform(0.92, 1.06)
    return np.clip(BACKGROUNDS[name].paint(rng, side) * light, 0, 255).astype(np.uint8)
