"""A network as one graph of ATen operations.

Every network, whatever its modules look like, is captured once with `torch.export`. On that graph a batch
normalisation is an operation like any other, so the collector (`observe.py`) and the quantizer
(`quant/`) serve timm's fused layers, hand-written modules and `.pt2` files alike.
"""

# fx types an argument of a node as a union of everything:
# mypy: disable-error-code="union-attr, arg-type, return-value"

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from mirageq.errors import UserError, first_line

aten = torch.ops.aten

BATCH_NORM = aten.batch_norm.default
CONVOLUTIONS = (
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),  # padding="same"
)
LINEAR = aten.linear.default
WEIGHTED = (*CONVOLUTIONS, LINEAR)
"""Operations that multiply by a weight: `args[1]` is the weight, `args[2]` (if any) the bias."""


def capture(model: nn.Module | ExportedProgram, image_shape: tuple[int, int, int]) -> GraphModule:
    """The evaluation-mode graph of `model`, on copies of its tensors.

    Args:
        model: a classifier mapping images (N, C, H, W) to logits (N, classes), or an exported program of one.
        image_shape: (C, H, W).

    Returns:
        A graph module with one input and one output. It contains no in-place operation, no dropout, and each
        batch normalisation is one `aten.batch_norm`. Convolutions do the padding with zeros that comes before them,
        where they can. Parameters keep the names they have in `model`.

    Raises:
        UserError: the model cannot be exported, does not accept the shape, or does not return one tensor.
    """
    with _quietly():
        program = model if isinstance(model, ExportedProgram) else _export(model, image_shape)
        module = copy.deepcopy(program.run_decompositions({}).module(check_guards=False))
    graph = module.graph
    inputs, (output,) = graph.find_nodes(op="placeholder"), graph.find_nodes(op="output")
    results = output.args[0] if isinstance(output.args[0], (tuple, list)) else (output.args[0],)
    if len(inputs) != 1 or len(results) != 1 or not isinstance(results[0], Node):
        raise UserError(
            f"The network must take one image tensor and return one tensor of logits; it takes {len(inputs)} and "
            f"returns {len(results)} values. Wrap it in a module whose forward returns the logits alone."
        )
    output.args = (results[0],)
    graph.set_codegen(CodeGen())
    for node in list(graph.nodes):
        if node.target is aten._native_batch_norm_legit_no_training.default:
            _restore_batch_norm(graph, node)
        elif "native_batch_norm" in str(node.target):
            raise UserError(
                "The program was exported in training mode, where batch statistics replace the running ones. "
                "Call model.eval() and export it again."
            )
        elif node.target is aten.view.default:
            node.target = aten.reshape.default  # a view fails on images in another memory format
        elif node.target is aten.clone.default or node.target is aten.dropout.default:
            node.replace_all_uses_with(node.args[0])
    for node in graph.find_nodes(op="call_function", target=aten.conv2d.default):
        _pad_inside(node)
    graph.eliminate_dead_code()
    for name in ("_guards_fn", "_in_spec", "_out_spec"):
        if hasattr(module, name):
            delattr(module, name)
    module.recompile()
    return module


def load_exported(path: Path) -> tuple[ExportedProgram, tuple[int, int, int]]:
    """Read a `.pt2` file and the image shape (C, H, W) it was exported with.

    Raises:
        UserError: not a readable exported program, or one whose batch size is fixed.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        with _quietly():
            program = torch.export.load(path)
    except Exception as error:
        raise UserError(f"{path} is not a readable exported program ({first_line(error)}).") from error
    images = [
        node for node in program.graph.find_nodes(op="placeholder") if node.name in program.graph_signature.user_inputs
    ]
    if len(images) != 1 or images[0].meta["val"].dim() != 4:
        raise UserError(f"{path} must take one image tensor (N, C, H, W) as its only input.")
    batch, *shape = images[0].meta["val"].shape
    if isinstance(batch, int):
        raise UserError(
            f"{path} was exported for batches of exactly {batch}. Export it again with a free batch size: "
            'torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)).'
        )
    return program, tuple(shape)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep torch's warnings, logs and printed graphs back: what is wrong is told in one sentence."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def batch_norms(graph: torch.fx.Graph) -> list[Node]:
    """The batch normalisations on images' way to the logits, in the order they are computed."""
    return graph.find_nodes(op="call_function", target=BATCH_NORM)


