"""Batch normalisations written into convolutions, as an integer runtime needs them."""

# fx types an argument of a node as a union of everything:
# mypy: disable-error-code="union-attr, arg-type, operator, return-value"

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from mirageq.graph import (
    LINEAR,
    WEIGHTED,
    argument,
    aten,
    batch_norms,
    free_name,
    is_stored,
    layer_name,
    scale_and_shift,
    stored,
)
from mirageq.quant.remembered import MOMENTS

FOLDED = "folded norm"
"""The key of the `meta` of a convolution that was a norm."""

POINTWISE = {3: aten.conv1d.default, 4: aten.conv2d.default, 5: aten.conv3d.default}


def fold_batch_norms(module: GraphModule) -> GraphModule:
    """A copy of the network without batch normalisations that computes the same function.

    In evaluation mode a norm is x * gain + shift per channel, gain = gamma / sqrt(var + eps) and
    shift = beta - mean * gain.

    * Directly after a convolution or linear layer that nothing else reads, gain and shift go into its weight and bias.
      The weight keeps its name; a new bias is called `<layer>.bias`.
    * Anywhere else (DenseNet's norms after a concatenation, a convolution that others read too) the norm becomes a
      depthwise 1x1 convolution, named after the norm. It is as exact, and an integer runtime can run it.

    A weight or norm that is used twice is folded into separate copies (`<name>_2`).
    """
    module = copy.deepcopy(module)
    norms = [(node, *_gain_and_shift(module, node)) for node in batch_norms(module.graph)]
    for node, gain, shift in norms:
        if _follows_its_layer(node):
            _fold(module, node, gain, shift)
        else:
            _replace(module, node, gain, shift)
    module.graph.eliminate_dead_code()
    module = GraphModule(module, module.graph)  # without the tensors that nothing reads any more
    module.graph.lint()
    return module


def is_folded_norm(layer: Node) -> bool:
    """Whether a layer is what became of a norm that could not go into a layer before it."""
    return FOLDED in layer.meta


def _gain_and_shift(module: GraphModule, node: Node) -> tuple[Tensor, Tensor]:
    """(C,) each, in float64: products of small numbers are rounded once, in the folded weight."""
    gamma, beta = scale_and_shift(module, node, "can be folded. Use the placement 'paper'.")
    _, _, _, mean, var, _, _, eps, *_ = node.args
    deviation = (stored(module, var).detach().double() + eps).sqrt()
    gain = (gamma.double() if gamma is not None else 1.0) / deviation
    shift = -stored(module, mean).detach().double() * gain
    return gain, shift + beta.double() if beta is not None else shift


def _follows_its_layer(node: Node) -> bool:
    layer = node.args[0]
    if layer.target not in WEIGHTED or len(layer.users) > 1 or not is_stored(layer.args[1]):
        return False
    bias = argument(layer, 2, "bias", None)
    channels_last = layer.target is LINEAR and _dimensions(layer) != 2
    return (bias is None or is_stored(bias)) and not channels_last


def _fold(module: GraphModule, node: Node, gain: Tensor, shift: Tensor) -> None:
    layer = node.args[0]
    weight, bias = layer.args[1], argument(layer, 2, "bias", None)
    values = stored(module, weight).detach().double()
    new_weight = values * gain.view(-1, *[1] * (values.dim() - 1))
    new_bias = shift if bias is None else shift + stored(module, bias).detach().double() * gain
    prefix = layer_name(layer)
    bias_path = bias.target if bias is not None else f"{prefix}.bias" if prefix else "bias"
    _set_argument(layer, 1, _store(module, layer, weight.target, new_weight.to(stored(module, weight).dtype)))
    _set_argument(layer, 2, _store(module, layer, bias_path, new_bias.to(stored(module, weight).dtype)))
    if MOMENTS in node.meta:
        layer.meta[MOMENTS] = node.meta[MOMENTS]
    node.replace_all_uses_with(layer)
    module.graph.erase_node(node)


def _replace(module: GraphModule, node: Node, gain: Tensor, shift: Tensor) -> None:
    x, mean = node.args[0], stored(module, node.args[3])
    name = layer_name(node)
    dimensions = _dimensions(node)
    with module.graph.inserting_before(node):
        weight_shape = (-1, 1, *[1] * max(dimensions - 2, 1))
        weight = _store(module, node, f"{name}.weight" if name else "weight", gain.view(weight_shape).to(mean.dtype))
        bias = _store(module, node, f"{name}.bias" if name else "bias", shift.to(mean.dtype))
        if dimensions == 2:  # (N, C) -> (N, C, 1) and back
            x = _call(module, node, aten.unsqueeze.default, x, 2)
        rank = max(dimensions - 2, 1)
        conv = POINTWISE[rank + 2]
        result = _call(module, node, conv, x, weight, bias, [1] * rank, [0] * rank, [1] * rank, len(gain))
        result.meta[FOLDED] = True
        if dimensions == 2:
            x.meta["val"] = result.meta["val"] = node.meta["val"].unsqueeze(2)
            result = _call(module, node, aten.squeeze.dim, result, 2)
    node.replace_all_uses_with(result)
    module.graph.erase_node(node)


def _call(module: GraphModule, like: Node, target: torch._ops.OpOverload, *args: object) -> Node:
    node = module.graph.call_function(target, args)  # type: ignore[arg-type]
    node.meta = dict(like.meta)
    return node


def _store(module: GraphModule, reader: Node, path: str, value: Tensor) -> Node:
    """A node for a new parameter at `path`, or beside it if another node than `reader` reads what is there."""
    path = _free_path(module, reader, path)
    prefix, _, name = path.rpartition(".")
    owner = module.get_submodule(prefix)
    setattr(owner, name, nn.Parameter(value.clone()))
    with module.graph.inserting_before(reader):
        return module.graph.get_attr(path)


def _free_path(module: GraphModule, reader: Node, path: str) -> str:
    taken = {node.target for node in module.graph.find_nodes(op="get_attr") if set(node.users) - {reader}}
    return free_name(path, taken)


def _set_argument(node: Node, index: int, value: Node) -> None:
    if index < len(node.args):
        node.update_arg(index, value)
    else:
        node.args = (*node.args, value)
        node.kwargs = {name: given for name, given in node.kwargs.items() if name != "bias"}


def _dimensions(node: Node) -> int:
    return node.meta["val"].dim()
