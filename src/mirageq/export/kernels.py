"""How integer kernels round: the same sums of integers, brought to codes in float32 in another order each.

Found by comparing each runtime with candidates, layer by layer, where a code lies in the middle of two (ONNX Runtime
1.31.1, OpenVINO 2026.4.1, on a CPU with VNNI instructions).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mirageq.quant.fake_quant import grid
from mirageq.quant.quantizers import ActivationQuantizer

# Steps between the ends of an 8-bit container. A tensor, because 255.0 / tensor is 255.0 * (1 / tensor) to PyTorch.
LEVELS = torch.tensor(255.0)


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


class Product(Rounding):
    """After a convolution or linear layer.

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
        self.x, self.weight = x, weight
        self.step = x.double() * weight.double()
        self.bias = torch.round(bias / self.step)

    def forward(self, y: Tensor) -> Tensor:
        """A layer's output (N, O, ...) float64, on the quantizer's grid."""
        step, weight, bias = (
            values if self.channels_last else values.view(-1, *[1] * (y.dim() - 2))
            for values in (self.step, self.weight, self.bias)
        )
        return self.on_grid(self.codes(torch.round(y / step) - bias, bias, weight))

    def codes(self, products: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
        """From integers, the sum of products (N, O, ...) and the bias (O, ...), and the weight's scales (O, ...)."""
        raise NotImplementedError


class Sum(Rounding):
    """After the sum of two tensors on the grids of `a` and `b`."""

    def __init__(
        self, quantizer: ActivationQuantizer, a: ActivationQuantizer | Rounding, b: ActivationQuantizer | Rounding
    ) -> None:
        super().__init__(quantizer)
        self.terms = (a, b)
        self.scales = [_tensor(part.scale) for part in (a, b)]
        self.zero_points = [_tensor(part.zero_point) for part in (a, b)]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Two tensors (N, ...) float64, as one on the quantizer's grid."""
        return self.on_grid(self.codes(torch.round(x / self.scales[0]), torch.round(y / self.scales[1])))

    def codes(self, a: Tensor, b: Tensor) -> Tensor:
        """From the codes of both, (N, ...) float64 without their zero points."""
        raise NotImplementedError


class Requantization(Rounding):
    """After values that lie on another grid already: in float32, where exact ties are common and fall as there."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__(quantizer)
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        """A tensor float64 of numbers on a grid, on the quantizer's."""
        return self.on_grid(self.codes(x.float()))

    def codes(self, x: Tensor) -> Tensor:
        """From numbers float32."""
        return torch.round(x / self.scale.float()) + self.zero_point


class OrtProduct(Product):
    """float32(accumulator) * float32(s_x s_w / s_y)."""

    def codes(self, products: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
        """As in `Product`."""
        return torch.round((products + bias).float() * (self.x * weight / self.scale.float())) + self.zero_point


class OrtSum(Sum):
    """fma(a, s_a / s_y, fma(b, s_b / s_y, offset)), each rounded to float32 once."""

    def codes(self, a: Tensor, b: Tensor) -> Tensor:
        """As in `Sum`."""
        first, second = (scale.float() / self.scale.float() for scale in self.scales)
        zero_a, zero_b = self.zero_points
        total = self.zero_point.float() - fused(first, zero_a, second * zero_b.float())
        return torch.round(fused(first, a + zero_a, fused(second, b + zero_b, total)))


class OpenvinoProduct(Product):
    """The bias is added in float; the zero point, found from the ends of the grid, lies inside the rounding."""

    def codes(self, products: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
        """As in `Product`."""
        step = self.x * weight
        return _between(_ends(self), products.float() * step + bias.float() * step) + self.container[0]


class OpenvinoRoundedProduct(Product):
    """Rounded by float operations behind the kernel, whose divisor is folded into the weight's scales and the bias."""

    def codes(self, products: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
        """As in `Product`."""
        inverse = 1 / self.scale.float()
        bias = bias.float() * (self.x * weight)
        steps = products.float() * (self.x * (weight * inverse)) + bias * inverse
        return torch.round(steps) + self.zero_point


class OpenvinoSum(Sum):
    """Counted in the steps of the term that is read from memory; the other, of a convolution, is brought to them."""

    def codes(self, a: Tensor, b: Tensor) -> Tensor:
        """As in `Sum`."""
        read, brought = (1, 0) if isinstance(self.terms[0], OpenvinoRoundedProduct) else (0, 1)
        scales = [scale.float() for scale in self.scales]
        zeros = [zero_point.float() for zero_point in self.zero_points]
        codes = [(values + zero).float() for values, zero in zip((a, b), zeros, strict=True)]
        offset = zeros[brought] + zeros[read] * scales[read] / scales[brought]
        total = codes[read] + (codes[brought] - offset) * (scales[brought] / scales[read])
        lowest, highest = _ends(self)
        return _between((lowest / scales[read], highest / scales[read]), total) + self.container[0]


class OpenvinoRequantization(Requantization):
    """Found from the ends of the grid, as after a product."""

    def codes(self, x: Tensor) -> Tensor:
        """As in `Requantization`."""
        return _between(_ends(self), x) + self.container[0]


def _ends(rounding: Rounding) -> tuple[Tensor, Tensor]:
    """The smallest and largest number of the container, as OpenVINO keeps a grid."""
    low, high = rounding.container
    scale, zero_point = rounding.scale.float(), rounding.zero_point.float()
    return (low - zero_point) * scale, (high - zero_point) * scale


def _between(ends: tuple[Tensor, Tensor], values: Tensor) -> Tensor:
    """Values as whole steps from the lower of two ends, of which `LEVELS` lead to the upper."""
    lowest, highest = ends
    step = 1 / (LEVELS / (highest - lowest))  # handed on as the step of what is written, and inverted again
    shift = -lowest * LEVELS / (highest - lowest)  # not always whole
    return torch.round(fused(1 / step, values, shift))


def _tensor(value: Tensor | nn.Module) -> Tensor:
    """A buffer, for the type checker."""
    assert isinstance(value, Tensor)
    return value.detach().double()


def fused(factor: Tensor, codes: Tensor, summand: Tensor) -> Tensor:
    """A fused multiply-add of float32 numbers: factor * codes + summand, rounded once."""
    return (factor.double() * codes.double() + summand.double()).float()


@dataclass(frozen=True)
class Kernels:
    """What a runtime rounds after products, after products that a sum reads, after sums of two, and between grids."""

    product: type[Product]
    product_before_sum: type[Product]
    sum: type[Sum]
    requantization: type[Requantization]


KERNELS = {
    "onnxruntime": Kernels(OrtProduct, OrtProduct, OrtSum, Requantization),
    "openvino": Kernels(OpenvinoProduct, OpenvinoRoundedProduct, OpenvinoSum, OpenvinoRequantization),
}
