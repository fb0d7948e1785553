"""One forward pass of the teacher, and everything the losses want to know about it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from mirageq.augment import shifted
from mirageq.errors import UserError, first_line
from mirageq.graph import CONVOLUTIONS, LINEAR, argument, batch_norms, last_layer, norm_names, share
from mirageq.moments import channel_statistics


@dataclass(frozen=True)
class Observation:
    """What one forward pass showed.

    Attributes:
        logits: (N, classes).
        features: (N, D), the penultimate features (what the classifier reads), averaged over space if need be.
        bn_inputs: layer name -> (N, C, ...), the input of each batch normalisation, in order of computation.
        moments: layer name -> mean and variance of that input's channels over the batch, each (C,).
    """

    logits: Tensor
    features: Tensor
    bn_inputs: dict[str, Tensor]

    @cached_property
    def moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: channel_statistics(x) for name, x in self.bn_inputs.items()}


@dataclass(frozen=True)
class Glance:
    """An observation that kept only the moments, as a compiled pass gives it; see `Observation`."""

    logits: Tensor
    features: Tensor
    moments: dict[str, tuple[Tensor, Tensor]]


class Observer:
    """Runs a captured network and returns an `Observation`; shares the network's tensors and adds no hook.

    With `swing`, strided convolutions see their input moved by a random shift of less than their stride (GENIE's swing
    convolution), so that no pixel is privileged by the grid they read.
    """

    def __init__(self, network: GraphModule, *, swing: bool = False) -> None:
        graph = copy.deepcopy(network.graph)
        norms = batch_norms(graph)
        self.names = norm_names(graph)
        (output,) = graph.find_nodes(op="output")
        features = pooled_features(graph, last_layer(graph))
        output.args = ((output.args[0], features, *(node.args[0] for node in norms)),)
        self._network = share(network, graph)
        self._swing = _let_swing(self._network) if swing else None

    def swing_by(self, generator: torch.Generator) -> None:
        """Draw the shifts from this generator from now on."""
        if self._swing:
            self._swing.generator = generator

    def __call__(self, images: Tensor) -> Observation:
        """Images (N, C, H, W)."""
        logits, features, *bn_inputs = self._network(images)
        return Observation(logits, features, dict(zip(self.names, bn_inputs, strict=True)))


def compiled(observe: Observer) -> Callable[[Tensor], Glance]:
    """The observer's pass and the moments in one compiled function, without the tensors in between.

    Raises (when it is first called):
        UserError: it cannot be compiled here; a CPU needs a C++ compiler.
    """

    def whole(images: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        seen = observe(images)
        return seen.logits, seen.features, [_moments(x) for x in seen.bn_inputs.values()]

    run = torch.compile(whole, dynamic=False)

    def look(images: Tensor) -> Glance:
        try:
            logits, features, moments = run(images)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise UserError(
                f"The network cannot be compiled here ({first_line(error)}). Set method.compile=false."
            ) from error
        return Glance(logits, features, dict(zip(observe.names, moments, strict=True)))

    return look


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `channel_statistics`, in operations that a compiler fuses with those before."""
    x, dims = x.float(), [0, *range(2, x.dim())]
    mean = x.mean(dims)
    return mean, (x.square().mean(dims) - mean.square()).clamp_min(0)


class _Swing(nn.Module):
    generator: torch.Generator | None = None

    def forward(self, x: Tensor, most: int) -> Tensor:
        assert self.generator is not None
        return shifted(x, self.generator, min(most, *(side - 1 for side in x.shape[2:])))


def _let_swing(network: GraphModule) -> _Swing:
    """Put a swing before every strided two-dimensional convolution of `network`, in place."""
    swing = _Swing()
    network.add_submodule("swing", swing)
    for node in network.graph.nodes:
        flat = node.target in CONVOLUTIONS and node.meta["val"].dim() == 4
        stride = max(argument(node, 3, "stride", [1])) if flat else 1
        if stride > 1:
            with network.graph.inserting_before(node):
                node.update_arg(0, network.graph.call_module("swing", (node.args[0], stride - 1)))
    network.recompile()
    return swing


def pooled_features(graph: Graph, last: Node) -> Node:
    """A new node for the penultimate features (N, D): what the `last` layer reads, averaged over space or tokens."""
    (output,) = graph.find_nodes(op="output")
    with graph.inserting_before(output):
        return graph.call_function(_pooled, (last.args[0], -1 if last.target is LINEAR else 1))


def _pooled(features: Tensor, channels: int) -> Tensor:
    """The mean over all dimensions but the first and that of the channels."""
    return features.movedim(channels, 1).flatten(2).mean(2) if features.dim() > 2 else features
