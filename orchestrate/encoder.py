"""A model as two functions: pixels → features and captions → features. Used by matching and by evaluation. No Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from defenses.augment import blurred
from defenses.base import Features
from models import clip, encode


@dataclass(frozen=True)
class Encoder:
    """Features are unit norm, float32, on the model's device.

    cfg: the model_cfg (image size, pixel statistics, tokenizer). device: None = where the model is; else it moves.
    batch: images or captions per forward pass. precision: "fp32", or "bf16" for autocast.
    The model's training flags are left as they were. Raises ValueError for features that are not finite.
    """

    model: nn.Module
    cfg: Mapping[str, Any]
    device: str | torch.device | None = None
    batch: int = 256
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16") or self.batch < 1:
            raise ValueError(f"Evaluation runs in 'fp32' or 'bf16', not {self.precision!r}, in batches of 1 or more.")
        if self.device is not None:
            self.model.to(self.device)

    def images(self, pixels: NDArray[np.uint8]) -> Tensor:
        """uint8 (n, S, S, 3), n ≥ 1 → (n, d). Another side than the model's is resized, antialiased bicubic."""
        return self.image_features(pixels).pooled

    def texts(self, captions: Sequence[str]) -> Tensor:
        """n ≥ 1 captions → (n, d)."""
        return self.text_features(captions).pooled

    def image_features(self, pixels: NDArray[np.uint8], tokens: bool = False, blur: float = 0.0) -> Features:
        """uint8 (n, S, S, 3), n ≥ 1 → pooled (n, d) and, where asked for, tokens (n, P, d). blur: as in `augment.blurred`; 0 = none."""
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
            raise ValueError(f"Images must be uint8 (n, S, S, 3); these are {pixels.dtype} {pixels.shape}.")
        return self._run(lambda part: encode.encode_image(self.model, self._pixels(part, blur), tokens), pixels)

    def text_features(self, captions: Sequence[str], tokens: bool = False) -> Features:
        """n ≥ 1 captions → pooled (n, d) and, where asked for, tokens (n, L, d) with their mask. Equal captions are encoded once."""
        unique = {c: i for i, c in enumerate(dict.fromkeys(captions))}
        found = self._run(lambda part: encode.encode_text(self.model, self._ids(part), tokens), list(unique))
        at = torch.tensor([unique[c] for c in captions], device=found.pooled.device)
        return Features(*(None if x is None else x[at] for x in found))  # type: ignore[arg-type]

    def load(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Take up a state dict of numpy arrays, as `Learner.weights` makes it."""
        self.model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})

    def features_from(self, arrays: Mapping[str, NDArray[Any]]) -> Features:
        """Features that another process encoded, on this encoder's device."""
        return Features(**{name: torch.from_numpy(np.array(value)).to(self._device) for name, value in arrays.items()})

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _pixels(self, pixels: NDArray[np.uint8], blur: float = 0.0) -> Tensor:
        # Pixels in an Arrow or memory-mapped buffer are read-only, which torch warns about: only then a copy.
        x = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).to(self._device)
        x = x.permute(0, 3, 1, 2).float().div_(255)  # (n, 3, S, S), channels_last in memory as it was
        x = blurred(x, blur) if blur else x
        return clip.normalise(clip.resize(x, clip.size(self.cfg)), *clip.image_stats(self.cfg)).contiguous(
            memory_format=torch.channels_last
        )

    def _ids(self, captions: Sequence[str]) -> Tensor:
        return clip.tokenize(self.cfg, captions).to(self._device)

    def _run(self, one: Callable[[Any], tuple[Tensor, Tensor | None, Tensor | None]], items: Any) -> Features:
        """Batch by batch, without gradients, in evaluation mode; training flags are restored module by module."""
        training = [m for m in self.model.modules() if m.training]
        self.model.eval()
        try:
            with torch.no_grad(), torch.autocast(self._device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                parts = [one(items[i : i + self.batch]) for i in range(0, len(items), self.batch)]
        finally:
            for module in training:
                module.training = True
        pooled = torch.cat([part[0] for part in parts]).float()
        if not bool(pooled.isfinite().all()):
            raise ValueError("The model's features are not finite: training has diverged. Lower the learning rate.")
        return Features(pooled, _stack([part[1] for part in parts]), _stack([part[2] for part in parts]))


def _stack(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Token sets of batches trimmed to differing lengths, padded with zeros (False) to the longest."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    longest = max(part.shape[1] for part in known)
    return torch.cat([torch.cat([p, p.new_zeros(p.shape[0], longest - p.shape[1], *p.shape[2:])], 1) for p in known])
