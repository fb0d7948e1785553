"""How integer kernels round: the same sums of integers, brought to codes in float32 in another order each.

Found by comparing each runtime with candidates, layer by layer, where a code lies in the middle of two (ONNX Runtime 1.31.1, OpenVINO 2026.4.1,
on a CPU with VNNI instructions).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mirageq.quant.fake_quant import grid
from mirageq.quant.quantizers import ActivationQuantizer


class Rounding(nn.Module):
    """Takes the place of a quantizer; `scale` and `zero_point` are its own."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.low, self.high = grid(quantizer.bits, quantizer.symmetric)
        self.container = grid(8, quantizer.symmetric)
        self.scale: Tensor = quantizer.scale  # type: ignore[assignment]
        self.zero_point: Tensor = quantizer.zero_point  # type: ignore[assignment]

    def on_grid(self, codes: Tensor) -> Tensor:
        """The values, float64, of codes that may lie outside the grid."""
        return (codes.double().clamp(self.low, self.high) - self.zero_point) * self.scale


class OrtProduct(Rounding):
    """Of a convolution or linear layer: float32(accumulator) * float32(s_x s_w / s_y).

    Args:
        x: () float32, scale of the layer's input.
        weight: (O,) float32, scales of its weight.
        bias: (O,) float64.
        channels_last: where the channels of its output are.
    """

    def __init__(
        self, quantizer: ActivationQuantizer, x: Tensor, weight: Tensor, bias: Tensor, channels_last: bool
    ) -> None:
        super().__init__(quantizer)
        self.channels_last = channels_last
        self.step = x.double() * weight.double()
        self.float_step = x * weight
        self.bias = torch.round(bias / self.step)

    def forward(self, y: Tensor) -> Tensor:
        """A layer's output (N, O, ...) float64, on the quantizer's grid."""
        accumulator = torch.round(y / self._along(y, self.step)).float()
        ratio = self.float_step / self.scale.float()
        return self.on_grid(torch.round(accumulator * self._along(y, ratio)) + self.zero_point)

    def _along(self, y: Tensor, values: Tensor) -> Tensor:
        """(O,) shaped to go with `y`."""
        return values.view(-1) if self.channels_last else values.view(-1, *[1] * (y.dim() - 2))

    def _parts(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The accumulator without its bias, and the bias, both in float32 steps."""
        bias = self._along(y, self.bias)
        return (torch.round(y / self._along(y, self.step)) - bias).float(), bias.float()


class OrtSum(Rounding):
    """Of two tensors of codes: fma(a, s_a / s_y, fma(b, s_b / s_y, offset)), each rounded to float32 once."""

    def __init__(
        self, quantizer: ActivationQuantizer, a: ActivationQuantizer | Rounding, b: ActivationQuantizer | Rounding
    ) -> None:
        super().__init__(quantizer)
        self.a, self.b = _scale_and_zero_point(a), _scale_and_zero_point(b)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        first, second = (scale.float() / self.scale.float() for scale, _ in (self.a, self.b))
        total = self.zero_point.float() - fused(first, self.a[1], second * self.b[1].float())
        total = fused(second, torch.round(y / self.b[0]) + self.b[1], total)
        total = fused(first, torch.round(x / self.a[0]) + self.a[1], total)
        return self.on_grid(torch.round(total))


def _scale_and_zero_point(part: ActivationQuantizer | Rounding) -> tuple[Tensor, Tensor]:
    scale, zero_point = part.scale, part.zero_point
    assert isinstance(scale, Tensor)
    assert isinstance(zero_point, Tensor)
    return scale.detach().double(), zero_point.double()


class OpenvinoProduct(OrtProduct):
    """The bias is added in float; the grid is kept as its ends, and the zero point lies inside the rounding."""

    def forward(self, y: Tensor) -> Tensor:
        """As in `OrtProduct`."""
        accumulator, bias = self._parts(y)
        step = self._along(y, self.float_step)
        scale, zero_point = self.scale.float(), self.zero_point.float()
        lowest, highest = ((end - zero_point) * scale for end in self.container)
        inverse = (self.container[1] - self.container[0]) / (highest - lowest)
        shift = self.container[0] - lowest * inverse
        return self.on_grid(torch.round(fused(inverse, accumulator * step + bias * step, shift)))


class OpenvinoRoundedProduct(OrtProduct):
    """Rounded by float operations behind the kernel, whose divisor it folded into its own scale and bias."""

    def forward(self, y: Tensor) -> Tensor:
        """As in `OrtProduct`."""
        accumulator, bias = self._parts(y)
        step, inverse = self._along(y, self.float_step), 1 / self.scale.float()
        steps = accumulator * (step * inverse) + (bias * step) * inverse
        return self.on_grid(torch.round(steps) + self.zero_point)


class OpenvinoSum(OrtSum):
    """The two values are added as they are."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """As in `OrtSum`."""
        first = torch.round(x / self.a[0]).float() * self.a[0].float()
        second = torch.round(y / self.b[0]).float() * self.b[0].float()
        inverse, zero_point = 1 / self.scale.float(), self.zero_point.float()
        return self.on_grid(torch.round((first + second) * inverse + zero_point))


def fused(factor: Tensor, codes: Tensor, summand: Tensor) -> Tensor:
    """A fused multiply-add of float32 numbers: factor * codes + summand, rounded once."""
    return (factor.double() * codes.double() + summand.double()).float()


@dataclass(frozen=True)
class Kernels:
    """What a runtime rounds after products, after products that a sum reads, and after sums of two."""

    product: type[OrtProduct]
    product_before_sum: type[OrtProduct]
    sum: type[OrtSum]


KERNELS = {
    "onnxruntime": Kernels(OrtProduct, OrtProduct, OrtSum),
    "openvino": Kernels(OpenvinoProduct, OpenvinoRoundedProduct, OpenvinoSum),
}
