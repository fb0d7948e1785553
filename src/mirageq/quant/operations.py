"""What the captured operations do, as far as placing quantizers needs to know."""

# fx types an argument of a node as a union of everything:
# mypy: disable-error-code="union-attr, arg-type, operator, return-value"

from __future__ import annotations

import math

import torch
from torch.fx import Node

from mirageq.graph import WEIGHTED, argument, is_stored, kind, padding

CLAMPS = {"relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max"}
"""Activation functions that only cut off: an integer runtime does them while it rounds the operation before."""

CURVES = {
    *("silu", "hardswish", "gelu", "leaky_relu", "elu", "celu", "selu", "sigmoid", "hardsigmoid", "tanh", "mish"),
    *("prelu", "rrelu_with_noise", "softplus", "log_sigmoid", "softsign", "hardshrink", "softshrink", "glu"),
}
"""The other activation functions."""

AVERAGES = {"mean", "avg_pool1d", "avg_pool2d", "avg_pool3d"} | {f"adaptive_avg_pool{d}d" for d in (1, 2, 3)}

INTEGER = {
    *CLAMPS,
    *CURVES,
    *AVERAGES,
    *("conv1d", "conv2d", "conv3d", "linear", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("add", "sub", "rsub", "mul", "div", "neg", "cat", "stack", "upsample_bilinear2d"),
}
"""Operations with new values that integer runtimes have kernels for; the others run in float between quantizers."""

KEEPERS = {
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t", "movedim"),
    *("contiguous", "alias", "clone", "detach", "lift_fresh_copy", "expand", "repeat", "tile", "repeat_interleave"),
    *("slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "getitem", "index", "index_select"),
    *("roll", "flip", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "im2col", "amax", "upsample_nearest2d"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "adaptive_max_pool2d"),
    *(f"{kind}_pad{dimensions}d" for kind in ("reflection", "replication") for dimensions in (1, 2, 3)),
}

ROOTS = {"sqrt", "rsqrt", "reciprocal", "log"}
"""Operations that are steep, or have no value, at zero."""

FINISHERS = {"softmax", "_softmax", "log_softmax", "_log_softmax", "sigmoid"}
"""Operations that may come between the logits and the end of the network."""


def keeps_grid(node: Node) -> bool:
    """Whether every value that comes out of the node went into it, zeros aside (which every grid holds).

    And what pads with -inf for max pools alone, which give none of it on.
    """
    name = kind(node)
    copies = name == "pad" and argument(node, 2, "mode", "constant") != "constant"
    unseen = padding(node) == -math.inf and all(kind(reader).startswith("max_pool") for reader in node.users)
    of_one = name == "cat" and len(node.all_input_nodes) == 1
    return copies or unseen or padding(node) == 0 or name in KEEPERS or of_one


def divides(node: Node) -> bool:
    """Whether a value near zero makes a large one: a divisor, or what a root, a logarithm or a power is taken of.

    As it is, or moved, scaled, guarded and averaged. Such values are guarded by numbers far below a step of any grid.
    """
    for reader in node.users:
        name = kind(reader)
        by = reader.args[1] if len(reader.args) > 1 else None
        steep = name == "pow" and reader.args[0] is node and not (isinstance(by, (int, float)) and by >= 1)
        if steep or name in ROOTS or (name == "div" and by is node):
            return True
        computed = [source for source in reader.all_input_nodes if not is_stored(source)]
        alone = name in CLAMPS | AVERAGES | {"add", "sub", "mul", "div", "sum"} and len(computed) == 1
        if (alone or keeps_grid(reader)) and divides(reader):
            return True
    return False


def limits(node: Node) -> tuple[float, float]:
    """Of a clamp; infinite where it has none, not a number where a tensor tells it."""
    name = kind(node)
    if name in ("relu", "relu6"):
        return 0.0, math.inf if name == "relu" else 6.0
    if name == "hardtanh":
        return argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
    low = None if name == "clamp_max" else argument(node, 1, "min", None)
    high = None if name == "clamp_min" else argument(node, 1 if name == "clamp_max" else 2, "max", None)
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    return math.nan if isinstance(low, Node) else low, math.nan if isinstance(high, Node) else high


def main_input(node: Node) -> Node | None:
    """The tensor an operation with one main input reads."""
    first = node.args[0] if node.args else None
    first = first[0] if isinstance(first, (list, tuple)) and len(first) == 1 else first
    return first if isinstance(first, Node) else None


def only_reader(node: Node) -> Node | None:
    """The node that reads this one, if exactly one does."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def holds_numbers(node: Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(item, torch.Tensor) and item.is_floating_point() for item in values)


def stored_bias(node: Node) -> Node | None:
    """The stored bias of a convolution or linear layer with a stored weight."""
    if node.target not in WEIGHTED or not is_stored(node.args[1]):
        return None
    bias = argument(node, 2, "bias", None)
    return bias if is_stored(bias) else None
