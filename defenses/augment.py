"""Random views of a batch of images, on the device that trains, drawn per sample from its key.

A draw depends on (key, which draw) alone: not on the batch a sample lands in, its place there, or the number of workers.

Everything here is linear until one last clip, so a view is a few small matrix products an image:
`clip(colour · (rows · image · columnsᵀ) + shift)`, where `rows` and `columns` hold crop, resize, flip and blur,
and a 3 × 3 `colour` holds jitter and greyscale.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's step (Steele, Lea & Flood, OOPSLA 2014)
IMAGE_SALT = 1
TRIES = 10  # crops drawn before giving up, as in torchvision's RandomResizedCrop
REFERENCE_SIDE = 224  # px, where blur sigmas are stated
BLUR_REACH = 5  # largest sigmas either way: at the defaults the released code's kernel of 21 px
CHUNK = 64  # images at a time on a CPU: the working set stays in the cache
DEVICE_CHUNK = 512  # elsewhere: at 224 px about 2 GB of working memory
YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))  # row 0: BT.601 luma, as in Pillow


def mix(z: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: a bijection of uint64 in which every input bit moves every output bit."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return mixed


def uniforms(keys: np.ndarray, count: int, salt: int) -> np.ndarray:
    """Draws 0 … count − 1 of each key: (N, count) float32 in [0, 1). Other salts give independent streams."""
    keys = np.asarray(keys, dtype=np.uint64)
    stream = mix(keys + mix(np.array([salt], dtype=np.uint64) + GOLDEN))
    steps = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
    return (mix(stream[:, None] + steps) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


@dataclass(frozen=True)
class ImageAugment:
    """RoCLIP's image augmentation: random resized crop, flip, blur, colour jitter, greyscale.

    Defaults are those of the released code (Yang, Gao & Mirzasoleiman, NeurIPS 2023), where the blur is always on.
    Differences from torchvision's pipeline, all on purpose:
    - crops have real-valued corners, resized as Pillow's `resize(box=…, BILINEAR)` does, antialiased where they shrink;
    - blur sigma scales with side / 224 px, so that 64 px images are not smeared 3.5 times as much;
    - hue turns the colour in YIQ rather than HSV: same angle, and luma stays;
    - values are clipped once, at the end. Without clips in between brightness, contrast, saturation, hue and blur
      commute (contrast and blur up to the border), so no order is drawn.
    """

    flip: float = 0.5  # probability
    crop: tuple[float, float] = (0.08, 1.0)  # area, as a share of the image
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    jitter: tuple[float, float, float, float] = (0.5, 0.5, 0.5, 0.1)  # brightness, contrast, saturation; hue in turns
    jitter_p: float = 0.8
    gray_p: float = 0.2
    blur: tuple[float, float] = (0.1, 2.0)  # sigma in px of a 224 px image
    blur_p: float = 1.0

    def __post_init__(self) -> None:
        for name in ("flip", "jitter_p", "gray_p", "blur_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is a probability: give it between 0 and 1")
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"crop={self.crop}: give two shares of the area, 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio={self.ratio}: give two positive width/height ratios, low <= high")
        if not (all(0 <= s <= 1 for s in self.jitter[:3]) and 0 <= self.jitter[3] <= 0.5):
            raise ValueError(f"jitter={self.jitter}: give three strengths in [0, 1] and a hue in [0, 0.5] turns")
        if not 0 <= self.blur[0] <= self.blur[1]:
            raise ValueError(f"blur={self.blur}: give two sigmas in px at 224 px, 0 <= low <= high")

    @torch.no_grad()
    def apply(self, images: Tensor, keys: np.ndarray, out_side: int | None = None, within: np.ndarray | None = None) -> Tensor:
        """images (N, 3, S, S) float in [0, 1], keys (N,) → (N, 3, S', S') float32, S' = out_side or S.

        within (N, 4): left, top, width, height of the part of each image, of side 1, that is cropped from as if it were all there is.
        Call it outside autocast: half-precision products would round the pixels to eight bits or fewer.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
            raise ValueError(f"images are {tuple(images.shape)}: give square RGB as (N, 3, S, S)")
        if len(keys) != len(images):
            raise ValueError(f"{len(keys)} keys for {len(images)} images: give one key an image")
        size = CHUNK if images.device.type == "cpu" else DEVICE_CHUNK
        drawn = self._draw(keys)
        if within is not None:
            drawn[:, :4] = drawn[:, :4] * np.tile(within[:, 2:], 2) + np.pad(within[:, :2], ((0, 0), (0, 2)))
        draws = torch.from_numpy(drawn).to(images.device)
        chunks = [slice(low, low + size) for low in range(0, max(len(images), 1), size)]
        return torch.cat([self._view(images[c], draws[c], out_side or images.shape[3]) for c in chunks])

    def around(self, keys: np.ndarray, margin: float) -> np.ndarray:
        """(N, 4) for `within`: the crops that these keys draw, larger by `margin` of their sides in all, as far as the image reaches."""
        box = self._draw(keys)[:, :4]
        low = np.maximum(box[:, :2] - margin / 2 * box[:, 2:], 0)
        return np.hstack([low, np.minimum(box[:, :2] + (1 + margin / 2) * box[:, 2:], 1) - low])

    def _draw(self, keys: np.ndarray) -> np.ndarray:
        """(N, 11) float32: left, top, width, height, flip, b, c, s, hue, gray, sigma, applied to images of side 1.

        Each quantity owns its draws, so turning one augmentation off leaves the others as they were.
        """
        u = uniforms(keys, 2 * TRIES + 11, IMAGE_SALT)
        out = np.empty((len(u), 11), dtype=np.float32)
        out[:, :4] = crops(u[:, : 2 * TRIES + 2], self.crop, self.ratio)
        rest = u[:, 2 * TRIES + 2 :]
        out[:, 4] = rest[:, 0] < self.flip
        jittered = rest[:, 1] < self.jitter_p
        strength = np.asarray(self.jitter, dtype=np.float32)
        swing = (2 * rest[:, 2:6] - 1) * strength * jittered[:, None]
        out[:, 5:9] = swing + np.array([1, 1, 1, 0], dtype=np.float32)
        out[:, 9] = rest[:, 6] < self.gray_p
        out[:, 10] = (rest[:, 7] < self.blur_p) * (self.blur[0] + rest[:, 8] * (self.blur[1] - self.blur[0]))
        return out

    def _view(self, images: Tensor, draw: Tensor, out_side: int) -> Tensor:
        n, _, side, _ = images.shape
        left, top, width, height, flip, *colour, sigma = draw.unbind(1)
        columns = resampling(left, width, flip, side, out_side)  # (N, S', S)
        rows = resampling(top, height, torch.zeros_like(flip), side, out_side)
        if self.blur_p and self.blur[1]:
            scale = out_side / REFERENCE_SIDE
            blur = blurring(sigma * scale, out_side, math.ceil(BLUR_REACH * self.blur[1] * scale))  # (N, S', S')
            columns, rows = blur @ columns, blur @ rows
        x = (images.float().reshape(n, 3 * side, side) @ columns.mT).reshape(n, 3, side, out_side)
        x = (rows.repeat_interleave(3, 0) @ x.reshape(3 * n, side, out_side)).reshape(n, 3, out_side**2)
        matrix, shift = colouring(torch.stack(colour), x.mean(2))
        return torch.baddbmm(shift, matrix, x).clamp_(0, 1).reshape(n, 3, out_side, out_side)


