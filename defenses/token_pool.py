"""A pool of captions' tokens, made ready for transport matching."""

from __future__ import annotations

import hashlib
import time
from functools import cache

import torch
from torch import Tensor

from defenses.transport import sorted_parts

PARTS = 8  # of a set's sorted coordinates, see `transport.sorted_parts`: 16 prunes a little more and costs twice as much


class TokenPool:
    """A pool of captions made ready for `transport_nearest`: equal captions merged, sorted by length, without padding.

    Memory: 6 bytes a token and feature (float32 and bf16) and 32 bytes a caption and feature; while it is made, as much again. A call
    of `transport_nearest` adds at most about 300 MB, whatever the number of images. Tokens and global features are copied.
    """

    @torch.no_grad()
    def __init__(self, tokens: Tensor, mask: Tensor | None = None, pooled: Tensor | None = None) -> None:
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask
        if tokens.ndim != 3 or mask.shape != tokens.shape[:2] or (pooled is not None and len(pooled) != len(tokens)):
            raise ValueError(f"pool tokens {tuple(tokens.shape)}, mask {tuple(mask.shape)}: give (M, L, d), (M, L), and M global features")
        length = mask.sum(1)
        if not len(tokens) or not int(length.amin()):
            raise ValueError("the pool is empty, or a caption has no token: raise pool_size, leave such captions out")
        flat, pooled = tokens[mask].float(), None if pooled is None else pooled.float()
        refuse_nan(flat, pooled)
        first = _first_of_equals(flat, length, pooled)
        self.row = first[length[first].argsort(stable=True)]  # (M',) where each kept caption stands in the pool
        self.length = length[self.row]
        self.start = self.length.cumsum(0) - self.length
        within = torch.arange(int(self.length.sum()), device=flat.device) - self.start.repeat_interleave(self.length)
        self.tokens = flat[(length.cumsum(0) - length)[self.row].repeat_interleave(self.length) + within]
        owner = torch.arange(len(self.row), device=flat.device).repeat_interleave(self.length)
        self.means = flat.new_zeros(len(self.row), flat.shape[1]).index_add_(0, owner, self.tokens) / self.length[:, None]
        self.pooled = None if pooled is None else pooled[self.row]
        self.half = self.tokens.bfloat16() if half_is_quicker(flat.device.type) else None
        self.parts = flat.new_empty(len(self.row), PARTS * tokens.shape[2])
        self.rest = flat.new_empty(len(self.row))
        for size in self.length.unique().tolist():
            for which in (self.length == size).nonzero()[:, 0].split(4096):
                self.parts[which], self.rest[which] = sorted_parts(self.tokens[self.places(which)].transpose(0, 1), PARTS)
        self.norm = longest(self.tokens)
        self.pooled_norm = 0.0 if self.pooled is None else longest(self.pooled)
        self.half_error = 0.0 if self.half is None else longest(self.tokens - self.half.float())

    def places(self, which: Tensor) -> Tensor:
        """Rows of `tokens` (L, B) of the captions `which` (B,), token-major; a shorter caption's last token fills its column."""
        length = self.length[which]
        place = torch.arange(int(length.amax()), device=which.device)[:, None]
        return self.start[which] + torch.minimum(place, length - 1)

    def masses(self, which: Tensor) -> Tensor:
        """(L, B), zero where `places` only fills."""
        length = self.length[which]
        return (torch.arange(int(length.amax()), device=which.device)[:, None] < length) / length


def _first_of_equals(flat: Tensor, length: Tensor, pooled: Tensor | None) -> Tensor:
    """Rows of captions that equal no earlier one in any number; flat: all captions' tokens one after another."""
    rows, ends = flat.cpu().numpy(), length.cumsum(0).tolist()
    whole = None if pooled is None else pooled.cpu().numpy()
    seen: dict[bytes, int] = {}
    for k, end in enumerate(ends):
        digest = hashlib.blake2b(rows[ends[k - 1] if k else 0 : end].tobytes(), digest_size=16)
        if whole is not None:
            digest.update(whole[k].tobytes())
        seen.setdefault(digest.digest(), k)
    return torch.tensor(list(seen.values()), device=flat.device)


def longest(vectors: Tensor) -> float:
    return float(vectors.norm(dim=-1).amax()) if vectors.numel() else 0.0


def refuse_nan(*features: Tensor | None) -> None:
    if not all(bool(x.isfinite().all()) for x in features if x is not None):
        raise ValueError("features hold NaN or infinity: training has diverged; lower the learning rate")


@cache
def half_is_quicker(device: str) -> bool:
    """Whether bf16 products are quicker here than float32's; measured once, as hardware without them emulates them."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return False
    times = []
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(64, 128, dtype=dtype), torch.ones(1024, 128, dtype=dtype)
        runs = []
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(left, right.T)
            runs.append(time.perf_counter() - start)
        times.append(min(runs))
    return times[1] < times[0]
