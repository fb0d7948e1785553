"""One form for the graphs that frameworks write in many.

An operation has one name, a batch normalisation is one node, and what does not depend on the image is stored.
"""

# fx types an argument of a node as a union of everything:
# mypy: disable-error-code="union-attr, arg-type, operator, return-value"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from mirageq.errors import UserError
from mirageq.graph import BATCH_NORM, WEIGHTED, argument, aten, free_name, is_stored, kind, padding, share, stored
from mirageq.hashing import hash_tensors

OTHER_NAMES = {"clip": "clamp", "concat": "cat", "concatenate": "cat", "special_expit": "sigmoid", "multiply": "mul"}
OTHER_NAMES |= {"divide": "div", "true_divide": "div", "subtract": "sub", "negative": "neg"}
"""Operations that have two names, and the one they go by here."""

COMPUTED_FROM = "computed_from"
"""Where a captured network with computed weights notes the hash of what they were computed from, in its `meta`."""


def canonical(module: GraphModule) -> GraphModule:
    """A freshly exported network in this form; it is changed.

    Raises:
        UserError: it computes in another precision, or a norm uses its batch's statistics.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is aten._native_batch_norm_legit_no_training.default:
            _restore_batch_norm(graph, node)
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # a view fails on images in another memory format
        elif node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)  # it pins the type and the device that the network was exported on
        elif node.target is aten.clone.default or node.target is aten.dropout.default:
            node.replace_all_uses_with(node.args[0])
        elif node.target is aten.native_dropout.default:  # (result, mask)
            for item in [item for item in node.users if item.args[1] == 0]:
                item.replace_all_uses_with(node.args[0])
        else:
            _rename(node)
    _check_precision(graph)
    before = module.state_dict()
    computed = _compute_once(module)
    for node in graph.find_nodes(op="call_function", target=aten.conv2d.default):
        _pad_inside(node)
    for node in graph.find_nodes(op="call_function", target=aten.avg_pool2d.default):
        _count_no_rim(node)
    graph.eliminate_dead_code()
    _check_no_randomness(graph)
    if any("native_batch_norm" in str(node.target) for node in graph.nodes):
        raise UserError(
            "A batch normalisation uses its batch's statistics: the program was exported in training mode, or the "
            "norm keeps no running ones. Call model.eval() and export it again, or use norms that keep them."
        )
    module.recompile()
    if not computed:
        return module
    network = share(module, graph)  # without what the computed ones were computed from
    network.meta[COMPUTED_FROM] = hash_tensors(before)
    return network


def _rename(node: Node) -> None:
    """Call an operation by the name that is known here."""
    if isinstance(node.target, torch._ops.OpOverload):
        if kind(node) in OTHER_NAMES:
            node.target = getattr(getattr(aten, OTHER_NAMES[kind(node)]), node.target._overloadname)
        elif node.target is aten.threshold.default and tuple(node.args[1:]) == (0, 0):
            node.target, node.args = aten.relu.default, node.args[:1]


def _check_precision(graph: Graph) -> None:
    """Raise a `UserError` for a tensor of numbers that are not float32; a single one is a constant."""
    for node in graph.nodes:
        value = node.meta.get("val") if node.op in ("placeholder", "call_function") else None
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() and value.dtype != torch.float32:
            raise UserError(
                f"The network computes '{node.name}' in {value.dtype}, and quantization begins from float32. Leave "
                "autocast and conversions out of its forward."
            )


def _check_no_randomness(graph: Graph) -> None:
    """Take out random numbers that nobody reads, such as dropout's; raise a `UserError` for others."""
    for node in reversed([node for node in graph.nodes if _is_random(node)]):
        if node.users:
            raise UserError(
                f"The network draws random numbers ('{node.name}', {kind(node)}), so it never answers alike. Leave "
                "that out of its forward in evaluation mode."
            )
        graph.erase_node(node)


def _is_random(node: Node) -> bool:
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    for position, slot in enumerate(node.target._schema.arguments):
        if slot.name in ("train", "training", "dropout_p"):
            return bool(argument(node, position, slot.name, slot.default_value))
    return True


