"""One forward pass of the teacher, and everything the losses want to know about it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule

from mirageq.graph import batch_norms, feature_node, layer_name, share


@dataclass(frozen=True)
class Observation:
    """What one forward pass showed.

    Attributes:
        logits: (N, classes).
        features: (N, D), the penultimate features (what the classifier reads), averaged over space if need be.
        bn_inputs: layer name -> (N, C, ...), the input of each batch normalisation, in order of computation.
    """

    logits: Tensor
    features: Tensor
    bn_inputs: dict[str, Tensor]


class Observer:
    """Runs a captured network and returns an `Observation`; shares the network's tensors and adds no hook."""

    def __init__(self, network: GraphModule) -> None:
        graph = copy.deepcopy(network.graph)
        norms = batch_norms(graph)
        self.names = tuple(layer_name(node) for node in norms)
        (output,) = graph.find_nodes(op="output")
        output.args = ((output.args[0], feature_node(graph), *(node.args[0] for node in norms)),)
        self._network = share(network, graph)

    def __call__(self, images: Tensor) -> Observation:
        logits, features, *bn_inputs = self._network(images)
        return Observation(logits, pool(features), dict(zip(self.names, bn_inputs, strict=True)))


def pool(features: Tensor) -> Tensor:
    """(N, D, ...) -> (N, D): the mean over space, where there is any."""
    return features.flatten(2).mean(2) if features.dim() > 2 else features
