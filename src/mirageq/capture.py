"""A network as one graph of ATen operations.

Every network, whatever its modules look like, is captured once with `torch.export`. On that graph a batch
normalisation is an operation like any other, so the collector (`observe.py`) and the quantizer
(`quant/`) serve timm's fused layers, hand-written modules and `.pt2` files alike.
"""

# fx types an argument of a node as a union of everything:
# mypy: disable-error-code="union-attr, arg-type, operator, return-value"

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
from torch.fx.node import map_arg

from mirageq.errors import UserError, first_line
from mirageq.graph import BATCH_NORM, WEIGHTED, argument, aten, free_name, is_stored, padding, share, stored
from mirageq.hashing import hash_tensors

OTHER_NAMES = {"clip": "clamp", "concat": "cat", "concatenate": "cat", "special_expit": "sigmoid", "multiply": "mul"}
OTHER_NAMES |= {"divide": "div", "true_divide": "div", "subtract": "sub", "negative": "neg"}
"""Operations that have two names, and the one they go by here."""

COMPUTED_FROM = "computed_from"
"""Where a captured network with computed weights notes the hash of what they were computed from, in its `meta`."""


def capture(model: nn.Module | ExportedProgram, image_shape: tuple[int, int, int]) -> GraphModule:
    """The evaluation-mode graph of `model`, on copies of its tensors.

    Args:
        model: a classifier mapping images (N, C, H, W) to logits (N, classes), or an exported program of one.
        image_shape: (C, H, W).

    Returns:
        A graph module with one input and one output. It contains no in-place operation, no dropout, and each
        batch normalisation is one `aten.batch_norm`. Weights and biases that are computed from stored tensors alone
        (weight standardisation) are stored ones here. Convolutions do the padding with zeros that comes before them,
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
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # a view fails on images in another memory format
        elif node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)  # it pins the type and the device that the network was exported on
        elif node.target is aten.clone.default or node.target is aten.dropout.default:
            node.replace_all_uses_with(node.args[0])
        else:
            _rename(node)
    _check_precision(graph)
    before = module.state_dict()
    computed = _compute_once(module)
    for node in graph.find_nodes(op="call_function", target=aten.conv2d.default):
        _pad_inside(node)
    for node in graph.find_nodes(op="call_function", target=aten.avg_pool2d.default):
        _count_no_rim(node)
    graph.eliminate_dead_code()
    if any("native_batch_norm" in str(node.target) for node in graph.nodes):
        raise UserError(
            "A batch normalisation uses its batch's statistics: the program was exported in training mode, or the "
            "norm keeps no running ones. Call model.eval() and export it again, or use norms that keep them."
        )
    for name in ("_guards_fn", "_in_spec", "_out_spec"):
        if hasattr(module, name):
            delattr(module, name)
    module.recompile()
    if not computed:
        return module
    network = share(module, graph)  # without what the computed ones were computed from
    network.meta[COMPUTED_FROM] = hash_tensors(before)
    return network


def on_device(network: GraphModule, device: str | torch.device) -> GraphModule:
    """The network, in place, with its tensors and those it makes on this device."""
    for node in network.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.update_kwarg("device", torch.device(device))
    network.recompile()
    return network.to(device)


def load_exported(path: Path) -> tuple[ExportedProgram, tuple[int, int, int]]:
    """Read a `.pt2` file and the image shape (C, H, W) it was exported with.

    Raises:
        UserError: not a readable exported program, or one whose batch size is fixed, or whose image size is not.
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
    if not all(isinstance(size, int) for size in shape):
        raise UserError(f"{path} was exported for images of any size. Export it again with a fixed height and width.")
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


def _export(model: nn.Module, image_shape: tuple[int, int, int]) -> ExportedProgram:
    model = _unwrapped(model)
    try:
        device = next(iter(model.parameters())).device
    except StopIteration:
        raise UserError("The network has no parameters; there is nothing to quantize.") from None
    if others := {value.dtype for value in model.parameters() if value.is_floating_point()} - {torch.float32}:
        raise UserError(f"The network's weights are {others.pop()}; give it in full precision: model.float().")
    try:
        frozen = copy.deepcopy(model).eval()
    except Exception as error:
        raise UserError(
            f"The network cannot be copied: {first_line(error)}. Delete activations that it keeps, and take an old "
            "weight_norm away (torch.nn.utils.remove_weight_norm)."
        ) from error
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


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network itself, without what trains it on several GPUs or compiles it."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