def _restore_batch_norm(graph: Graph, node: Node) -> None:
    """Write the functional form, a tuple, back as the one-tensor `aten.batch_norm`."""
    x, weight, bias, mean, var, momentum, eps = node.args
    with graph.inserting_before(node):
        whole = graph.call_function(BATCH_NORM, (x, weight, bias, mean, var, False, momentum, eps, False))
    for item in list(node.users):
        whole.meta = dict(item.meta)
        item.replace_all_uses_with(whole)
        graph.erase_node(item)
    graph.erase_node(node)


@torch.no_grad()
def _compute_once(module: GraphModule) -> bool:
    """Store what layers and norms read where it is computed from stored tensors and constants alone; whether any is."""
    done: dict[Node, Node] = {}
    for layer in [node for node in module.graph.nodes if node.target in (*WEIGHTED, BATCH_NORM)]:
        for position, node in enumerate(layer.args[1:5], 1):
            if not isinstance(node, Node) or is_stored(node) or (needed := _constant_inputs(node)) is None:
                continue
            if node not in done:
                origin = next((step.target for step in needed if is_stored(step)), layer.name)
                path = free_name(f"{origin}_computed", module.state_dict())
                owner, _, name = path.rpartition(".")
                part, value = module.get_submodule(owner), _value(module, needed)
                if position > 2:  # running statistics
                    part.register_buffer(name, value)
                else:
                    part.register_parameter(name, nn.Parameter(value))
                with module.graph.inserting_before(layer):
                    done[node] = module.graph.get_attr(path)
                done[node].meta = dict(node.meta)
            layer.update_arg(position, done[node])
    return bool(done)


def _value(module: GraphModule, steps: list[Node]) -> Tensor:
    """Of the last of these nodes, of which each reads earlier ones alone."""
    values: dict[Node, Any] = {}
    for step in steps:
        arguments, named = map_arg((step.args, step.kwargs), values.__getitem__)
        values[step] = stored(module, step) if is_stored(step) else step.target(*arguments, **named)
    return values[steps[-1]].clone()


def _constant_inputs(node: Node) -> list[Node] | None:
    """All that a node is computed from, itself last, in order; None if the images, or chance, are among it."""
    found: dict[Node, None] = {}

    def visit(step: Node) -> bool:
        if step in found:
            return True
        random = torch.Tag.nondeterministic_seeded in getattr(step.target, "tags", ())
        if random or not (is_stored(step) or step.op == "call_function") or not all(map(visit, step.all_input_nodes)):
            return False
        found[step] = None
        return True

    return list(found) if visit(node) else None


def _count_no_rim(pool: Node) -> None:
    """Let an average without padding say so: runtimes divide windows beyond the edge (`ceil_mode`) otherwise."""
    if not any(argument(pool, 3, "padding", [0])) and argument(pool, 4, "ceil_mode", False):
        kernel, stride = pool.args[1], argument(pool, 2, "stride", [])
        pool.args = (pool.args[0], kernel, stride, [0, 0], True, False, *pool.args[6:])
        pool.kwargs = {name: value for name, value in pool.kwargs.items() if name == "divisor_override"}


def _pad_inside(convolution: Node) -> None:
    """Let a 2d convolution do the padding with zeros that it reads: two passes over memory less each way.

    As many on either side, which is all that it can do.
    """
    padded = convolution.args[0]
    sides = list(padded.args[1]) if padding(padded) == 0 else []  # left, right, top, bottom; more if channels too
    if len(sides) != 4 or sides[0] != sides[1] or sides[2] != sides[3] or min(sides) < 0:
        return
    bias, stride = argument(convolution, 2, "bias", None), argument(convolution, 3, "stride", [1, 1])
    down, across = argument(convolution, 4, "padding", [0, 0])
    both = [down + sides[2], across + sides[0]]
    convolution.args = (padded.args[0], convolution.args[1], bias, stride, both, *convolution.args[5:])
