"""From a captured network to its student: quantizers written into the graph."""

# fx types an argument of a node as a union of everything:
# mypy: disable-error-code="union-attr, arg-type, operator, return-value"

from __future__ import annotations

import copy
import operator
from dataclasses import replace
from itertools import takewhile

from torch import nn
from torch.fx import Graph, GraphModule, Node

from mirageq.errors import UserError
from mirageq.graph import WEIGHTED, batch_norms, free_name, last_layer, layer_name, share, stored, weighted
from mirageq.observe import pooled_features
from mirageq.quant.equalize import equalize
from mirageq.quant.fold import fold_batch_norms, is_folded_norm
from mirageq.quant.operations import stored_bias
from mirageq.quant.placement import Plan, activations, feeding, plan
from mirageq.quant.quantizers import ActivationQuantizer, BiasQuantizer, WeightQuantizer
from mirageq.quant.remembered import MOMENTS, remember_moments
from mirageq.quant.scheme import Scheme
from mirageq.quant.student import Student, stored_bytes

IMAGE_BITS = 8
"""Of the image in the placement "deploy", and of what normalises it, whatever the other activations have."""


def convert(network: GraphModule, scheme: Scheme) -> Student:
    """A student: the same function with quantizers, on copies of all tensors. It must be calibrated before use.

    Args:
        network: what `mirageq.capture.capture` gives; not modified.
        scheme: what to quantize and how.

    Returns:
        The student. Weights, biases and BatchNorm's scale and shift require gradients; running statistics are buffers.

    Raises:
        UserError: there is no convolution or linear layer, a norm that cannot be folded, none to take ranges from, or
            nothing to equalize.

    Example:
        >>> student = convert(capture(model, (3, 32, 32)), Scheme(weight_bits=4, activation_bits=4))
        >>> student.calibrate(images.split(64))
        >>> logits = student(images)
    """
    last_layer(network.graph)  # refuses a network without one
    if scheme.ranges_from == "batch_norms" and not batch_norms(network.graph):
        raise UserError(
            "Ranges from batch_norms need BatchNorm layers, and this network has none. Use scheme.ranges_from=images."
        )
    float_bytes = stored_bytes(network)
    module = copy.deepcopy(network)
    if scheme.ranges_from == "batch_norms":
        remember_moments(module)
    if scheme.placement == "deploy":
        module = fold_batch_norms(module)
    if scheme.equalize and not equalize(module):
        raise UserError(
            "Nothing can be equalized: nowhere in this network does one layer feed another one alone, with at most a "
            "ReLU between them (a ReLU6 does not count). Leave out scheme.equalize."
        )
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    graph = module.graph
    layers = weighted(graph)
    leading = list(takewhile(is_folded_norm, layers))  # norms of the image itself belong to the first layer behind them
    real = [layer for layer in layers if not is_folded_norm(layer)]
    first, last = real[0], real[-1]
    planned = plan(graph, scheme.placement)
    ending = [layer for layer in real if layer is last or layer in planned.tail]  # of several heads all
    reads = {layer: (layer.args[0], stored_bias(layer)) for layer in layers}  # before quantizers come between

    read = {feeding(source, planned) for source, _ in reads.values()}
    bits = _special_bits(graph, planned, scheme, leading, first, ending)
    paths = _quantize_activations(module, planned, scheme, read, bits)
    ends = {layer.args[1].target for layer in (*leading, first, *ending)}
    scales = _quantize_weights(module, layers, scheme, ends)
    if scheme.placement == "deploy":
        _round_biases(module, reads, planned, paths, scales)

    (output,) = graph.find_nodes(op="output")
    output.args = ((output.args[0], pooled_features(graph, last)),)
    graph.eliminate_dead_code()
    graph.lint()
    return Student(share(module, graph), scheme, planned.left_in_float, float_bytes)


def float_twin(network: GraphModule, scheme: Scheme) -> Student:
    """A student of the graph that `convert` gives, node by node: `in_float` it shows what its nodes were meant to give.

    Its own grids mean nothing, so none is searched for.
    """
    return convert(network, replace(scheme, weight_range="minmax", learned_steps=False))


def _special_bits(
    graph: Graph, planned: Plan, scheme: Scheme, leading: list[Node], first: Node, ending: list[Node]
) -> dict[Node | None, int]:
    """The bits of the image, and of what the scheme names apart: what the first layer gives, what heads read."""
    bits: dict[Node | None, int] = {}
    flow = activations(graph)
    if scheme.first_output_bits is not None:
        bits |= {node: scheme.first_output_bits for node, layer in flow.items() if layer is first}
    if scheme.first_last_bits is not None:
        bits |= {feeding(last.args[0], planned): scheme.first_last_bits for last in ending}
    if scheme.placement == "deploy":
        bits |= {node: IMAGE_BITS for node, layer in flow.items() if layer.op == "placeholder" or layer in leading}
    return bits


