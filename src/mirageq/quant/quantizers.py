"""The small modules that a student's graph calls: on weights, on activations, on biases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mirageq.errors import UserError
from mirageq.quant.fake_quant import (
    SMALLEST_SCALE,
    affine_parameters,
    fake_quantize,
    grid,
    integers,
    learned_fake_quantize,
    round_bias,
)
from mirageq.quant.ranges import RangeObserver, weight_range
from mirageq.quant.scheme import WeightRange


class WeightQuantizer(nn.Module):
    """Quantizes a weight per output channel.

    With the range "minmax" the grid follows the weight at every forward pass, as in the papers. With "percentile" and
    "mse", or if it is learned, it is set here from the initial weight and kept in `scale` and `zero_point`, both
    (O, 1, ...); a learned `scale` is a parameter.

    Attributes:
        name: of the layer.
        bits, symmetric: of the grid.
    """

    def __init__(
        self,
        name: str,
        weight: Tensor,
        bits: int,
        symmetric: bool,
        kind: WeightRange = "minmax",
        percentile: float = 99.99,
        clip_gradient: bool = False,
        learned: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.bits, self.symmetric = name, bits, symmetric
        self.kind, self.clip_gradient, self.learned = kind, clip_gradient, learned
        self.state: Literal["on", "off"] = "on"
        self.fixed = learned or kind != "minmax"
        if self.fixed:
            lo, hi = weight_range(weight, kind, bits, symmetric, percentile)
            scale, zero_point = affine_parameters(lo, hi, bits, symmetric)
            _register_scale(self, scale, learned)
            self.register_buffer("zero_point", zero_point)

    def forward(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The weight on its grid, and the scale (O, 1, ...) of that grid."""
        scale, zero_point = self.affine(weight)
        if self.state == "off":
            return weight, scale
        bounds = grid(self.bits, self.symmetric)
        if self.learned:
            return learned_fake_quantize(weight, scale, zero_point, *bounds), scale
        return fake_quantize(weight, scale, zero_point, *bounds, self.clip_gradient), scale

    def affine(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point, both (O, 1, ...)."""
        if self.fixed:
            return self.scale, self.zero_point  # type: ignore[return-value]
        return affine_parameters(*weight_range(weight, "minmax", self.bits, self.symmetric), self.bits, self.symmetric)

    def fix(self, scale: Tensor) -> None:
        """Keep this scale (O, 1, ...) from now on; only for a grid that does not follow the weight."""
        with torch.no_grad():
            self.scale.copy_(scale)  # type: ignore[operator]

    def freeze(self, weight: Tensor) -> None:
        """Keep from now on the grid that follows this weight, if it follows."""
        if not self.fixed:
            scale, zero_point = self.affine(weight)
            self.register_buffer("scale", scale.detach())
            self.register_buffer("zero_point", zero_point.detach())
            self.fixed = True

    def switch_on(self) -> None:
        """Quantize again."""
        self.state = "on"

    def codes(self, weight: Tensor) -> Tensor:
        """The integer codes, int32, of the shape of `weight`."""
        return integers(weight, *self.affine(weight), *grid(self.bits, self.symmetric))

    def extra_repr(self) -> str:
        return f"{self.name}, bits={self.bits}, symmetric={self.symmetric}, range={self.kind}"


class ActivationQuantizer(nn.Module):
    """Quantizes an activation per tensor, on a grid set by calibration and then fixed.

    `scale` (a parameter, if it is learned), `zero_point` and `calibrated`, all (), travel in the state dict.

    Attributes:
        name: of the activation, after the layer it follows.
        bits, symmetric: of the grid.
        state: "on"; "off", the identity; or "observing", the identity while `observer` watches.
    """

    def __init__(
        self, name: str, bits: int, symmetric: bool, clip_gradient: bool = False, learned: bool = False
    ) -> None:
        super().__init__()
        self.name, self.bits, self.symmetric, self.clip_gradient = name, bits, symmetric, clip_gradient
        self.learned = learned
        self.state: Literal["on", "off", "observing"] = "on"
        self.observer: RangeObserver | None = None
        _register_scale(self, torch.tensor(float("nan")), learned)
        self.register_buffer("zero_point", torch.tensor(0.0))
        self.register_buffer("calibrated", torch.tensor(False))
        self.ready = False
        """A copy of `calibrated` that costs no wait for the device."""
        self.register_load_state_dict_post_hook(_read_calibrated)

    def forward(self, x: Tensor) -> Tensor:
        if self.state == "off":
            return x
        if self.state == "observing":
            assert self.observer is not None
            self.observer.update(x)
            return x
        if not self.ready:
            raise UserError(
                f"The activation '{self.name}' has no range yet. Call student.calibrate(batches), or load the state "
                "of a calibrated student, before using the student."
            )
        bounds, zero_point = grid(self.bits, self.symmetric), self.zero_point
        if self.learned:
            return learned_fake_quantize(x, self.scale, zero_point, *bounds)  # type: ignore[arg-type]
        return fake_quantize(x, self.scale, zero_point, *bounds, self.clip_gradient)  # type: ignore[arg-type]

    def observe(self, observer: RangeObserver) -> None:
        """Let activations pass in float while `observer` watches them."""
        self.observer, self.state = observer, "observing"

    def switch_on(self) -> None:
        """Stop observing; the range is the one from before."""
        self.observer, self.state = None, "on"

    def set_range(self, lo: Tensor, hi: Tensor) -> None:
        """Fix the grid to cover [lo, hi], both ()."""
        scale, zero_point = affine_parameters(lo, hi, self.bits, self.symmetric)
        with torch.no_grad():
            self.scale.copy_(scale)  # type: ignore[operator]
            self.zero_point.copy_(zero_point)  # type: ignore[operator]
            self.calibrated.fill_(True)  # type: ignore[operator]
        self.ready = True

    def extra_repr(self) -> str:
        return f"{self.name}, bits={self.bits}, symmetric={self.symmetric}, {self.state}"


class BiasQuantizer(nn.Module):
    """Rounds a bias to int32 steps of the accumulator, s_x * s_w, as integer runtimes store it.

    Attributes:
        state: "on" or "off", the identity (while the input's scale is being found).
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.state: Literal["on", "off"] = "on"

    def forward(self, bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
        """`bias` (O,), the scale () of the layer's input, the scales (O, 1, ...) of its weight -> (O,)."""
        if self.state == "off":
            return bias
        return round_bias(bias, (input_scale * weight_scale.flatten()).detach())

    def switch_on(self) -> None:
        """Round again."""
        self.state = "on"

    def extra_repr(self) -> str:
        return self.name


@contextmanager
def in_float(network: nn.Module) -> Iterator[None]:
    """Every quantizer of the network an identity, for as long as this lasts."""
    kinds = (WeightQuantizer, ActivationQuantizer, BiasQuantizer)
    parts = [part for part in network.modules() if isinstance(part, kinds)]
    for part in parts:
        part.state = "off"
    try:
        yield
    finally:
        for part in parts:
            part.switch_on()


def _register_scale(quantizer: nn.Module, scale: Tensor, learned: bool) -> None:
    if learned:
        quantizer.scale = nn.Parameter(scale)
    else:
        quantizer.register_buffer("scale", scale)


@torch.no_grad()
def keep_positive(network: nn.Module) -> None:
    """Bring learned scales that an update took below the smallest one back to it, from where they can grow again."""
    for part in network.modules():
        if isinstance(part, (WeightQuantizer, ActivationQuantizer)) and part.learned:
            part.scale.clamp_(min=SMALLEST_SCALE)  # type: ignore[operator]


def _read_calibrated(module: Any, _: Any) -> None:
    module.ready = bool(module.calibrated)
