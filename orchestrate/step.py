"""One training step of CLIP on one worker of many: pure torch, no Ray.

The loss is the one of the *global* batch, computed by every worker from gathered embeddings, so that any defence writes its loss as if
there were one process. The gradient is exact: each worker's embeddings carry gradient in its own rows only, DDP averages over W workers,
and multiplying the loss by W turns that average into the sum over rows that a single process would have. Parameters that enter the loss
directly (the logit scale) would then count W times; their gradient is divided by W first.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from defenses.augment import mix
from defenses.base import Batch, ClipOutput, Defense, clip_loss
from models import clip, encode, syncbn
from orchestrate.recipe import Model, Recipe, Train

MAX_LOGIT_SCALE = math.log(100)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Examples:
    """This worker's share of a batch. `matched` replaces the text embedding (RoCLIP's stored features), (n, d) or None."""

    images: np.ndarray  # (n, S, S, 3) uint8
    captions: list[str]
    keys: np.ndarray  # (n,) uint64
    matched: np.ndarray | None = None
    safe: np.ndarray | None = None  # (n,) bool: what a selector trusts
    moved: np.ndarray | None = None  # (n,) bool: whose caption comes from the pool


class Towers(nn.Module):
    """Both encoders and the scale behind one `forward`, which is what DDP needs to see."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, ids: Tensor | None, tokens: bool) -> tuple[Tensor | None, ...]:
        image, image_tokens, _ = encode.encode_image(self.model, pixels, tokens)
        text, text_tokens, text_mask = encode.encode_text(self.model, ids, tokens) if ids is not None else (None, None, None)
        scale = self.model.logit_scale.exp()  # type: ignore[operator]
        return image, text, scale, image_tokens, text_tokens, text_mask