def _quantize_activations(
    module: GraphModule, planned: Plan, scheme: Scheme, read: set[Node | None], special: dict[Node | None, int]
) -> dict[Node, str]:
    """Put a quantizer after each planned node; returns node -> the path of what layers read. `read`: by layers."""
    paths = {}
    for name, node in planned.quantized.items():
        bits, narrowed = special.get(node, scheme.activation_bits), []
        if node not in special and scheme.residual_bits is not None and scheme.residual_bits != bits:
            narrowed = _layers_alone(node, planned)
            if node not in read or narrowed:
                bits = scheme.residual_bits
        paths[node], on_grid = _insert_quantizer(module, node, name, bits, scheme, list(node.users))
        if narrowed:
            name = free_name(f"{name}.requantized", planned.quantized)
            paths[node], _ = _insert_quantizer(module, on_grid, name, scheme.activation_bits, scheme, narrowed)
    return paths


def _layers_alone(node: Node, planned: Plan) -> list[Node]:
    """The readers of a quantized node that only layers see, if others see none; empty if no two such groups exist."""

    def by_layer(reader: Node) -> set[bool]:
        if planned.grids.get(reader) is node:  # hands the same values on
            return set().union(*(by_layer(further) for further in reader.users))
        return {reader.target in WEIGHTED}

    seen = {reader: by_layer(reader) for reader in node.users}
    alone = [reader for reader, kinds in seen.items() if kinds == {True}]
    return alone if len(alone) < len(seen) and all(len(kinds) < 2 for kinds in seen.values()) else []


def _insert_quantizer(
    module: GraphModule, node: Node, name: str, bits: int, scheme: Scheme, readers: list[Node]
) -> tuple[str, Node]:
    """Let `readers` of a node read it through a new quantizer: its path and its node."""
    symmetric, learned = scheme.activation_symmetric, scheme.learned_steps
    quantizer = ActivationQuantizer(name, bits, symmetric, scheme.clip_gradient, learned)
    path = _add(module, "activation_quantizers", name, quantizer)
    with module.graph.inserting_after(node):
        on_grid = module.graph.call_module(path, (node,))
    on_grid.meta = {key: value for key, value in node.meta.items() if key != MOMENTS}
    for reader in readers:
        reader.replace_input_with(node, on_grid)
    return path, on_grid


def _quantize_weights(
    module: GraphModule, layers: list[Node], scheme: Scheme, first_and_last: set[str]
) -> dict[Node, Node]:
    """Put a quantizer before each layer's weight, one for a weight that several layers share.

    Returns layer -> the node of its weight's scale (O, 1, ...).
    """
    graph, paths, scales = module.graph, {}, {}
    named: set[str] = set()
    for layer in layers:
        weight = layer.args[1]
        if weight.target not in paths:
            name = free_name(layer_name(layer) or weight.target, named)
            named.add(name)
            special = scheme.first_last_bits is not None and weight.target in first_and_last
            quantizer = WeightQuantizer(
                name,
                stored(module, weight),
                scheme.first_last_bits if special else scheme.weight_bits,
                scheme.symmetric_weights,
                scheme.weight_range,
                scheme.percentile,
                scheme.clip_gradient,
                scheme.learned_steps,
            )
            paths[weight.target] = _add(module, "weight_quantizers", name, quantizer)
        with graph.inserting_before(layer):
            both = graph.call_module(paths[weight.target], (weight,))
            layer.update_arg(1, graph.call_function(operator.getitem, (both, 0)))
            scales[layer] = graph.call_function(operator.getitem, (both, 1))
    return scales


def _round_biases(
    module: GraphModule,
    reads: dict[Node, tuple[Node, Node | None]],
    planned: Plan,
    paths: dict[Node, str],
    scales: dict[Node, Node],
) -> None:
    """Round each bias to steps of (scale of the layer's input) * (scales of its weight)."""
    graph = module.graph
    named: set[str] = set()
    for layer, (x, bias) in reads.items():
        if bias is None or x not in planned.grids:
            continue
        name = free_name(bias.target, named)
        named.add(name)
        path = _add(module, "bias_quantizers", name, BiasQuantizer(name))
        with graph.inserting_before(layer):
            input_scale = graph.get_attr(f"{paths[planned.grids[x]]}.scale")
            rounded = graph.call_module(path, (bias, input_scale, scales[layer]))
        layer.replace_input_with(bias, rounded)


def _add(module: GraphModule, room: str, name: str, quantizer: nn.Module) -> str:
    """Store the quantizer under a name without dots, and return its path."""
    path = free_name(f"{room}.{name.replace('.', '_')}", {name for name, _ in module.named_modules()})
    module.add_submodule(path, quantizer)
    return path
