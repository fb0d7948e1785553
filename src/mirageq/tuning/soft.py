"""Quantizers while a block is reconstructed: rounding between two codes, steps that learn, noise that drops out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        self._share: Tensor = _Share.apply(self.up)
        result: Tensor = _SoftRounding.apply(self._share, scale, self.base, self.low, self.high)
        return result, scale.detach()

    def indecision(self, sharpness: float) -> Tensor:
        """Sum of 1 - |2h - 1|^sharpness, sharpness > 1, of the last pass: zero once each code has made up its mind."""
        result: Tensor = _Indecision.apply(self._share, sharpness)
        return result

    @torch.no_grad()
    def settle(self, quantizer: WeightQuantizer, weight: nn.Parameter) -> None:
        """Move the weight to the codes that were chosen, and the quantizer's step to the one that was learned."""
        codes = _on_grid(self.base + (self.up >= 0).float(), self.low, self.high)
        quantizer.fix(self.scale.detach())
        weight.copy_(codes * quantizer.scale)  # type: ignore[operator]


class _Share(torch.autograd.Function):
    """h, how far each code is on its way from the lower to the upper one; piece by piece, as all below."""

    @staticmethod
    def forward(ctx: Any, up: Tensor) -> Tensor:
        share, slope = torch.empty_like(up), torch.empty_like(up)
        width = STRETCH[1] - STRETCH[0]
        for rows, out, out_slope in _rows(up, share, slope):
            sigmoid = torch.sigmoid(rows)
            stretched = torch.mul(sigmoid, width, out=out_slope).add_(STRETCH[0])
            torch.clamp(stretched, 0, 1, out=out)
            inside = torch.eq(stretched, out, out=out_slope)
            inside.mul_(torch.addcmul(sigmoid, sigmoid, sigmoid, value=-1).mul_(width))
        ctx.save_for_backward(slope)
        return share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return gradient * slope


class _SoftRounding(torch.autograd.Function):
    """clamp(base + h, low, high) * scale, without booleans: faster than plain autograd."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, scale: Tensor, base: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(share, scale, base, low, high)
        result = torch.empty_like(share)
        for rows, step, whole, least, most, out in _rows(share, scale, base, low, high, result):
            torch.mul(_on_grid(rows + whole, least, most), step, out=out)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        share, scale, base, low, high = ctx.saved_tensors
        to_share, to_scale = torch.empty_like(share), torch.empty_like(scale)
        tensors = (share, scale, base, low, high, gradient, to_share, to_scale)
        for rows, step, whole, least, most, given, out, out_scale in _rows(*tensors):
            codes = rows + whole
            clipped = _on_grid(codes, least, most)
            out_scale.copy_(torch.mul(given, clipped, out=out).flatten(1).sum(1).view_as(out_scale))
            inside = torch.eq(codes, clipped, out=clipped)
            torch.mul(given, step, out=out).mul_(inside)
        return to_share, to_scale, None, None, None


class _Indecision(torch.autograd.Function):
    """sum(1 - |2h - 1|^sharpness), with its gradient at once, for one power instead of two."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, sharpness: float) -> Tensor:
        total, to_share = share.new_zeros(()), torch.empty_like(share)
        for rows, out in _rows(share, to_share):
            side = torch.mul(rows, 2).sub_(1)
            sure = side.abs()
            power = sure.log().mul_(sharpness - 1).exp_()  # half the time of `pow`
            total += power.numel() - sure.mul_(power).sum()
            torch.mul(power, side.sign_(), out=out).mul_(-2 * sharpness)
        ctx.save_for_backward(to_share)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (to_share,) = ctx.saved_tensors
        return to_share * gradient, None


