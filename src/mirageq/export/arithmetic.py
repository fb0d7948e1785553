"""A student in the arithmetic of a runtime's integer kernels: what its file must give, code by code.

On paper a code is round(y / s_y) of a real y. The kernels (`mirageq.export.kernels`) come near it in float32, each in
its own order. Where y lies in the middle of two codes the two disagree, and in a deep network one such code changes
thousands after it. So a file is proved against this student, in which each rounding is made as the kernel makes it;
what is not written there (pooling, products) is computed in float64.
"""

# fx types an argument of a node as a union of everything:
# mypy: disable-error-code="union-attr, arg-type, operator, return-value"

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from mirageq.export.emit import feeds_sum, rounded_by
from mirageq.export.kernels import KERNELS, Kernels, Requantization, Rounding
from mirageq.graph import LINEAR, WEIGHTED, device_of, is_stored, kind, stored
from mirageq.quant import Student
from mirageq.quant.operations import keeps_grid, main_input
from mirageq.quant.quantizers import ActivationQuantizer, BiasQuantizer, WeightQuantizer


def in_double(student: Student) -> Student:
    """A copy that computes in float64, with the very codes that the float32 student has of weights and biases.

    From grid to grid it goes in float32 as well, for exact ties to fall as the student's do.
    """
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
            elif isinstance(part, ActivationQuantizer) and node.args[0].op == "call_module":
                exact.network.set_submodule(node.target, Requantization(part))
    return exact


def in_kernel_arithmetic(student: Student, runtime: str) -> nn.Module:
    """Images (N, C, H, W) float64 -> logits (N, classes), rounded as the kernels of one of `KERNELS` round; a copy."""
    kernels = KERNELS[runtime]
    network = in_double(student).logits_network()
    for node in network.graph.find_nodes(op="call_module"):
        quantizer = network.get_submodule(node.target)
        if isinstance(quantizer, Requantization):
            network.set_submodule(node.target, kernels.requantization(quantizer.quantizer))
        elif isinstance(quantizer, ActivationQuantizer):
            source, *bounds = rounded_by(node, quantizer)
            if (rounding := _rounding(network, node, source, quantizer, kernels)) is not None:
                rounding.low, rounding.high = bounds
                network.add_submodule(f"{node.target}_rounding", rounding)
                node.target = f"{node.target}_rounding"
                node.args = (source,) if source.target in WEIGHTED else source.args[:2]
    network.graph.eliminate_dead_code()
    return GraphModule(network, network.graph)


def _rounding(
    network: GraphModule, node: Node, source: Node, quantizer: ActivationQuantizer, kernels: Kernels
) -> Rounding | None:
    """What replaces a quantizer after `source`; None where no integer kernel computes it."""
    if source.target in WEIGHTED and (weight := _weight_scale(network, source)) is not None:
        x, bias = _grid(network, source.args[0]), _bias(network, source, len(weight))
        if x is None or bias is None:
            return None
        product = kernels.product_before_sum if feeds_sum(source, node) else kernels.product
        return product(quantizer, x.scale.detach().float(), weight, bias, source.target is LINEAR)
    if kind(source) == "add" and all(isinstance(argument, Node) for argument in source.args) and not source.kwargs:
        terms = [_grid(network, argument) for argument in source.args]
        return None if None in terms or len(terms) != 2 else kernels.sum(quantizer, *terms)
    return None


def _grid(network: GraphModule, node: Node | None) -> ActivationQuantizer | Rounding | None:
    """The quantizer on whose grid a tensor lies."""
    while node is not None and node.op != "call_module":
        node = main_input(node) if keeps_grid(node) else None
    part = network.get_submodule(node.target) if node is not None else None
    return part if isinstance(part, (ActivationQuantizer, Rounding)) else None


def _weight_scale(network: GraphModule, layer: Node) -> Tensor | None:
    """(O,) float32 of a layer whose weight is quantized."""
    both = layer.args[1].args[0] if layer.args[1].args else None
    part = network.get_submodule(both.target) if isinstance(both, Node) and both.op == "call_module" else None
    if not isinstance(part, WeightQuantizer):
        return None
    return part.affine(stored(network, both.args[0]))[0].detach().flatten().float()


def _bias(network: GraphModule, layer: Node, channels: int) -> Tensor | None:
    """(O,) float64, as it was settled; zeros for a layer without, None for one that is computed from the image."""
    node = layer.args[2] if len(layer.args) > 2 else None
    if node is None:
        return torch.zeros(channels, dtype=torch.float64, device=device_of(network))
    part = network.get_submodule(node.target) if node.op == "call_module" else None
    if isinstance(part, _Constant):
        return part.value  # type: ignore[return-value]
    return stored(network, node).double() if is_stored(node) else None


class _Constant(nn.Module):
    """A bias in the steps of one layer; another layer that shares it has its own."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, *_: Tensor) -> Tensor:
        return self.value  # type: ignore[return-value]
