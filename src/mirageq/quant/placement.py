"""Which activations get a quantizer: the two named placements, decided on the captured graph.

An operation either *keeps the grid* of its input (a reshape, a max pool, a padding with zeros: the values that come out
are values that went in) or makes new values. Only new values need a quantizer.
"""

# fx types an argument of a node as a union of everything:
# mypy: disable-error-code="union-attr, arg-type, operator, return-value"

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from mirageq.graph import BATCH_NORM, WEIGHTED, free_name, is_stored, kind, layer_name
from mirageq.quant.operations import (
    AVERAGES,
    CLAMPS,
    CURVES,
    FINISHERS,
    INTEGER,
    divides,
    holds_numbers,
    keeps_grid,
    limits,
    main_input,
    only_reader,
    stored_bias,
)
from mirageq.quant.scheme import Placement

Flow = dict[Node, Node]
"""What `activations` gives."""


@dataclass(frozen=True)
class Plan:
    """Where activation quantizers go.

    Attributes:
        quantized: name -> the node that a quantizer follows, in order of computation; the image is called "image".
        grids: node -> the quantized node whose grid its values lie on; absent for values in float.
        tail: the logits, and what is computed from them alone, back from the network's result; all in float.
        left_in_float: (tensor or operation, reason).
    """

    quantized: dict[str, Node]
    grids: dict[Node, Node]
    tail: list[Node]
    left_in_float: tuple[tuple[str, str], ...]


def plan(graph: Graph, placement: Placement) -> Plan:
    """Decide where the activation quantizers of a captured (for "deploy": folded) graph go."""
    flow = activations(graph)
    tail = _tail(graph, flow)
    nodes = _after_activation_functions(flow, tail) if placement == "paper" else _wherever_values_are_new(flow, tail)
    quantized = _named(nodes, flow)
    grids = _grids(flow, set(nodes))
    report = _left_by_paper if placement == "paper" else _left_by_deploy
    return Plan(quantized, grids, tail, (*report(graph, flow, grids, tail), *_unusual_tensors(flow)))


def activations(graph: Graph) -> Flow:
    """The nodes that carry numbers computed from the image, each with the last layer (or the image) before it."""
    flow: Flow = {}
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        sources = [flow[source] for source in node.all_input_nodes if source in flow]
        if node.op == "output" or not (sources or node.op == "placeholder") or not holds_numbers(node):
            continue
        is_layer = node.target in WEIGHTED and is_stored(node.args[1])
        flow[node] = node if is_layer or not sources else max(sources, key=order.__getitem__)
    return flow


def feeding(node: Node, plan: Plan) -> Node | None:
    """The quantized node behind a layer's input: on the way back only one activation is read at each step (pooling)."""
    flow_back: Node | None = node
    while flow_back is not None and flow_back not in plan.grids:
        sources = [source for source in flow_back.all_input_nodes if holds_numbers(source)]
        sources = [source for source in sources if not is_stored(source)]
        flow_back = sources[0] if len(sources) == 1 else None
    return plan.grids[flow_back] if flow_back is not None else None


def _after_activation_functions(flow: Flow, tail: list[Node]) -> list[Node]:
    """The papers' rule. x * sigmoid(x), written out, is one activation function and not two."""
    gates = {node: inner for node in flow if (inner := _self_gate(node))}
    inside = set().union(*gates.values()) if gates else set()
    return [
        node
        for node in flow
        if node not in tail and node not in inside and (node in gates or _is_activation_function(node))
    ]


def _wherever_values_are_new(flow: Flow, tail: list[Node]) -> list[Node]:
    """The integer runtime's rule: each tensor is on a grid, once; but for divisors, whose guards no grid holds."""
    quantized: list[Node] = []
    on_grid: set[Node] = set()
    positive = _never_negative(flow)
    for node in flow:
        source = main_input(node)
        identity = kind(node) == "relu" and source in positive
        if (keeps_grid(node) or identity) and source in on_grid:
            on_grid.add(node)
        elif node in tail or _cut_by_next(node) or divides(node):
            continue
        elif isinstance(node.meta["val"], torch.Tensor):
            quantized.append(node)
            on_grid.add(node)
    return quantized


def _grids(flow: Flow, quantized: set[Node]) -> dict[Node, Node]:
    grids: dict[Node, Node] = {}
    positive = _never_negative(flow)
    for node in flow:
        source = main_input(node)
        if node in quantized:
            grids[node] = node
        elif source in grids and (keeps_grid(node) or (kind(node) == "relu" and source in positive)):
            grids[node] = grids[source]
    return grids


def _tail(graph: Graph, flow: Flow) -> list[Node]:
    """From the network's result back to the operations that compute the logits, of every head if they are several.

    What is no map any more, and not read by a layer, are logits, whatever is done with them.
    """
    (output,) = graph.find_nodes(op="output")
    tail: list[Node] = []
    finishing, of_vectors = {output}, set[Node]()
    for node in reversed(flow):
        read_by = set(node.users) - (of_vectors if _is_vector(node) else set())
        if not node.users or not finishing.issuperset(read_by):
            continue
        tail.append(node)
        if keeps_grid(node) or kind(node) in FINISHERS:
            finishing.add(node)
        elif _is_vector(node) and node.target not in (*WEIGHTED, BATCH_NORM):
            of_vectors.add(node)
    return tail


