"""Quantizers while a block is reconstructed: rounding between two codes, steps that learn, noise that drops out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mirageq.quant.fake_quant import SMALLEST_SCALE, grid
from mirageq.quant.quantizers import ActivationQuantizer, WeightQuantizer

STRETCH = (-0.1, 1.1)
PIECE = 2**17  # numbers, half a megabyte


class _LearnedScale(nn.Module):
    """A scale, of any shape, whose every number learns at a rate relative to where it started, however small."""

    def __init__(self, start: Tensor, learned: bool = True) -> None:
        super().__init__()
        self.start = start
        self.factor = nn.Parameter(torch.ones_like(start), requires_grad=learned)

    @property
    def scale(self) -> Tensor:
        """The scale as it stands."""
        return (self.start * self.factor).clamp(min=SMALLEST_SCALE)


class SoftWeight(_LearnedScale):
    """A weight whose codes are floor(w / s) + h, h in [0, 1] learned and pushed to its ends (AdaRound, eqs. 21-24).

    Nagel et al., ICML 2020. h is a stretched sigmoid, so that it reaches 0 and 1. With `learn_scale` the step learns
    too, while the codes' base floor(w / s) stays (GENIE-M's joint scale and rounding, Jeon et al., CVPR 2023).
    """

    def __init__(self, quantizer: WeightQuantizer, weight: Tensor, learn_scale: bool) -> None:
        scale, zero_point = (value.detach().clone() for value in quantizer.affine(weight))
        super().__init__(scale, learn_scale)
        low, high = grid(quantizer.bits, quantizer.symmetric)
        self.low, self.high = low - zero_point, high - zero_point
        steps = weight.detach() / scale
        self.base = steps.floor()
        share = ((steps - self.base) - STRETCH[0]) / (STRETCH[1] - STRETCH[0])
        self.up = nn.Parameter(torch.logit(share.clamp(1e-4, 1 - 1e-4)))

    def forward(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.scale
        result: Tensor = _SoftRounding.apply(self.up, scale, self.base, self.low, self.high)
        return result, scale.detach()

    def indecision(self, sharpness: float) -> Tensor:
        """Sum of 1 - |2h - 1|^sharpness, with sharpness > 1: zero once each code has made up its mind."""
        result: Tensor = _Indecision.apply(self.up, sharpness)
        return result

    @torch.no_grad()
    def settle(self, quantizer: WeightQuantizer, weight: nn.Parameter) -> None:
        """Move the weight to the codes that were chosen, and the quantizer's step to the one that was learned."""
        codes = _on_grid(self.base + (self.up >= 0).float(), self.low, self.high)
        quantizer.fix(self.scale.detach())
        weight.copy_(codes * quantizer.scale)  # type: ignore[operator]


