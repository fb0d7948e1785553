"""The arithmetic of fake quantization: real numbers moved to the nearest point of an integer grid.

    code = clamp(round_half_even(x / scale) + zero_point, qmin, qmax)        (ONNX QuantizeLinear)
    x_hat = (code - zero_point) * scale                                      (ONNX DequantizeLinear)

Rounding divides by the scale rather than multiplying by its inverse, and rounds halves to even: exactly what ONNX
Runtime does, so a student and its exported file agree to the last code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SMALLEST_SCALE = 2.0**-20
"""The step of a degenerate range, about 1e-6. A tensor or channel with a smaller one is dead in effect; a floor much
lower would make the int32 bias of a dead channel (in steps of s_x * s_w) overflow."""

INT32_LIMIT = 2.0**31 - 128
"""The largest float32 below 2^31."""


def grid(bits: int, symmetric: bool) -> tuple[int, int]:
    """The smallest and largest integer code: signed if symmetric, unsigned if not.

    >>> grid(4, True), grid(4, False)
    ((-8, 7), (0, 15))
    """
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def affine_parameters(lo: Tensor, hi: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid that covers [lo, hi] and contains zero exactly.

    Args:
        lo, hi: ends of the range, any one shape; widened to include 0.
        bits: of a code.
        symmetric: zero point 0 and signed codes; otherwise the whole range is used, with unsigned codes.

    Returns:
        scale (> 0; a degenerate range gets `SMALLEST_SCALE`) and zero_point (an integer within the grid, stored as
        float), both of the shape of `lo`.
    """
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    qmin, qmax = grid(bits, symmetric)
    if symmetric:
        scale = torch.maximum(lo / qmin, hi / qmax).clamp(min=SMALLEST_SCALE)
        return scale, torch.zeros_like(scale)
    scale = ((hi - lo) / (qmax - qmin)).clamp(min=SMALLEST_SCALE)
    return scale, (qmin - torch.round(lo / scale)).clamp(qmin, qmax)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, clip_gradient: bool = False
) -> Tensor:
    """`x` on the grid.

    Args:
        x: any shape.
        scale, zero_point: broadcastable to `x`: () per tensor, (O, 1, ...) per output channel.
        qmin, qmax: ends of the grid.
        clip_gradient: False: the gradient of `x` passes everywhere; True: only where `x` was not clipped. `scale` and
            `zero_point` get none.

    >>> fake_quantize(torch.tensor([-1.0, 0.26, 9.0]), torch.tensor(0.5), torch.tensor(0.0), 0, 3)
    tensor([0.0000, 0.5000, 1.5000])
    """
    result: Tensor = _FakeQuantize.apply(x, scale, qmin - zero_point, qmax - zero_point, clip_gradient)
    return result


def learned_fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """`x` on a grid whose scale is learned (LSQ; Esser et al., ICLR 2020, eqs. 1-5).

    Numbers as from `fake_quantize`. The gradient of `x` passes where it was not clipped; that of `scale` is
    (code - x / scale) inside and the grid's end outside, divided by sqrt(numbers sharing the scale x levels).
    """
    result: Tensor = _LearnedFakeQuantize.apply(x, scale, qmin - zero_point, qmax - zero_point)
    return result


def integers(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """The integer codes of `x`, as int32; arguments as for `fake_quantize`."""
    return (torch.round(x.detach() / scale) + zero_point).clamp(qmin, qmax).to(torch.int32)


def round_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """A bias (O,) in int32 steps of `scale` (O,) or (), with a straight-through gradient.

    `scale` is that of the accumulator, s_x * s_w: integer runtimes store biases so.
    """
    limit = torch.full_like(scale, INT32_LIMIT)
    result: Tensor = _FakeQuantize.apply(bias, scale, -limit, limit, False)
    return result


class _FakeQuantize(torch.autograd.Function):
    """clamp(round(x / scale), low, high) * scale: the same numbers as with a zero point, in fewer passes over memory.

    One new tensor, changed in place; `maximum`/`minimum` because `clamp` with tensor limits is ten times slower.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, clip_gradient: bool) -> Tensor:
        steps = torch.div(x, scale).round_()
        if clip_gradient:
            ctx.save_for_backward((steps >= low).logical_and_(steps <= high))
        ctx.clip_gradient = clip_gradient
        if torch.compiler.is_compiling():  # which fuses the passes, and refuses some tensors as `out`
            return torch.minimum(torch.maximum(steps, low), high) * scale
        torch.maximum(steps, low, out=steps)
        torch.minimum(steps, high, out=steps)
        return steps.mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.clip_gradient:
            (inside,) = ctx.saved_tensors
            gradient = gradient * inside
        return gradient, None, None, None, None


class _LearnedFakeQuantize(torch.autograd.Function):
    """As `_FakeQuantize`, with a gradient for the scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        steps = torch.div(x, scale)
        codes = torch.minimum(torch.maximum(steps.round(), low), high)
        ctx.save_for_backward(steps, codes, scale)
        ctx.levels = float((high - low).max())
        return codes * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        steps, codes, scale = ctx.saved_tensors
        inside = (steps.round() == codes).to(gradient.dtype)
        slope = torch.addcmul(codes, steps, inside, value=-1)  # `where` is thirty times slower on a CPU
        shared = steps.numel() / scale.numel()
        to_scale = (gradient * slope).sum_to_size(scale.shape) / (shared * ctx.levels) ** 0.5
        return gradient * inside, to_scale, None, None
