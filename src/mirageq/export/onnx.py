"""ONNX files: a student as quantize-dequantize pairs around integer weights, and its teacher in float."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.fx import GraphModule

from mirageq.errors import UserError, first_line
from mirageq.export.emit import OPSET, PROFILES, integer_network, packable
from mirageq.graph import argument, free_name, kind
from mirageq.quant import Student
from mirageq.quant.placement import activations, name_of
from mirageq.teacher import Teacher

if TYPE_CHECKING:
    import onnx_ir as ir

IR_VERSION = 10


def export_student(
    student: Student, teacher: Teacher, path: Path, *, profile: str = "ort", pack_weights: bool = False
) -> None:
    """Write a calibrated student as an ONNX QDQ file (opset 21, IR version 10, any batch size).

    Input `images`, normalised (N, C, H, W) float32; output `logits` (N, classes). The file's metadata hold the
    normalisation and what was quantized.

    Args:
        profile: the runtime it is for, one of `PROFILES`.
        pack_weights: store weights of at most 4 bits as INT4 tensors, two to a byte. Smaller, but runtimes unpack them
            for each image; for storage.

    Raises:
        UserError: an operation without ONNX counterpart (named with its layer), grids the profile does not take, or a
            path that cannot be written.
    """
    if profile not in PROFILES:
        raise UserError(f"There is no export profile '{profile}'; there are {', '.join(PROFILES)}.")
    network = integer_network(student, PROFILES[profile])
    model = _translate(network, teacher)
    if pack_weights:
        _pack(model, packable(network, 4))
    _share_nothing(model)
    scheme = student.scheme
    facts = {
        "mirageq.bits": scheme.bits,
        "mirageq.placement": scheme.placement,
        "mirageq.profile": profile,
        "mirageq.mean": ",".join(map(str, teacher.mean or ())),
        "mirageq.std": ",".join(map(str, teacher.std or ())),
    }
    model.metadata_props.update(facts)
    _write(model, path)


def export_teacher(teacher: Teacher, path: Path) -> None:
    """Write the full-precision network as ONNX, with the same input and output; for comparison."""
    _write(_translate(teacher.network, teacher), path)


def require_onnx() -> None:
    """Raise a `UserError` unless the packages that write ONNX are installed."""
    try:
        import onnx_ir  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"Exporting needs {error.name}: pip install 'mirageq[onnx]'.") from error


def _translate(network: GraphModule, teacher: Teacher) -> ir.Model:
    require_onnx()
    for node in network.graph.find_nodes(op="call_function", target=torch.ops.aten.avg_pool2d.default):
        if argument(node, 6, "divisor_override", None) is not None:
            raise UserError(
                f"ONNX's average pool has no divisor_override ('{node.name}'). Multiply its result by a number instead."
            )
    example = torch.zeros(2, *teacher.image_shape, device=teacher.device)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _quiet("torch.onnx"):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["images"],
                output_names=["logits"],
                verbose=False,
            )
    except Exception as error:
        raise UserError(_unsupported(error, teacher)) from error
    assert program is not None
    model: ir.Model = program.model
    model.ir_version = min(model.ir_version, IR_VERSION)
    for node in model.graph:  # stack traces of the export, as large as the weights
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    return model


def _unsupported(error: BaseException, teacher: Teacher) -> str:
    """One sentence that names the operation without ONNX counterpart, and its layer."""
    causes, text = error, ""
    while causes is not None:
        text += f" {causes}"
        causes = causes.__cause__ or causes.__context__  # type: ignore[assignment]
    found = re.search(r"No ONNX function found for <OpOverload\(op='\w+\.(\w+)'", text)
    if found:
        flow = activations(teacher.network.graph)
        for node in flow:
            if kind(node).endswith(found[1]):  # its decomposition may go by a shorter name
                return (
                    f"ONNX has no operation for '{kind(node)}' at '{name_of(node, flow)}'. "
                    "Replace it in the network by operations ONNX knows."
                )
    return f"The network cannot be written as ONNX: {first_line(error)}."


def _share_nothing(model: ir.Model) -> None:
    """Give each layer a weight, codes and zero points of its own, where equal ones were made one.

    ONNX Runtime fails to make codes unsigned where two layers share zero points (`EXACT_PRODUCTS`).
    """
    import onnx_ir as ir

    for node in list(model.graph):
        stored = (
            node.op_type == "DequantizeLinear" and getattr(node.inputs[0], "name", None) in model.graph.initializers
        )
        for count, (reader, place) in enumerate(list(node.outputs[0].uses())[1:] if stored else (), 2):
            again = ir.Node("", node.op_type, node.inputs, list(node.attributes.values()), name=f"{node.name}_{count}")
            value, known = again.outputs[0], node.outputs[0]
            value.name, value.type, value.shape = f"{known.name}_{count}", known.type, known.shape
            model.graph.insert_before(reader, again)
            reader.replace_input_with(place, value)
    taken = set()
    for node in model.graph:
        if node.op_type == "DequantizeLinear" and len(node.inputs) > 2:
            codes, _, shared = node.inputs
            assert codes is not None
            assert shared is not None
            if codes.name not in model.graph.initializers:
                continue
            for index, value in ((0, codes), (2, shared)):  # equal codes were made one, too
                if value.name in taken:
                    assert value.const_value is not None
                    copy = ir.tensor(value.const_value.numpy())
                    name = free_name(f"{value.name}_copy", model.graph.initializers)
                    own = ir.Value(name=name, type=ir.TensorType(copy.dtype), const_value=copy)
                    model.graph.register_initializer(own)
                    node.replace_input_with(index, own)
                taken.add(value.name)


def _pack(model: ir.Model, names: set[str]) -> None:
    """Store these initialisers, and the zero points that go with them, in 4 bits."""
    import ml_dtypes
    import onnx_ir as ir

    for node in model.graph:
        if node.op_type == "DequantizeLinear" and node.inputs[0] is not None and node.inputs[0].name in names:
            for index in (0, 2):  # codes and zero points; a zero point may be shared with a wider weight
                value = node.inputs[index]
                assert value is not None
                assert value.const_value is not None
                array = value.const_value.numpy()
                name = f"{value.name}_packed"
                if name not in model.graph.initializers:
                    packed = ir.tensor(array.astype(ml_dtypes.int4 if array.dtype.kind == "i" else ml_dtypes.uint4))
                    model.graph.register_initializer(
                        ir.Value(name=name, type=ir.TensorType(packed.dtype), const_value=packed)
                    )
                node.replace_input_with(index, model.graph.initializers[name])
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]


def _write(model: ir.Model, path: Path) -> None:
    import onnx_ir as ir

    written = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ir.save(model, written)
        os.replace(written, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            written.unlink()
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error


@contextlib.contextmanager
def _quiet(name: str):
    """No log lines below an error from a library."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
