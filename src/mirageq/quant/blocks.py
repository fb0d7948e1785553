"""Blocks of a network: stretches of its graph with one tensor in and one tensor out.

A cut is a node that everything after it is computed from. Residual and inverted-residual blocks lie between two cuts,
in whatever framework and under whatever class name they were written.
"""

# fx types an argument of a node as a union of everything:
# mypy: disable-error-code="union-attr, arg-type, operator, return-value"

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from mirageq.graph import WEIGHTED, is_stored, share
from mirageq.quant.operations import holds_numbers, only_reader
from mirageq.quant.quantizers import ActivationQuantizer, WeightQuantizer

BATCH_SIZE = torch.ops.aten.sym_size.int
"""Reshapes read it from the image; in a block it is that of the block's own input."""


@dataclass(frozen=True)
class Block:
    """A stretch of a student's graph.

    Attributes:
        start, end: the node it reads and the one it gives.
        layers: names of its quantized layers.
    """

    start: Node
    end: Node
    layers: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.layers[0] if len(self.layers) == 1 else f"{self.layers[0]} - {self.layers[-1]}"


def find_blocks(network: GraphModule, end: Node, fewest_layers: int = 2) -> list[Block]:
    """The blocks between the image and `end`, in order; small neighbours are joined until they have `fewest_layers`.

    None is joined with what comes behind the pooling (or flattening) of all places: a block is compared where its
    output is a map, as one number a channel and image says too little about the weights in front of it.
    """
    graph = network.graph
    (start,) = graph.find_nodes(op="placeholder")
    cuts = [node for node in _cuts(graph, start, end) if _counts_images(node, start)]
    following = dict(zip(cuts, cuts[1:], strict=False))
    cuts = [node for node in cuts if not _awaits_more(network, node, following.get(node))]
    if cuts[-1] is not end:
        cuts.append(end)
    blocks: list[Block] = []
    for cut in cuts:
        layers = layers_between(network, start, cut)
        if len(layers) >= fewest_layers or (layers and (cut is end or _is_last_map(cut, following.get(cut)))):
            blocks.append(Block(start, cut, layers))
            start = cut
    if start is not end and blocks:  # a rest without layers, or with fewer than asked for
        last = blocks.pop()
        blocks.append(Block(last.start, end, layers_between(network, last.start, end)))
    return blocks


def between(network: GraphModule, start: Node, end: Node) -> GraphModule:
    """The function from the value of `start` to that of `end`, on the network's own tensors and quantizers."""
    graph = Graph()
    copies = {start: graph.placeholder("x")}
    for node in _ancestors(start, end):
        if node.target is BATCH_SIZE:
            copies[node] = graph.call_function(BATCH_SIZE, (copies[start], 0))
        else:
            copies[node] = graph.node_copy(node, lambda argument: copies[argument])
    graph.output(copies[end])
    return share(network, graph)


def layers_between(network: GraphModule, start: Node, end: Node) -> tuple[str, ...]:
    """The names of the layers whose weights are quantized between two nodes, in order."""
    parts = [node for node in _ancestors(start, end) if node.op == "call_module"]
    found = [network.get_submodule(node.target) for node in parts]
    return tuple(part.name for part in found if isinstance(part, WeightQuantizer))


def single_layers(network: GraphModule, block: Block) -> list[Block]:
    """The quantized layers of a block, each up to the activation function and quantizer that it alone feeds.

    Layers of what is no image, such as a table of positions, are left out.
    """
    singles, seen = [], {block.start}
    for node in _ancestors(block.start, block.end):
        if seen.isdisjoint(node.all_input_nodes):
            continue
        seen.add(node)
        if node.target not in WEIGHTED or node.args[0] not in seen or not _counts_images(node.args[0], block.start):
            continue
        if layers := layers_between(network, node.args[0], node):
            end, reader = node, _fed_alone(node)
            while end is not block.end and reader is not None and _awaits_more(network, end, reader):
                end, reader = reader, _fed_alone(reader)
            singles.append(Block(node.args[0], end, layers))
    return singles


def _ancestors(start: Node, end: Node) -> list[Node]:
    """What `end` is computed from, back to `start`, in order of computation, `end` included."""
    found: set[Node] = set()
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node is not start and node not in found:
            found.add(node)
            waiting += node.all_input_nodes if node.target is not BATCH_SIZE else []
    return [node for node in start.graph.nodes if node in found]


def _cuts(graph: Graph, start: Node, end: Node) -> list[Node]:
    """The nodes on whose value alone everything later depends."""
    carried = [start]  # values computed from the image, in order
    known = {start}
    for node in _ancestors(start, end):
        if any(source in known for source in node.all_input_nodes) and _is_tensor(node):
            carried.append(node)
            known.add(node)
    place = {node: index for index, node in enumerate(carried)}
    last_read = [
        max((place[user] for user in node.users if user in place), default=index) for index, node in enumerate(carried)
    ]
    cuts, reach = [], 0
    for index, node in enumerate(carried):
        if reach <= index and index > 0:
            cuts.append(node)
        reach = max(reach, last_read[index])
    return cuts


def _is_tensor(node: Node) -> bool:
    return holds_numbers(node) or node.op == "call_module" or isinstance(node.meta.get("val"), torch.Tensor)


def _awaits_more(network: GraphModule, node: Node, following: Node | None) -> bool:
    """Whether an activation function or a quantizer comes next, after which the block should end.

    What a ReLU throws away is no error, so blocks are compared behind it; and behind the first quantizer, but before
    one that narrows.
    """
    if node.op == "call_module":
        return False
    readers = [user for user in node.users if user.op == "call_module"]
    if any(isinstance(network.get_submodule(user.target), ActivationQuantizer) for user in readers):
        return True
    if following is None or layers_between(network, node, following):
        return False
    return following.target not in WEIGHTED and _shape(following) == _shape(node)


def _counts_images(node: Node, start: Node) -> bool:
    """Whether the first dimension of a value is that of the images (at `start`), as far as it is known."""
    sizes = [None if (shape := _shape(_measured(each))) is None else str(shape[0]) for each in (node, start)]
    return None in sizes or sizes[0] == sizes[1]


def _is_last_map(node: Node, following: Node | None) -> bool:
    """Whether what comes next, pooling or flattening, leaves no places of a feature map."""
    before, after = _places(node), _places(following) if following is not None else None
    return before is not None and after is not None and before > after == 1


def _places(node: Node) -> int | None:
    """Height times width of a feature map, 1 of a vector."""
    shape = _shape(_measured(node))
    return None if shape is None else math.prod(shape[2:])


def _measured(node: Node) -> Node:
    """The node whose shape is known: of a quantizer, which does not tell, what it reads."""
    while node.op == "call_module":
        (node,) = node.all_input_nodes
    return node


def _fed_alone(node: Node) -> Node | None:
    """The only reader of a node, if it is computed from nothing else but stored tensors."""
    reader = only_reader(node)
    alone = reader is not None and all(source is node or is_stored(source) for source in reader.all_input_nodes)
    return reader if alone else None


def _shape(node: Node) -> torch.Size | None:
    value = node.meta.get("val")
    return value.shape if isinstance(value, torch.Tensor) else None
