"""Weights that read a dead channel are set to zero: they do nothing, and cost resolution.

A channel that no image brings above a ReLU's zero has a BatchNorm of hardly any variance, and folding that norm makes
the weights that read the channel huge. They multiply zero, but a layer's step follows its largest weight, and its bias
is an integer in those steps: MobileNetV1's first depthwise layer would round biases of 0.7 to zero at W4A4.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from mirageq.quant.equalize import find_pairs

LARGEST_INPUT = 2.0**10
"""No number a layer reads is taken to be larger."""


@torch.no_grad()
def silence_dead_channels(module: GraphModule) -> int:
    """Zero what reads dead channels of a network without batch normalisations, in place; how many there are."""
    count = 0
    for pair in find_pairs(module):
        before, bias, after = pair.tensors(module)
        if pair.top is not None and bias is not None:
            dead = bias + LARGEST_INPUT * before.flatten(1).abs().sum(1) <= 0
            after[dead] = 0
            count += int(dead.sum())
    return count