def weighted(graph: torch.fx.Graph) -> list[Node]:
    """Convolutions and linear layers with a stored weight, in the order they are computed."""
    return [node for node in graph.nodes if node.target in WEIGHTED and is_stored(node.args[1])]


def is_stored(value: object) -> bool:
    """Whether a graph value is a parameter or buffer of the module."""
    return isinstance(value, Node) and value.op == "get_attr"


def argument(node: Node, position: int, name: str, default: Any) -> Any:
    """What a node gives its operation for an argument, by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def pads_with_zeros(node: Node) -> bool:
    if node.target is aten.constant_pad_nd.default:
        return not argument(node, 2, "value", 0)
    is_constant = node.target is aten.pad.default and argument(node, 2, "mode", "constant") == "constant"
    return is_constant and not argument(node, 3, "value", 0)


def layer_name(node: Node) -> str:
    """The module path of the layer a batch normalisation, convolution or linear node came from."""
    stored = node.args[3] if node.target is BATCH_NORM else node.args[1]
    return stored.target.rpartition(".")[0]


def running_statistics(norm: Node) -> tuple[Node, Node]:
    """The nodes of a batch normalisation's running mean and variance."""
    return norm.args[3], norm.args[4]


def feature_node(graph: torch.fx.Graph) -> Node:
    """The penultimate features: what the last linear layer (or last convolution) reads."""
    layers = weighted(graph)
    if not layers:
        raise UserError(
            "The network has no convolution or linear layer with a stored weight; there is nothing to quantize."
        )
    linear = [node for node in layers if node.target is LINEAR]
    return (linear or layers)[-1].args[0]


def stored(module: GraphModule, node: Node) -> Tensor:
    """The tensor behind a `get_attr` node."""
    value = module
    for part in node.target.split("."):
        value = getattr(value, part)
    return value


def share(module: GraphModule, graph: torch.fx.Graph) -> GraphModule:
    """A module that runs `graph` on the very tensors of `module`."""
    return GraphModule(module, graph)


def _export(model: nn.Module, image_shape: tuple[int, int, int]) -> ExportedProgram:
    try:
        device = next(iter(model.parameters())).device
    except StopIteration:
        raise UserError("The network has no parameters; there is nothing to quantize.") from None
    frozen = copy.deepcopy(model).eval()
    images = torch.zeros(2, *image_shape, device=device)
    try:
        with torch.no_grad():
            frozen(images)
    except Exception as error:
        raise UserError(
            f"The network does not accept images of shape {tuple(image_shape)} (channels, height, width): "
            f"{first_line(error)}. Give the shape it was trained with."
        ) from error
    try:
        return torch.export.export(frozen, (images,), dynamic_shapes=({0: Dim("batch", min=1)},))
    except Exception as error:
        raise UserError(
            f"torch.export cannot capture the network with a free batch size: {first_line(error)}. "
            "Forward code that branches on tensor values or on the batch size must be rewritten."
        ) from error


def _restore_batch_norm(graph: torch.fx.Graph, node: Node) -> None:
    """Write the functional form, a tuple, back as the one-tensor `aten.batch_norm`."""
    x, weight, bias, mean, var, momentum, eps = node.args
    with graph.inserting_before(node):
        whole = graph.call_function(BATCH_NORM, (x, weight, bias, mean, var, False, momentum, eps, False))
    for item in list(node.users):
        whole.meta = dict(item.meta)
        item.replace_all_uses_with(whole)
        graph.erase_node(item)
    graph.erase_node(node)


def _pad_inside(convolution: Node) -> None:
    """Let a 2d convolution do the padding with zeros that it reads: two passes over memory less each way.

    As many on either side, which is all that it can do.
    """
    padded = convolution.args[0]
    sides = list(padded.args[1]) if pads_with_zeros(padded) else []  # left, right, top, bottom; more if channels too
    if len(sides) != 4 or sides[0] != sides[1] or sides[2] != sides[3] or min(sides) < 0:
        return
    bias, stride = argument(convolution, 2, "bias", None), argument(convolution, 3, "stride", [1, 1])
    down, across = argument(convolution, 4, "padding", [0, 0])
    padding = [down + sides[2], across + sides[0]]
    convolution.args = (padded.args[0], convolution.args[1], bias, stride, padding, *convolution.args[5:])