def crops(u: np.ndarray, area: tuple[float, float], ratio: tuple[float, float]) -> np.ndarray:
    """u (N, 2·TRIES + 2) uniform → (N, 4): left, top, width, height in a square of side 1.

    torchvision's law: area uniform, ratio log-uniform, redrawn until the box fits, else the largest central box.
    """
    tried_area = area[0] + (area[1] - area[0]) * u[:, :TRIES]
    low, high = np.log(ratio)
    tried_ratio = np.exp(low + (high - low) * u[:, TRIES : 2 * TRIES])
    width, height = np.sqrt(tried_area * tried_ratio), np.sqrt(tried_area / tried_ratio)
    fits = (width <= 1) & (height <= 1)
    pick = (np.arange(len(u)), fits.argmax(1))
    central = np.clip(1, *ratio)
    width = np.where(fits.any(1), width[pick], min(1, central))
    height = np.where(fits.any(1), height[pick], min(1, 1 / central))
    place = np.where(fits.any(1)[:, None], u[:, 2 * TRIES :], 0.5)
    return np.stack([place[:, 0] * (1 - width), place[:, 1] * (1 - height), width, height], axis=1)


def resampling(start: Tensor, extent: Tensor, flip: Tensor, side: int, out_side: int) -> Tensor:
    """start, extent, flip (N,), as shares of the side → (N, out_side, side): rows that sum to 1, a triangle filter each.

    The triangle is one pixel wide where the crop is enlarged (bilinear) and widens with the step where it shrinks.
    """
    centre = torch.arange(out_side, device=start.device) + 0.5
    centre = torch.where(flip[:, None] > 0, out_side - centre, centre)
    step = extent * (side / out_side)  # source pixels per output pixel
    source = start[:, None] * side + centre * step[:, None] - 0.5  # (N, out_side)
    reach = step.clamp(min=1)[:, None, None]
    weights = torch.arange(side, device=start.device) - source[:, :, None]
    weights = weights.abs_().div_(reach).neg_().add_(1).clamp_(min=0)
    return weights.div_(weights.sum(2, keepdim=True))


