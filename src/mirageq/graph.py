"""What there is in a captured graph: layers, norms, the tensors they read."""

# fx types an argument of a node as a union of everything:
# mypy: disable-error-code="union-attr, arg-type, operator, return-value"

from __future__ import annotations

import operator
from collections.abc import Container
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from mirageq.errors import UserError

aten = torch.ops.aten

BATCH_NORM = aten.batch_norm.default
CONVOLUTIONS = (
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),  # padding="same"
)
LINEAR = aten.linear.default
WEIGHTED = (*CONVOLUTIONS, LINEAR)
"""Operations that multiply by a weight: `args[1]` is the weight, `args[2]` (if any) the bias."""


def batch_norms(graph: torch.fx.Graph) -> list[Node]:
    """The batch normalisations on images' way to the logits, in the order they are computed."""
    return graph.find_nodes(op="call_function", target=BATCH_NORM)


def weighted(graph: torch.fx.Graph) -> list[Node]:
    """Convolutions and linear layers with a stored weight, in the order they are computed."""
    return [node for node in graph.nodes if node.target in WEIGHTED and is_stored(node.args[1])]


def is_stored(value: object) -> bool:
    """Whether a graph value is a parameter or buffer of the module."""
    return isinstance(value, Node) and value.op == "get_attr"


def kind(node: Node) -> str:
    """The plain name of a node's operation: "conv2d", "add", "relu", "image"."""
    if node.op == "placeholder":
        return "image"
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.rpartition("::")[2]
    return "getitem" if node.target is operator.getitem else str(node.target)


def argument(node: Node, position: int, name: str, default: Any) -> Any:
    """What a node gives its operation for an argument, by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def padding(node: Node) -> float | None:
    """The number that a node pads with; None if it does not pad, or not with one number."""
    if node.target is aten.constant_pad_nd.default:
        return argument(node, 2, "value", 0) or 0.0
    is_constant = node.target is aten.pad.default and argument(node, 2, "mode", "constant") == "constant"
    return argument(node, 3, "value", 0) or 0.0 if is_constant else None


def layer_name(node: Node) -> str:
    """The module path of the layer a batch normalisation, convolution or linear node came from."""
    stored = node.args[3] if node.target is BATCH_NORM else node.args[1]
    return stored.target.rpartition(".")[0]


def norm_names(graph: torch.fx.Graph) -> tuple[str, ...]:
    """A name for each batch normalisation, after its module; another one where a module is read again."""
    names: list[str] = []
    for node in batch_norms(graph):
        names.append(free_name(layer_name(node) or node.name, names))
    return tuple(names)


def running_statistics(norm: Node) -> tuple[Node, Node]:
    """The nodes of a batch normalisation's running mean and variance."""
    return norm.args[3], norm.args[4]


def scale_and_shift(module: GraphModule, norm: Node, need: str) -> tuple[Tensor | None, Tensor | None]:
    """The stored scale and shift, (C,) each, of a batch normalisation; None for one that it does without.

    Raises:
        UserError: the network computes one from the images; `need` says what stored ones are for, and the way out.
    """
    values = norm.args[1:3]
    if not all(value is None or is_stored(value) for value in values):
        raise UserError(
            f"The batch normalisation '{norm.name}' computes its scale or shift from the images; only stored ones "
            f"{need}"
        )
    gamma, beta = (None if value is None else stored(module, value).detach() for value in values)
    return gamma, beta


def last_layer(graph: torch.fx.Graph) -> Node:
    """The classifier: the convolution or linear layer that is computed last; what it reads are the features.

    Raises:
        UserError: there is none.
    """
    if not (layers := weighted(graph)):
        if any(node.target in (aten.convolution.default, aten.addmm.default) for node in graph.nodes):
            raise UserError("The program's layers were decomposed; export it again without run_decompositions().")
        raise UserError(
            "The network has no convolution or linear layer with a stored weight; there is nothing to quantize."
        )
    return layers[-1]


def stored(module: GraphModule, node: Node) -> Tensor:
    """The tensor behind a `get_attr` node."""
    return operator.attrgetter(node.target)(module)


def device_of(network: nn.Module) -> torch.device:
    """Where a network's tensors lie."""
    return next(chain(network.parameters(), network.buffers())).device


def share(module: GraphModule, graph: torch.fx.Graph) -> GraphModule:
    """A module that runs `graph` on the very tensors of `module`."""
    return GraphModule(module, graph)


def free_name(name: str, taken: Container[str]) -> str:
    """`name`, or `name_2` and so on if it is taken."""
    candidate, copies = name, 1
    while candidate in taken:
        copies += 1
        candidate = f"{name}_{copies}"
    return candidate
