"""Activation ranges without an image: every BatchNorm's output as the norm was trained to give it.

A norm gives each channel a mean of beta and a deviation of |gamma| (a little less where it hardly varies), whatever
image comes in. Run on Gaussian noise, a
network whose norm outputs are set to those moments shows activations of about the size real images cause, in one
forward pass (the idea of Nagel et al., ICCV 2019, sec. 4.2.1, carried past residual adds and concatenations by running
the graph instead of doing the arithmetic of each operation).
"""

# fx types an argument of a node as a union of everything:
# mypy: disable-error-code="union-attr, arg-type, operator, return-value"

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from mirageq.graph import batch_norms, scale_and_shift, stored

MOMENTS = "remembered"
"""The key of a node's `meta` under which the moments of its output lie, two of (C,)."""


def remember_moments(network: GraphModule) -> None:
    """Note at each batch normalisation the mean and deviation of its output; folding hands them on to the layer."""
    for node in batch_norms(network.graph):
        gamma, beta = scale_and_shift(network, node, "are remembered. Use scheme.ranges_from=images.")
        variance, eps = stored(network, node.args[4]), node.args[7]
        deviation = (variance / (variance + eps)).sqrt()  # of a normalised channel: below 1 where it hardly varies
        if gamma is not None:
            deviation = deviation * gamma.abs()
        node.meta[MOMENTS] = (torch.zeros_like(variance) if beta is None else beta, deviation)


class Remembering(Interpreter):
    """Runs a graph and moves each output that has remembered moments to them."""

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        return matched(value, *n.meta[MOMENTS]) if MOMENTS in n.meta else value


def matched(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """(N, C, ...) shifted and scaled so that each channel has this mean and deviation, both (C,)."""
    if x.numel() == x.shape[1]:  # one number a channel has no deviation
        return mean.to(x.device).view(1, -1, *[1] * (x.dim() - 2)).expand_as(x)
    return F.batch_norm(x, None, None, deviation.to(x.device), mean.to(x.device), training=True, eps=1e-12)