def _on_grid(codes: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Codes (O, ...) within what the grid of each of the O rows has."""
    clipped = torch.maximum(codes, low)
    return torch.minimum(clipped, high, out=clipped)


class Dropping:
    """Which numbers stay in full precision (QDrop; Wei et al., ICLR 2022): each with a probability, anew at each call.

    What is dropped is a window, begun at random, of twice as many random numbers as there are places, which are drawn
    once. To draw each anew takes a quarter of the quantizer's time, and more where they have to go to a GPU.
    """

    def __init__(self, probability: float, generator: torch.Generator) -> None:
        self.probability, self.generator = probability, generator
        self._drawn = torch.empty(0)

    def mask(self, like: Tensor) -> Tensor:
        """(numbers of `like`,): 1 for those that stay, else 0."""
        count = like.numel()
        if len(self._drawn) < 2 * count:
            kept = torch.rand(2 * count, generator=self.generator) < self.probability
            self._drawn = kept.to(like.device, torch.float32)
        start = int(torch.randint(len(self._drawn) - count + 1, (), generator=self.generator))
        return self._drawn[start : start + count]

    def __call__(self, quantized: Tensor, full: Tensor) -> Tensor:
        """`quantized`, but what stays is that of `full`; any one shape, no gradient."""
        full = _dense(full)
        return torch.lerp(_flat(_laid_out(quantized, full)), _flat(full), self.mask(full)).as_strided_(
            full.shape, full.stride()
        )


class DroppingActivation(_LearnedScale):
    """An activation whose step learns (LSQ) and whose quantization is left out at random (QDrop).

    What stays in full precision flattens the loss around the quantized point. Numbers and gradients are those of
    `dropping(learned_fake_quantize(x, ...), x)`.
    """

    def __init__(self, quantizer: ActivationQuantizer, dropping: Dropping) -> None:
        super().__init__(quantizer.scale.detach().clone())  # type: ignore[operator]
        zero_point = float(quantizer.zero_point)  # type: ignore[arg-type]
        self.low, self.high = (bound - zero_point for bound in grid(quantizer.bits, quantizer.symmetric))
        self.dropping = dropping

    def forward(self, x: Tensor) -> Tensor:
        x = _dense(x)
        result: Tensor = _QuantizeAndDrop.apply(x, self.scale, self.low, self.high, self.dropping.mask(x))
        return result

    @torch.no_grad()
    def settle(self, quantizer: ActivationQuantizer) -> None:
        quantizer.scale.copy_(self.scale)  # type: ignore[operator]


class _QuantizeAndDrop(torch.autograd.Function):
    """Learned fake quantization (LSQ) and dropping, piece by piece: what fits a core's cache takes half the time.

    A number passes the gradient on if it stays or is not clipped. Twice `x` at twice the scale give twice the result,
    so the scale times its gradient is what remains of gradient * result without x times its own gradient (Euler).
    Floats throughout: what compares into bytes or computes with booleans takes five to thirty times as long on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: float, high: float, stays: Tensor) -> Tensor:
        result, passes = torch.empty_like(x), torch.empty_like(stays)
        for source, leave, out, through in _pieces(x, stays, result, passes):
            torch.div(source, scale, out=out)
            codes = out.round_().clamp(low, high)
            torch.maximum(torch.eq(codes, out, out=through), leave, out=through)
            torch.lerp(codes.mul_(scale), source, leave, out=out)
        ctx.save_for_backward(x, scale, passes, result)
        ctx.levels = high - low
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, passes, result = ctx.saved_tensors
        to_x, to_scale = torch.empty_like(x), torch.zeros_like(scale)
        for source, through, value, given, out in _pieces(x, passes, result, _laid_out(gradient, x), to_x):
            torch.mul(given, through, out=out)
            to_scale += torch.dot(given, torch.addcmul(value, source, through, value=-1))
        return to_x, to_scale / scale / (x.numel() * ctx.levels) ** 0.5, None, None, None


def _dense(x: Tensor) -> Tensor:
    """`x` without gaps in memory, channels last or not."""
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return x if dense else x.contiguous()


def _flat(x: Tensor) -> Tensor:
    """The numbers of a dense tensor in the order of memory."""
    return x.as_strided((x.numel(),), (1,))


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """`x` with its numbers in memory as those of `like` are."""
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


def _rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors (O, ...) side by side, so many rows at a time as fit a core's cache."""
    first = tensors[0]
    return _side_by_side(tensors, max(PIECE * len(first) // first.numel(), 1))


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Dense tensors of one layout side by side in the order of memory, in pieces that fit a core's cache."""
    return _side_by_side([_flat(tensor) for tensor in tensors], PIECE)


def _side_by_side(tensors: Sequence[Tensor], fits: int) -> Iterator[tuple[Tensor, ...]]:
    """Up to `fits` of the first dimension at a time; all at once if they are not more, or not on a CPU."""
    if len(tensors[0]) <= fits or tensors[0].device.type != "cpu":
        return iter([tuple(tensors)])
    return zip(*(tensor.split(fits) for tensor in tensors), strict=True)
