"""One forward pass of the teacher, and everything the losses want to know about it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from mirageq.augment import shifted
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
    """Runs a captured network and returns an `Observation`; shares the network's tensors and adds no hook.

    With `swing`, strided convolutions see their input moved by a random shift of less than their stride (GENIE's swing
    convolution), so that no pixel is privileged by the grid they read.
    """

    def __init__(self, network: GraphModule, *, swing: bool = False) -> None:
        graph = copy.deepcopy(network.graph)
        norms = batch_norms(graph)
        self.names = tuple(layer_name(node) for node in norms)
        (output,) = graph.find_nodes(op="output")
        output.args = ((output.args[0], feature_node(graph), *(node.args[0] for node in norms)),)
        self._network = share(network, graph)
        self._swing = _let_swing(self._network) if swing else None

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Observation:
        """Images (N, C, H, W); `generator` is the randomness of the swing."""
        if self._swing:
            self._swing.generator = generator
        logits, features, *bn_inputs = self._network(images)
        return Observation(logits, pool(features), dict(zip(self.names, bn_inputs, strict=True)))


class _Swing(nn.Module):
    generator: torch.Generator | None = None

    def forward(self, x: Tensor, most: int) -> Tensor:
        assert self.generator is not None
        return shifted(x, self.generator, min(most, *(side - 1 for side in x.shape[2:])))


def _let_swing(network: GraphModule) -> _Swing:
    """Put a swing before every strided two-dimensional convolution of `network`, in place."""
    swing = _Swing()
    network.add_submodule("swing", swing)
    for node in network.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default):
        stride = max(node.args[3]) if len(node.args) > 3 else 1
        if stride > 1:
            with network.graph.inserting_before(node):
                node.update_arg(0, network.graph.call_module("swing", (node.args[0], stride - 1)))
    network.recompile()
    return swing


def pool(features: Tensor) -> Tensor:
    """(N, D, ...) -> (N, D): the mean over space, where there is any."""
    return features.flatten(2).mean(2) if features.dim() > 2 else features