def _rename(node: Node) -> None:
    """Call an operation by the name that is known here."""
    if isinstance(node.target, torch._ops.OpOverload):
        own = node.target._schema.name.rpartition("::")[2]
        if own in OTHER_NAMES:
            node.target = getattr(getattr(aten, OTHER_NAMES[own]), node.target._overloadname)
        elif node.target is aten.threshold.default and tuple(node.args[1:]) == (0, 0):
            node.target, node.args = aten.relu.default, node.args[:1]


def _check_precision(graph: torch.fx.Graph) -> None:
    """Raise a `UserError` for a tensor of numbers that are not float32; a single one is a constant."""
    for node in graph.nodes:
        value = node.meta.get("val") if node.op in ("placeholder", "call_function") else None
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() and value.dtype != torch.float32:
            raise UserError(
                f"The network computes '{node.name}' in {value.dtype}, and quantization begins from float32. Leave "
                "autocast and conversions out of its forward."
            )


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


@torch.no_grad()
def _compute_once(module: GraphModule) -> bool:
    """Store what layers and norms read where it is computed from stored tensors and constants alone; whether any is."""
    done: dict[Node, Node] = {}
    for layer in [node for node in module.graph.nodes if node.target in (*WEIGHTED, BATCH_NORM)]:
        for position, node in enumerate(layer.args[1:5], 1):
            if not isinstance(node, Node) or is_stored(node) or (needed := _constant_inputs(node)) is None:
                continue
            if node not in done:
                origin = next((step.target for step in needed if is_stored(step)), layer.name)
                path = free_name(f"{origin}_computed", module.state_dict())
                owner, _, name = path.rpartition(".")
                part, value = module.get_submodule(owner), _value(module, needed)
                if position > 2:  # running statistics
                    part.register_buffer(name, value)
                else:
                    part.register_parameter(name, nn.Parameter(value))
                with module.graph.inserting_before(layer):
                    done[node] = module.graph.get_attr(path)
                done[node].meta = dict(node.meta)
            layer.update_arg(position, done[node])
    return bool(done)


def _value(module: GraphModule, steps: list[Node]) -> Tensor:
    """Of the last of these nodes, of which each reads earlier ones alone."""
    values: dict[Node, Any] = {}
    for step in steps:
        arguments, named = map_arg((step.args, step.kwargs), values.__getitem__)
        values[step] = stored(module, step) if is_stored(step) else step.target(*arguments, **named)
    return values[steps[-1]].clone()


def _constant_inputs(node: Node) -> list[Node] | None:
    """All that a node is computed from, itself last, in order; None if the images, or chance, are among it."""
    found: dict[Node, None] = {}

    def visit(step: Node) -> bool:
        if step in found:
            return True
        random = torch.Tag.nondeterministic_seeded in getattr(step.target, "tags", ())
        if random or not (is_stored(step) or step.op == "call_function") or not all(map(visit, step.all_input_nodes)):
            return False
        found[step] = None
        return True

    return list(found) if visit(node) else None


def _count_no_rim(pool: Node) -> None:
    """Let an average without padding say so: runtimes divide windows beyond the edge (`ceil_mode`) otherwise."""
    if not any(argument(pool, 3, "padding", [0])) and argument(pool, 4, "ceil_mode", False):
        kernel, stride = pool.args[1], argument(pool, 2, "stride", [])
        pool.args = (pool.args[0], kernel, stride, [0, 0], True, False, *pool.args[6:])
        pool.kwargs = {name: value for name, value in pool.kwargs.items() if name == "divisor_override"}


def _pad_inside(convolution: Node) -> None:
    """Let a 2d convolution do the padding with zeros that it reads: two passes over memory less each way.

    As many on either side, which is all that it can do.
    """
    padded = convolution.args[0]
    sides = list(padded.args[1]) if padding(padded) == 0 else []  # left, right, top, bottom; more if channels too
    if len(sides) != 4 or sides[0] != sides[1] or sides[2] != sides[3] or min(sides) < 0:
        return
    bias, stride = argument(convolution, 2, "bias", None), argument(convolution, 3, "stride", [1, 1])
    down, across = argument(convolution, 4, "padding", [0, 0])
    both = [down + sides[2], across + sides[0]]
    convolution.args = (padded.args[0], convolution.args[1], bias, stride, both, *convolution.args[5:])