@functools.lru_cache(maxsize=8)
def _taps(side: int, reach: int, device: torch.device) -> Tensor:
    """(reach + 1, side · side): [d, i, j] counts how often pixel i sees pixel j at distance d, mirrored at the border."""
    pixel = np.arange(side)
    taps = np.zeros((reach + 1, side, side), dtype=np.float32)
    for offset in range(-reach, reach + 1):
        seen = np.abs(pixel + offset)
        seen = np.where(seen >= side, 2 * (side - 1) - seen, seen)
        taps[abs(offset), pixel, seen] += 1
    return torch.from_numpy(taps).reshape(reach + 1, side * side).to(device)


def blurring(sigma: Tensor, side: int, reach: int) -> Tensor:
    """sigma (N,) in px, 0 for none → (N, side, side): rows that sum to 1, a Gaussian sampled at whole pixels each."""
    reach = min(reach, side - 1)
    distance = torch.arange(reach + 1, device=sigma.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (distance / sigma.clamp(min=1e-3)[:, None]) ** 2)
    kernel = kernel / (2 * kernel.sum(1, keepdim=True) - 1)  # kernel[:, 0] is 1, and counts once
    return (kernel @ _taps(side, reach, sigma.device)).reshape(-1, side, side)


def blurred(images: Tensor, sigma: float) -> Tensor:
    """images (N, 3, S, S) float through a Gaussian of `sigma` px of a 224 px image, mirrored at the border; same shape."""
    side = images.shape[3]
    px = sigma * side / REFERENCE_SIDE
    kernel = blurring(images.new_tensor([px]), side, math.ceil(BLUR_REACH * px))[0]
    return kernel @ images @ kernel.T


def colouring(factors: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Brightness, contrast, saturation, hue in turns, gray 0 or 1 as factors (5, N); mean colour of each image (N, 3)
    → matrix (N, 3, 3) and shift (N, 3, 1) that do all of it at once."""
    brightness, contrast, saturation, hue, gray = factors[:, :, None, None]  # (N, 1, 1) each
    luma, identity, turn = (m.to(mean.device) for m in _colour_basis())
    angle = 2 * torch.pi * hue
    turned = identity + (angle.cos() - 1) * (identity - luma) + angle.sin() * turn
    matrix = torch.where(gray > 0, luma, saturation * turned + (1 - saturation) * luma)
    return brightness * contrast * matrix, (1 - contrast) * brightness * (mean @ luma.mT)[:, :, None]


@functools.lru_cache(maxsize=1)
def _colour_basis() -> tuple[Tensor, Tensor, Tensor]:
    """Three (3, 3): every channel becomes the luma; nothing changes; a quarter turn of the colour, red towards green."""
    yiq = np.array(YIQ)
    quarter = np.linalg.inv(yiq) @ np.array([[0, 0, 0], [0, 0, 1], [0, -1, 0]]) @ yiq
    luma = np.ones((3, 1)) * np.array(YIQ[0])
    return tuple(torch.tensor(m, dtype=torch.float32) for m in (luma, np.eye(3), quarter))  # type: ignore[return-value]
