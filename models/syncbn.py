"""Batch normalisation over the global batch, on CPUs too.

torch's SyncBatchNorm needs an accelerator. Where training runs on CPUs over gloo, per-worker statistics would make a
run's numbers depend on how many workers it has; this module makes them those of one process with the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


def convert(module: nn.Module) -> nn.Module:
    """Make every nn.BatchNorm2d inside `module` normalise over the global batch; returns the module (or its replacement).

    Convert after moving the model to its device: layers on a GPU become torch's own SyncBatchNorm, the others
    `GlobalBatchNorm2d`. State-dict keys and parameters stay the same objects. Workers may bring batches of differing
    sizes. Without torch.distributed, or with one worker, nothing changes in what the layers compute.
    Raises ValueError for subclasses of BatchNorm2d (timm's fuse an activation), which would silently stay local.
    """
    if isinstance(module, GlobalBatchNorm2d):
        return module
    if isinstance(module, nn.BatchNorm2d):
        if type(module) is not nn.BatchNorm2d:
            raise ValueError(
                f"{type(module).__name__} cannot be synchronised across workers; train this model with per-worker batch "
                "statistics, or choose a tower without it (open_clip's ResNets and ViTs are fine)."
            )
        if any(tensor.is_cuda for tensor in (*module.parameters(), *module.buffers())):
            accelerated: Any = nn.SyncBatchNorm
            synchronised: nn.Module = accelerated.convert_sync_batchnorm(module)
            return synchronised
        # Changing the class in place keeps parameters, buffers, hooks and optimisers that already refer to them.
        module.__class__ = GlobalBatchNorm2d
        return module
    for name, child in module.named_children():
        converted = convert(child)
        if converted is not child:
            setattr(module, name, converted)
    return module


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose training statistics are those of all workers' batches together, (world * N, C, H, W).

    Gradients are those of the sum of the workers' losses, as with torch's SyncBatchNorm. In evaluation, or alone, it is
    nn.BatchNorm2d.
    """

    def forward(self, input: Tensor) -> Tensor:
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if not self.training or world == 1:
            return super().forward(input)
        if input.device.type != "cpu":
            raise ValueError(f"models.syncbn.convert ran before the model was moved to {input.device}; move it first.")
        self._check_input_dim(input)
        mean, var, count = _global_statistics(input, world)
        if count < 2:
            raise ValueError("Batch statistics need more than one value per channel; raise the batch size.")
        self._update_running(mean, var, count)
        apply: Callable[..., Tensor] = _Normalise.apply
        return apply(input, self.weight, self.bias, mean, var, self.eps, count)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, var: Tensor, count: int) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), momentum)


@torch.no_grad()
def _global_statistics(x: Tensor, world: int) -> tuple[Tensor, Tensor, int]:
    """Mean (C,), biased variance (C,) and values per channel of all workers' x (N, C, H, W), in one all-reduce."""
    dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    channels, local = x.shape[1], x.numel() // x.shape[1]
    # The operator takes its precision from the running buffers it is handed; these are thrown away.
    mean, var = torch.batch_norm_update_stats(x, x.new_zeros(channels, dtype=dtype), x.new_ones(channels, dtype=dtype), 0.0)
    # Each worker fills its own row, so the sum is a gather. Rows combine without the cancellation of E[x²] - E[x]².
    rows = x.new_zeros((world, 2 * channels + 1), dtype=torch.float64)
    rows[dist.get_rank()] = torch.cat([mean.double(), var.double(), mean.new_full((1,), local, dtype=torch.float64)])
    dist.all_reduce(rows)
    total = rows[:, -1].sum()
    weights = rows[:, -1:] / total  # (world, 1): a worker counts by the values it brings
    means, variances = rows[:, :channels], rows[:, channels:-1]
    centre = (weights * means).sum(dim=0)
    spread = (weights * (variances + (means - centre).square())).sum(dim=0)
    return centre.to(dtype), spread.to(dtype), int(total)


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, differentiated through the global mean and variance."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
        count: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.count = eps, count
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight
        # With fixed statistics: dx = grad * scale / std, and the two per-channel sums that the statistics need.
        dx, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad.contiguous(), x, scale, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([grad_bias, grad_weight]).to(mean.dtype)
        dist.all_reduce(sums)
        inverse = torch.rsqrt(var + ctx.eps)
        slope = scale * inverse.square() * sums[1] / ctx.count
        offset = scale * inverse * sums[0] / ctx.count - slope * mean
        dx.addcmul_(x, slope.view(-1, 1, 1).to(x.dtype), value=-1).sub_(offset.view(-1, 1, 1).to(x.dtype))
        affine = (None, None) if weight is None else (grad_weight, grad_bias)
        return dx, *affine, None, None, None, None
