"""Cross-layer equalization: neighbouring layers share their ranges, channel by channel.

relu(s x) = s relu(x) for s > 0, so what one layer divides a channel by, the next may multiply it with. With
s = sqrt(r1 / r2), r1 and r2 the largest weights of the channel on either side, both sides end up with the range
sqrt(r1 r2), and no channel wastes the tensor's grid on another (Nagel et al., ICCV 2019, eqs. 7-11). Matters where one
grid serves many channels: activations, always.
Differences from the paper: large biases are not absorbed by the next layer, and no ReLU6 is replaced by a ReLU, which
would change the function: layers with one between them keep their ranges.
"""

# fx types an argument of a node as a union of everything:
# mypy: disable-error-code="union-attr, arg-type, operator, return-value"

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mirageq.graph import LINEAR, WEIGHTED, argument, is_stored, kind, last_layer, stored, weighted
from mirageq.quant.operations import CLAMPS, limits, only_reader, stored_bias
from mirageq.quant.remembered import MOMENTS

ROUNDS = 20
SMALLEST_RANGE = 1e-8  # of a channel's weights; none below is touched


@dataclass(frozen=True)
class Pair:
    """Two layers with nothing but a ReLU between them, and the tensors that equalization changes."""

    first: Node
    second: Node

    def tensors(self, module: GraphModule) -> tuple[Tensor, Tensor | None, Tensor]:
        """The first layer's weight (O, ...) and bias, and the second's weight with its inputs in front: (O, ...)."""
        bias = stored_bias(self.first)
        before, after = (stored(module, layer.args[1]) for layer in (self.first, self.second))
        depthwise = after.shape[1] == 1 and after.shape[0] == before.shape[0]
        return (
            before,
            None if bias is None else stored(module, bias),
            after if depthwise else after.transpose(0, 1),
        )


@torch.no_grad()
def equalize(module: GraphModule) -> list[Pair]:
    """Equalize a network without batch normalisations in place; returns the pairs of layers that were found."""
    pairs = find_pairs(module)
    for _ in range(ROUNDS):
        for pair in pairs:
            before, bias, after = pair.tensors(module)
            first, second = (weight.flatten(1).abs().amax(1) for weight in (before, after))
            dead = torch.minimum(first, second) < SMALLEST_RANGE  # a channel that carries nothing, or that nobody reads
            scale = (first / second).sqrt().masked_fill(dead, 1.0)
            before.div_(_channels(scale, before))
            after.mul_(_channels(scale, after))
            if bias is not None:
                bias.div_(scale)
            if MOMENTS in pair.first.meta:
                pair.first.meta[MOMENTS] = tuple(moment / scale for moment in pair.first.meta[MOMENTS])
    return pairs


def find_pairs(module: GraphModule) -> list[Pair]:
    """The pairs of neighbours: no other reader in between, no weight or bias read twice, a ReLU at most.

    What the classifier reads stays as it is: the features, which are compared with the teacher's.
    """
    pairs: list[Pair] = []
    last = last_layer(module.graph)
    for layer in weighted(module.graph):
        node, reader = layer, only_reader(layer)
        while reader is not None and kind(reader) in CLAMPS and limits(reader) == (0.0, math.inf):
            node, reader = reader, only_reader(reader)
        if reader in (None, last) or reader.target not in WEIGHTED or reader.args[0] is not node:
            continue
        if _fit(module, layer, reader):
            pairs.append(Pair(layer, reader))
    return pairs


def _fit(module: GraphModule, first: Node, second: Node) -> bool:
    """Whether the second layer reads the first one's channels all together, or each by itself."""
    bias = argument(first, 2, "bias", None)
    changed = [first.args[1], second.args[1]] + ([] if bias is None else [bias])
    if not all(is_stored(value) and len(value.users) == 1 for value in changed):
        return False
    outputs, inputs = stored(module, first.args[1]).shape[0], stored(module, second.args[1]).shape
    ranks = [layer.meta["val"].dim() for layer in (first, second)]  # a linear layer of maps reads columns, not channels
    same_kind = ranks[0] == ranks[1] and (first.target is LINEAR) == (second.target is LINEAR)
    depthwise = inputs[1] == 1 and inputs[0] == outputs and len(inputs) > 2
    return same_kind and (inputs[1] == outputs or depthwise)


def _channels(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (weight.dim() - 1))