class Learner:
    """Model, optimiser and schedule; `step` is one optimiser step on the global batch."""

    def __init__(
        self,
        model: Model,
        train: Train,
        defense: Defense,
        *,
        seed: int,
        total_steps: int,
        device: torch.device | str = "cpu",
        unused: bool = False,  # whether some steps leave parameters without gradient (DDP must then look for them)
        queue: int = 0,  # latest pairs whose features are kept for the loss
        start: tuple[nn.Module, Mapping[str, Any]] | None = None,  # a trained model and its model_cfg, to go on from
    ) -> None:
        self.config = model
        self.device = torch.device(device)
        self.cfg = dict(start[1]) if start else clip.config(model.name, model.image_size or None)
        self.mean, self.std = clip.image_stats(self.cfg)
        self.queue_size, self.queue = queue, [torch.zeros(0, self.cfg["embed_dim"], device=self.device) for _ in range(2)]
        built = start[0] if start else clip.build(self.cfg, seed=seed)
        self.world, self.rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        if self.world > 1:
            built = syncbn.convert(built)
        if model.channels_last:
            built = built.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model: Any = built.to(self.device)
        self.towers: nn.Module = Towers(self.model)
        if self.world > 1:
            ids = [self.device.index or 0] if self.device.type == "cuda" else None
            self.towers = nn.parallel.DistributedDataParallel(
                self.towers, device_ids=ids, find_unused_parameters=unused, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.restart(defense, train, total_steps)

    def restart(self, defense: Defense, train: Train, total_steps: int) -> None:
        """A fresh optimiser and schedule on the same weights: a stage of its own."""
        self.defense, self.train, self.total_steps, self.steps = defense, train, total_steps, 0
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, train.weight_decay), lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps, fused=True
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=train.precision == "fp16")  # type: ignore[attr-defined]

    @property
    def image_side(self) -> int:
        return clip.side(self.cfg)

    def lr_at(self, step: int) -> float:
        """Linear warm-up over `warmup` steps, then cosine to 0 at the last. Stateless, so resuming cannot shift it."""
        warm = min(self.train.warmup, self.total_steps)
        if step < warm:
            return self.train.lr * (step + 1) / warm
        share = (step - warm) / max(1, self.total_steps - warm)
        return self.train.lr * 0.5 * (1 + math.cos(math.pi * share))

    def step(self, examples: Examples, robust: bool = False, epoch: int = 0) -> Tensor:
        """One optimiser step; returns the global batch's loss, detached, on the device."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(self.steps) * self.defense.lr_factor(epoch)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._accumulate([self._inputs(part) for part in split(examples, self.train.accumulate)], robust, epoch)
        if self.train.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.train.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        self.steps += 1
        return loss

    def _inputs(self, examples: Examples) -> tuple[Tensor, Tensor | None, Tensor | None, list[Tensor | None]]:
        """Pixels and token ids, a second view's behind the first's; stored features where they stand for the captions; what is safe, and
        what moved."""
        pixels = torch.from_numpy(examples.images).to(self.device, non_blocking=True).permute(0, 3, 1, 2)  # channels_last already
        pixels = pixels.float().div_(255)
        keys = [examples.keys, mix(examples.keys)][: self.defense.view_count]
        views = [self.defense.augment(Batch(pixels, examples.captions, k, view, keys[0] if view else None)) for view, k in enumerate(keys)]
        images = _join([clip.resize(view.images, clip.size(self.cfg)) for view in views])
        assert images is not None
        images = clip.normalise(images, self.mean, self.std)
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        marks = [None if x is None else torch.from_numpy(np.array(x, bool)).to(self.device) for x in (examples.safe, examples.moved)]
        if examples.matched is not None:
            return images, None, torch.from_numpy(np.array(examples.matched, np.float32)).to(self.device), marks
        return images, clip.tokenize(self.cfg, [c for view in views for c in view.captions]).to(self.device), None, marks

    def _forward(self, inputs: tuple[Tensor, Tensor | None, Tensor | None, list[Tensor | None]]) -> list[Tensor | None]:
        """The scale; of the first view, then of the second: image, text, image tokens, text tokens, text mask; what is safe; what moved."""
        images, ids, matched, marks = inputs
        dtype = DTYPES.get(self.train.precision)
        with contextlib.ExitStack() as stack:
            if dtype:
                stack.enter_context(torch.autocast(self.device.type, dtype=dtype))
            if self.device.type == "cpu":  # its flash kernel's backward takes a quarter of a step on captions of 16 tokens
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            image, text, scale, *tokens = self.towers(images, ids, self.defense.needs_tokens)
        rows = len(images) // self.defense.view_count
        both = (image, text, *tokens)
        first = [None if x is None else x[:rows] for x in both]
        second = [None if x is None or rows == len(images) else x[rows:] for x in both]
        first[1] = matched if text is None else first[1]
        return [scale, *first, *second, *marks]

    def _accumulate(self, parts: Sequence[Any], robust: bool, epoch: int) -> Tensor:
        """Gradient of the global batch's loss in len(parts) passes.

        With one pass it is the plain step. With more, all embeddings are first made without gradient, then each micro-batch is encoded
        again with gradient in its own rows (Gao et al. 2021, GradCache), so the contrastive batch stays whole. Batch-norm statistics are
        those of a micro-batch, and its running averages see each image twice: where that matters, use a tower without batch norm.
        """
        cached: list[list[Tensor | None]] = []
        if len(parts) > 1:
            with torch.no_grad():
                cached = [self._forward(part) for part in parts]
        total = torch.zeros((), device=self.device)
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            with contextlib.nullcontext() if last or self.world == 1 else self.towers.no_sync():  # type: ignore[operator]
                out = self._forward(part)
                micro = [out if j == i else cached[j] for j in range(len(parts))]
                whole = self._global(micro, robust, epoch)
                loss = self.defense.loss(whole, clip_loss)
                # The scale enters every pass, the embeddings one each: its gradient is averaged over the passes.
                self.scaler.scale(loss * self.world).backward()
            total = loss.detach()
        if len(parts) > 1 and self.model.logit_scale.grad is not None:
            self.model.logit_scale.grad /= len(parts)
        if self.queue_size:
            latest = zip(self.queue, (whole.image, whole.text), strict=True)
            self.queue = [torch.cat([old, new.detach().float()])[-self.queue_size :] for old, new in latest]
        return total

    def _global(self, micro: Sequence[Sequence[Tensor | None]], robust: bool, epoch: int) -> ClipOutput:
        scale = next(m[0] for m in micro if m[0] is not None and (m[0].requires_grad or len(micro) == 1))
        if self.world > 1:  # value s, gradient 1/W of it (module docstring)
            scale = scale / self.world + (scale - scale / self.world).detach()
        merged = [_join([m[k] for m in micro]) for k in range(1, len(micro[0]))]
        image, text, i, t, mask, image_b, text_b, i_b, t_b, mask_b, safe, moved = (gather(x, self.world, self.rank) for x in merged)
        assert image is not None and text is not None
        image_queue, text_queue = self.queue if self.queue_size else (None, None)
        first, second = (image, text, scale, i, t, mask), (i_b, t_b, mask_b)
        return ClipOutput(*first, *second, robust, image_b, text_b, safe, image_queue, text_queue, epoch, moved)

    def weights(self) -> dict[str, np.ndarray]:
        """The model's state as numpy arrays on the CPU: what matching actors load."""
        return {k: v.detach().cpu().numpy().copy() for k, v in self.model.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "steps": self.steps,
            "queue": self.queue,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.steps = state["steps"]
        self.queue = [x.to(self.device) for x in state.get("queue", self.queue)]


def architecture(recipe: Recipe) -> tuple[nn.Module, dict[str, Any]]:
    """The recipe's untrained model and its model_cfg."""
    cfg = clip.config(recipe.model.name, recipe.model.image_size or None)
    model = clip.build(cfg, seed=recipe.seed)
    if recipe.model.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, cfg


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay for matrices; none for norms, biases and the logit scale (CLIP's and open_clip's rule)."""
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        (plain if p.ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name else decay).append(p)
    return [{"params": plain, "weight_decay": 0.0}, {"params": decay, "weight_decay": weight_decay}]


def split(examples: Examples, parts: int) -> list[Examples]:
    """Micro-batches of a worker's share, in order."""
    if parts == 1:
        return [examples]
    bounds = np.linspace(0, len(examples.captions), parts + 1).astype(int)
    pick: Callable[[Any, int], Any] = lambda x, i: None if x is None else x[bounds[i] : bounds[i + 1]]
    fields = (examples.images, examples.captions, examples.keys, examples.matched, examples.safe, examples.moved)
    return [Examples(*(pick(x, i) for x in fields)) for i in range(parts)]


def _join(parts: list[Tensor | None]) -> Tensor | None:
    tensors = [p for p in parts if p is not None]
    if not tensors:
        return None
    return tensors[0] if len(tensors) == 1 else torch.cat(_padded(tensors))


def _padded(tensors: list[Tensor]) -> list[Tensor]:
    """Token tensors (n, L, …) of differing L, padded with zeros (False) to the longest."""
    if tensors[0].ndim < 2 or len({t.shape[1] for t in tensors}) == 1:
        return tensors
    longest = max(t.shape[1] for t in tensors)
    return [torch.cat([t, t.new_zeros(t.shape[0], longest - t.shape[1], *t.shape[2:])], 1) for t in tensors]


def gather(x: Tensor | None, world: int, rank: int) -> Tensor | None:
    """All workers' rows in rank order, x (n,), (n, d) or (n, L, …); gradient flows into this worker's rows."""
    if x is None or world == 1:
        return x
    # Shares differ by a row where the batch does not divide, token counts because captions are trimmed worker by worker.
    shapes = torch.zeros(world, 2, dtype=torch.long, device=x.device)
    shapes[rank] = torch.tensor([len(x), x.shape[1] if x.ndim > 1 else 0])
    dist.all_reduce(shapes)
    counts, (most, longest) = shapes[:, 0].tolist(), shapes.amax(0).tolist()
    if x.ndim > 1 and longest > x.shape[1]:
        x = torch.cat([x, x.new_zeros(x.shape[0], longest - x.shape[1], *x.shape[2:])], 1)
    sent = x.detach().contiguous()
    sent = sent.to(torch.uint8) if sent.dtype == torch.bool else sent
    if most > len(sent):
        sent = torch.cat([sent, sent.new_zeros(most - len(sent), *sent.shape[1:])])
    rows = [torch.empty_like(sent) for _ in range(world)]
    dist.all_gather(rows, sent)
    rows = [r[:n].to(x.dtype) for r, n in zip(rows, counts, strict=True)]
    rows[rank] = x
    return torch.cat(rows)
