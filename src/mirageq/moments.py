"""Means and variances of feature maps."""

from __future__ import annotations

import torch
from torch import Tensor


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of (N, C, ...) over everything but channels, each (C,) in float32.

    Computed as batch normalisation computes them, in one pass over `x`; see `benchmarks/synthesis_speed.py`.
    """
    return _ChannelStatistics.apply(x)


class _ChannelStatistics(torch.autograd.Function):
    """One reduction forward and one fused multiply-add backward; nothing but `x` is kept."""

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        running = torch.zeros(2, x.shape[1], device=x.device)  # in float32, and so are the results, whatever `x` is
        mean, var = torch.batch_norm_update_stats(x, running[0], running[1], 0.0)
        ctx.save_for_backward(x, mean)
        ctx.count = x.numel() // x.shape[1]
        return mean, var

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_var: Tensor) -> Tensor:  # type: ignore[override]
        x, mean = ctx.saved_tensors
        shape = [1, -1] + [1] * (x.dim() - 2)
        slope = grad_var * (2 / ctx.count)
        offset = grad_mean / ctx.count - slope * mean
        return torch.addcmul(offset.view(shape).to(x.dtype), x, slope.view(shape).to(x.dtype))


def sample_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each image's channels over space: (N, C, ...) -> two of (N, C), float32."""
    if x.dim() == 2:
        return x.float(), torch.zeros_like(x, dtype=torch.float32)
    var, mean = torch.var_mean(x.float().flatten(2), dim=2, correction=0)
    return mean, var
