"""Quantizers while a block is reconstructed: rounding between two codes, steps that learn, noise that drops out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mirageq.quant.fake_quant import SMALLEST_SCALE, grid, learned_fake_quantize
from mirageq.quant.quantizers import ActivationQuantizer, WeightQuantizer

STRETCH = (-0.1, 1.1)


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
        codes = torch.minimum(torch.maximum(self.base + self.share(), self.low), self.high)
        scale = self.scale
        return codes * scale, scale.detach()

    def share(self) -> Tensor:
        """h: how far each code is on its way from the lower to the upper one."""
        return (torch.sigmoid(self.up) * (STRETCH[1] - STRETCH[0]) + STRETCH[0]).clamp(0, 1)

    def indecision(self, sharpness: float) -> Tensor:
        """Sum of 1 - |2h - 1|^sharpness: zero once each code has made up its mind."""
        return (1 - (2 * self.share() - 1).abs().pow(sharpness)).sum()

    @torch.no_grad()
    def settle(self, quantizer: WeightQuantizer, weight: nn.Parameter) -> None:
        """Move the weight to the codes that were chosen, and the quantizer's step to the one that was learned."""
        codes = torch.minimum(torch.maximum(self.base + (self.share() >= 0.5).float(), self.low), self.high)
        quantizer.fix(self.scale.detach())
        weight.copy_(codes * quantizer.scale)  # type: ignore[operator]


class DroppingActivation(_LearnedScale):
    """An activation whose step learns (LSQ) and whose quantization is left out at random (QDrop).

    Wei et al., ICLR 2022. Each number stays in full precision with probability `drop`, which flattens the loss around
    the quantized point.
    """

    def __init__(self, quantizer: ActivationQuantizer, drop: float, generator: torch.Generator) -> None:
        super().__init__(quantizer.scale.detach().clone())  # type: ignore[operator]
        self.bounds = grid(quantizer.bits, quantizer.symmetric)
        self.zero_point = quantizer.zero_point
        self.drop, self.generator = drop, generator

    def forward(self, x: Tensor) -> Tensor:
        quantized = learned_fake_quantize(x, self.scale, self.zero_point, *self.bounds)  # type: ignore[arg-type]
        return dropping(quantized, x, self.drop, self.generator)

    @torch.no_grad()
    def settle(self, quantizer: ActivationQuantizer) -> None:
        quantizer.scale.copy_(self.scale)  # type: ignore[operator]


def dropping(quantized: Tensor, full: Tensor, drop: float, generator: torch.Generator) -> Tensor:
    """Each number of `quantized` replaced by that of `full` with probability `drop`; any one shape.

    Drawn on the CPU, for the same numbers on every device; `lerp` because `where` is thirty times slower there.
    """
    if not drop:
        return quantized
    return torch.lerp(quantized, full, _chances(full, drop, generator))


def _chances(like: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """1 with a probability (in steps of 1/256), else 0, shaped and laid out as `like`.

    From a byte for each number, eight at a draw: a quarter of the time of `uniform_`.
    """
    layout = torch.empty_like(like, device="meta")
    drawn = torch.empty(-(-like.numel() // 8), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    chances = drawn.view(torch.uint8)[: like.numel()].as_strided(layout.shape, layout.stride())
    return chances.to(like.dtype).lt_(256 * probability).to(like.device)
