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

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from mirageq.canonical import canonical
from mirageq.errors import UserError, first_line


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
    if isinstance(model, ExportedProgram):
        exported_shape(model, "The program")
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
    for name in ("_guards_fn", "_in_spec", "_out_spec"):
        if hasattr(module, name):
            delattr(module, name)
    return canonical(module)


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
    shape = exported_shape(program, str(path))
    if not all(isinstance(size, int) for size in shape):
        raise UserError(f"{path} was exported for images of any size. Export it again with a fixed height and width.")
    return program, shape


def exported_shape(program: ExportedProgram, name: str) -> tuple[int, int, int]:
    """The image shape (C, H, W) a program was exported with; sizes that were left free are symbols.

    Raises:
        UserError: it takes something else than one image tensor, or batches of one size alone.
    """
    images = [
        node for node in program.graph.find_nodes(op="placeholder") if node.name in program.graph_signature.user_inputs
    ]
    if len(images) != 1 or images[0].meta["val"].dim() != 4:
        raise UserError(f"{name} must take one image tensor (N, C, H, W) as its only input.")
    batch, *shape = images[0].meta["val"].shape
    if isinstance(batch, int):
        raise UserError(
            f"{name} was exported for batches of exactly {batch}. Export it again with a free batch size: "
            'torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)).'
        )
    return tuple(shape)


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