def _is_vector(node: Node) -> bool:
    """Whether a node gives at most two dimensions, images and numbers, or several of those stacked."""
    parts = node.all_input_nodes if kind(node) == "stack" else [node]
    return all(isinstance(value := part.meta.get("val"), torch.Tensor) and value.dim() <= 2 for part in parts)


def _is_activation_function(node: Node) -> bool:
    name = kind(node)
    if name not in CLAMPS or _cut_by_next(node):
        return name in CURVES
    low, high = limits(node)
    before = main_input(node)
    while before is not None and kind(before) in CLAMPS and _cut_by_next(before):
        low, high = max(low, limits(before)[0]), min(high, limits(before)[1])
        before = main_input(before)
    return low == 0 or (math.isfinite(low) and math.isfinite(high))  # and not a guard such as clamp(min=1e-6)


def _cut_by_next(node: Node) -> bool:
    """Whether the one reader of a node is a clamp, which then is what gets quantized."""
    reader = only_reader(node)
    return reader is not None and kind(reader) in CLAMPS and main_input(reader) is node and not keeps_grid(node)


def _never_negative(flow: Flow) -> set[Node]:
    found: set[Node] = set()
    for node in flow:
        name, sources = kind(node), [source for source in node.all_input_nodes if holds_numbers(source)]
        if name in CLAMPS:
            sure = limits(node)[0] >= 0
        elif name in ("add", "mul"):
            plain = all(isinstance(argument, Node) for argument in node.args) and not node.kwargs
            sure = plain and all(source in found for source in sources)
        elif name in AVERAGES or name == "cat" or keeps_grid(node):
            sure = bool(sources) and all(source in found for source in sources)
        else:
            sure = name in ("sigmoid", "hardsigmoid", "softmax")
        if sure:
            found.add(node)
    return found


def _self_gate(node: Node) -> set[Node]:
    """For x * f(x) with an activation function inside f: the nodes of f. Otherwise nothing."""
    if kind(node) != "mul" or len(node.all_input_nodes) != 2:
        return set()
    first, second = node.all_input_nodes
    for x, step in ((first, second), (second, first)):
        inner: list[Node] = []
        while step is not x and kind(step) in CLAMPS | CURVES | {"add", "sub", "mul", "div"}:
            inner.append(step)
            if len(step.all_input_nodes) != 1 or len(step.users) != 1:
                break
            step = step.all_input_nodes[0]
        if step is x and any(kind(part) in CLAMPS | CURVES for part in inner):
            return set(inner)
    return set()


def _named(nodes: Iterable[Node], flow: Flow) -> dict[str, Node]:
    named: dict[str, Node] = {}
    for node in nodes:
        named[free_name(name_of(node, flow), named)] = node
    return named


def name_of(node: Node, flow: Flow) -> str:
    """What a tensor is called: after the layer that computes it, or the last layer before it and the operation."""
    while kind(node) in CLAMPS or keeps_grid(node) or node.target is BATCH_NORM:
        if node.target is BATCH_NORM and node.args[0].target not in WEIGHTED:
            return layer_name(node) or node.name
        source = main_input(node)
        if source not in flow:
            return node.name
        node = source
    layer = flow[node]
    name = "image" if layer.op == "placeholder" else layer_name(layer) or layer.name
    return name if layer is node else f"{name}.{kind(node)}"


def _left_by_paper(graph: Graph, flow: Flow, grids: dict[Node, Node], tail: list[Node]) -> list[tuple[str, str]]:
    left = []
    for node in flow:
        read = any(user.target is not BATCH_NORM and user not in grids for user in node.users)
        if node not in grids and node not in tail and read and not keeps_grid(node):
            left.append((name_of(node, flow), "the paper's placement quantizes only after activation functions"))
    for node in flow:
        if (bias := stored_bias(node)) is not None:
            left.append((bias.target, "the paper's placement leaves biases in float"))
    return [*left, *_logits(flow, tail)]


def _left_by_deploy(graph: Graph, flow: Flow, grids: dict[Node, Node], tail: list[Node]) -> list[tuple[str, str]]:
    left = []
    for node in flow:
        name = kind(node)
        if divides(node) and not keeps_grid(node):
            left.append((name_of(node, flow), "it keeps its digits near zero: it is a divisor, or under a root"))
        elif name not in INTEGER and name != "image" and not keeps_grid(node) and node not in tail:
            left.append((name_of(node, flow), f"{name} is computed in float, between two quantizers"))
        if (bias := stored_bias(node)) is not None and node.args[0] not in grids:
            left.append((bias.target, "the layer's input is in float, so there is no step to round to"))
    return [*left, *_logits(flow, tail)]


def _unusual_tensors(flow: Flow) -> list[tuple[str, str]]:
    left = []
    for node in flow:
        if node.target in WEIGHTED and not is_stored(node.args[1]):
            left.append((name_of(node, flow), "its weight is computed in forward and stays in float"))
        for tensor in node.all_input_nodes if node.target not in (*WEIGHTED, BATCH_NORM) else ():
            if is_stored(tensor):
                left.append((tensor.target, f"read by {kind(node)}, which is not a convolution or linear layer"))
    return left


def _logits(flow: Flow, tail: list[Node]) -> list[tuple[str, str]]:
    """What the tail begins with."""
    first = [node for node in reversed(tail) if set(tail).isdisjoint(node.all_input_nodes)]
    return [(name_of(node, flow), "the logits, the network's result") for node in first]