class _SoftRounding(torch.autograd.Function):
    """clamp(base + h(up), low, high) * scale, piece by piece and without booleans: faster than plain autograd."""

    @staticmethod
    def forward(ctx: Any, up: Tensor, scale: Tensor, base: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(up, scale, base, low, high)
        result = torch.empty_like(up)
        for rows, step, whole, least, most, out in _rows(up, scale, base, low, high, result):
            torch.mul(_on_grid(_share(rows).add_(whole), least, most), step, out=out)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        up, scale, base, low, high = ctx.saved_tensors
        to_up, to_scale = torch.empty_like(up), torch.empty_like(scale)
        tensors = (up, scale, base, low, high, gradient, to_up, to_scale)
        for rows, step, whole, least, most, given, out, out_scale in _rows(*tensors):
            share, slope = _share_and_slope(rows)
            codes = share.add_(whole)
            clipped = _on_grid(codes, least, most)
            out_scale.copy_((given * clipped).flatten(1).sum(1).view_as(out_scale))
            inside = torch.eq(codes, clipped, out=clipped)
            torch.mul(given, step, out=out).mul_(slope).mul_(inside)
        return to_up, to_scale, None, None, None


class _Indecision(torch.autograd.Function):
    """sum(1 - |2 h(up) - 1|^sharpness), with its gradient at once, for one power instead of two."""

    @staticmethod
    def forward(ctx: Any, up: Tensor, sharpness: float) -> Tensor:
        total, to_up = up.new_zeros(()), torch.empty_like(up)
        for rows, out in _rows(up, to_up):
            share, slope = _share_and_slope(rows)
            side = share.mul_(2).sub_(1)
            sure = side.abs()
            power = sure.pow(sharpness - 1)
            total += power.numel() - (power * sure).sum()
            torch.mul(power, side.sign_(), out=out).mul_(slope).mul_(-2 * sharpness)
        ctx.save_for_backward(to_up)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (to_up,) = ctx.saved_tensors
        return to_up * gradient, None


def _on_grid(codes: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Codes (O, ...) within what the grid of each of the O rows has."""
    clipped = torch.maximum(codes, low)
    return torch.minimum(clipped, high, out=clipped)


def _share(up: Tensor) -> Tensor:
    """h, how far each code is on its way from the lower to the upper one."""
    return torch.sigmoid(up).mul_(STRETCH[1] - STRETCH[0]).add_(STRETCH[0]).clamp_(0, 1)


def _share_and_slope(up: Tensor) -> tuple[Tensor, Tensor]:
    """h and its slope, 0 where h is at an end."""
    width = STRETCH[1] - STRETCH[0]
    sigmoid = torch.sigmoid(up)
    stretched = sigmoid * width + STRETCH[0]
    share = stretched.clamp(0, 1)
    inside = torch.eq(share, stretched, out=stretched)
    return share, torch.addcmul(sigmoid, sigmoid, sigmoid, value=-1).mul_(width).mul_(inside)


class DroppingActivation(_LearnedScale):
    """An activation whose step learns (LSQ) and whose quantization is left out at random (QDrop).

    Wei et al., ICLR 2022. Each number stays in full precision with probability `drop`, which flattens the loss around
    the quantized point. Numbers and gradients are those of `dropping(learned_fake_quantize(x, ...), x, ...)`.
    """

    def __init__(self, quantizer: ActivationQuantizer, drop: float, generator: torch.Generator) -> None:
        super().__init__(quantizer.scale.detach().clone())  # type: ignore[operator]
        zero_point = float(quantizer.zero_point)  # type: ignore[arg-type]
        self.low, self.high = (bound - zero_point for bound in grid(quantizer.bits, quantizer.symmetric))
        self.drop, self.generator = drop, generator

    def forward(self, x: Tensor) -> Tensor:
        x = _dense(x)
        dropped = _chosen(x, self.drop, self.generator)
        result: Tensor = _QuantizeAndDrop.apply(x, self.scale, self.low, self.high, dropped)
        return result

    @torch.no_grad()
    def settle(self, quantizer: ActivationQuantizer) -> None:
        quantizer.scale.copy_(self.scale)  # type: ignore[operator]


class _QuantizeAndDrop(torch.autograd.Function):
    """Learned fake quantization (LSQ) and dropping, piece by piece: what fits a core's cache takes half the time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: float, high: float, dropped: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, dropped)
        ctx.limits = low, high
        result = torch.empty_like(x)
        for source, leave, out in _pieces(x, dropped, result):
            torch.div(source, scale, out=out)
            out.round_().clamp_(low, high).mul_(scale)
            out.lerp_(source, leave.to(x.dtype))  # `where` is thirty times slower on a CPU
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, dropped = ctx.saved_tensors
        low, high = ctx.limits
        to_x = torch.empty_like(x)
        gradient = _laid_out(gradient, x)
        to_scale = torch.zeros_like(scale)
        for source, leave, given, out in _pieces(x, dropped, gradient, to_x):
            steps = source / scale
            codes = steps.round()
            slope = codes.clamp(low, high)
            inside = torch.eq(codes, slope, out=codes)
            slope.addcmul_(steps, inside, value=-1)
            torch.mul(given, leave, out=out)  # past the quantizer
            through = given - out
            to_scale += torch.dot(through, slope)
            out.addcmul_(through, inside)
        return to_x, to_scale / (x.numel() * (high - low)) ** 0.5, None, None, None


def dropping(quantized: Tensor, full: Tensor, drop: float, generator: torch.Generator) -> Tensor:
    """Each number of `quantized` replaced by that of `full` with probability `drop`; any one shape, no gradient."""
    if not drop:
        return quantized
    full = _dense(full)
    quantized, result = _laid_out(quantized, full), torch.empty_like(full)
    for one, other, leave, out in _pieces(quantized, full, _chosen(full, drop, generator), result):
        torch.lerp(one, other, leave.to(full.dtype), out=out)
    return result


def _chosen(like: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """1 with a probability (in steps of 1/256), else 0: a byte for each number of `like` in the order of memory.

    Eight bytes at a draw: a quarter of the time of `uniform_`. Drawn on the CPU, for the same numbers on every device.
    Bytes, for what compares into booleans and computes with them takes up to fifteen times as long on a CPU.
    """
    drawn = torch.empty(-(-like.numel() // 8), dtype=torch.int64)
    if probability:
        drawn.random_(-(2**63), None, generator=generator)
    chosen = drawn.view(torch.uint8)[: like.numel()]
    return torch.lt(chosen, min(round(256 * probability), 255), out=chosen).to(like.device)


def _dense(x: Tensor) -> Tensor:
    """`x` without gaps in memory, channels last or not."""
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return x if dense else x.contiguous()


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """`x` with its numbers in memory as those of `like` are."""
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


def _rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors (O, ...) side by side, so many rows at a time as fit a core's cache."""
    first = tensors[0]
    fits = max(PIECE * len(first) // first.numel(), 1) if first.device.type == "cpu" else len(first)
    return zip(*(tensor.split(fits) for tensor in tensors), strict=True)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Dense tensors of one layout side by side in the order of memory, in pieces that fit a core's cache."""
    flat = [tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors]
    piece = PIECE if tensors[0].device.type == "cpu" else len(flat[0])
    return zip(*(tensor.split(piece) for tensor in flat), strict=True)
