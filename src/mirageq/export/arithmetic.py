"""A student in the arithmetic of ONNX Runtime's integer kernels: what its file must give, code by code.

On paper a code is round(y / s_y) of a real y. The kernels come near it in float32, each in its own order: a convolution
rounds float32(accumulator) * float32(s_x s_w / s_y), a sum rounds fma(a, s_a / s_y, fma(b, s_b / s_y, offset)). Where y
lies in the middle of two codes the two disagree, and in a deep network one such code changes thousands after it. So a
file is proved against this student, in which each rounding is made as the kernel makes it; what is not written here
(pooling, products) is computed in float64.
"""

# fx types an argument of a node as a union of everything:
# mypy: disable-error-code="union-attr, arg-type, operator, return-value"

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from mirageq.export.emit import saturates
from mirageq.graph import LINEAR, WEIGHTED, stored
from mirageq.quant import Student
from mirageq.quant.fake_quant import grid
from mirageq.quant.operations import CLAMPS, keeps_grid, kind, main_input
from mirageq.quant.quantizers import ActivationQuantizer, BiasQuantizer, WeightQuantizer


def in_double(student: Student) -> Student:
    """A copy that computes in float64, with the very codes of weights and biases that the float32 student has."""
    exact = copy.deepcopy(student)
    for quantizer, weight in exact.quantized_weights():
        quantizer.freeze(weight)
    exact.double()
    biases = student.integer_biases()
    weights = zip(student.quantized_weights(), exact.quantized_weights(), strict=True)
    with torch.no_grad():
        for (quantizer, weight), (_, copied) in weights:
            scale, zero_point = quantizer.affine(weight)
            copied.copy_((quantizer.codes(weight) - zero_point.double()) * scale.double())
        for node in exact.network.graph.find_nodes(op="call_module"):
            part = exact.network.get_submodule(node.target)
            if isinstance(part, BiasQuantizer):
                bias, step = biases[part.name]
                settled = torch.round(bias / step).double() * step.double()
                exact.network.set_submodule(node.target, _Constant(settled))
    return exact


def in_kernel_arithmetic(student: Student) -> nn.Module:
    """Images (N, C, H, W) float64 -> logits (N, classes), rounded as ONNX Runtime rounds; a copy."""
    network = in_double(student).logits_network()
    for node in network.graph.find_nodes(op="call_module"):
        quantizer = network.get_submodule(node.target)
        if isinstance(quantizer, ActivationQuantizer):
            source = node.args[0]
            if kind(source) in CLAMPS and saturates(source, quantizer) and len(source.users) == 1:
                source = source.args[0]
            if (rounding := _rounding(network, source, quantizer)) is not None:
                network.add_submodule(f"{node.target}_rounding", rounding)
                node.target = f"{node.target}_rounding"
                node.args = (source,) if source.target in WEIGHTED else source.args[:2]
    network.graph.eliminate_dead_code()
    return GraphModule(network, network.graph)


def _rounding(network: GraphModule, source: Node, quantizer: ActivationQuantizer) -> nn.Module | None:
    """What replaces a quantizer after this node; None where no integer kernel computes it."""
    if source.target in WEIGHTED and (weight := _weight_scale(network, source)) is not None:
        x = _grid(network, source.args[0])
        return (
            None if x is None else _AfterProduct(quantizer, x.scale.detach().float(), weight, source.target is LINEAR)
        )
    if kind(source) == "add" and all(isinstance(argument, Node) for argument in source.args) and not source.kwargs:
        terms = [_grid(network, argument) for argument in source.args]
        return None if None in terms or len(terms) != 2 else _AfterSum(quantizer, *terms)
    return None


def _grid(network: GraphModule, node: Node | None) -> ActivationQuantizer | _Rounding | None:
    """The quantizer on whose grid a tensor lies."""
    while node is not None and node.op != "call_module":
        node = main_input(node) if keeps_grid(node) else None
    part = network.get_submodule(node.target) if node is not None else None
    return part if isinstance(part, (ActivationQuantizer, _Rounding)) else None


def _weight_scale(network: GraphModule, layer: Node) -> Tensor | None:
    """(O,) float32 of a layer whose weight is quantized."""
    both = layer.args[1].args[0] if layer.args[1].args else None
    part = network.get_submodule(both.target) if isinstance(both, Node) and both.op == "call_module" else None
    if not isinstance(part, WeightQuantizer):
        return None
    return part.affine(stored(network, both.args[0]))[0].detach().flatten().float()


class _Constant(nn.Module):
    """A bias in the steps of one layer; another layer that shares it has its own."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, *_: Tensor) -> Tensor:
        return self.value  # type: ignore[return-value]


class _Rounding(nn.Module):
    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.low, self.high = grid(quantizer.bits, quantizer.symmetric)
        self.scale, self.zero_point = quantizer.scale, quantizer.zero_point

    def on_grid(self, codes: Tensor) -> Tensor:
        return (codes.clamp(self.low, self.high) - self.zero_point) * self.scale  # type: ignore[operator]


class _AfterProduct(_Rounding):
    """Of a convolution or linear layer: float32(accumulator) * float32(s_x s_w / s_y)."""

    def __init__(self, quantizer: ActivationQuantizer, x: Tensor, weight: Tensor, channels_last: bool) -> None:
        super().__init__(quantizer)
        self.channels_last = channels_last
        self.step = x.double() * weight.double()
        self.ratio = (x * weight) / self.scale.float()  # type: ignore[operator]

    def forward(self, y: Tensor) -> Tensor:
        shape = (-1,) if self.channels_last else (-1, *[1] * (y.dim() - 2))
        accumulator = torch.round(y / self.step.view(shape))
        steps = torch.round(accumulator.float() * self.ratio.view(shape))
        return self.on_grid(steps.double() + self.zero_point)  # type: ignore[operator]


class _AfterSum(_Rounding):
    """Of two tensors of codes: fma(a, s_a / s_y, fma(b, s_b / s_y, offset)), each rounded to float32 once."""

    def __init__(
        self, quantizer: ActivationQuantizer, a: ActivationQuantizer | _Rounding, b: ActivationQuantizer | _Rounding
    ) -> None:
        super().__init__(quantizer)
        self.a, self.b = ((part.scale.detach(), part.zero_point.double()) for part in (a, b))  # type: ignore[operator]
        self.ratios = [scale.float() / self.scale.float() for scale, _ in (self.a, self.b)]  # type: ignore[operator]
        shift = fused(self.ratios[0], self.a[1], self.ratios[1] * self.b[1].float())
        self.offset = self.zero_point.float() - shift  # type: ignore[operator]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        (first, second), total = self.ratios, self.offset
        total = fused(second, torch.round(y / self.b[0]) + self.b[1], total)
        total = fused(first, torch.round(x / self.a[0]) + self.a[1], total)
        return self.on_grid(torch.round(total).double())


def fused(factor: Tensor, codes: Tensor, summand: Tensor) -> Tensor:
    """A fused multiply-add of float32 numbers: factor * codes + summand, rounded once."""
    return (factor.double() * codes.double() + summand.double()).float()
