"""From a student to a file that was proved: write, run, compare, measure, and only then put it in its place."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mirageq.errors import UserError, first_line
from mirageq.export.emit import PROFILES
from mirageq.export.onnx import export_student, export_teacher
from mirageq.export.verify import RUNTIMES, Verification, installed, verify
from mirageq.quant import Student
from mirageq.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """An exported file and what is known of it.

    Attributes:
        file_bytes, float_file_bytes: of the file, and of the full-precision network as ONNX.
        logical_bytes: of the student if its weights took exactly their bits.
        container_bytes: of all tensors in the file, integers in their containers.
        verifications: one for each runtime; empty for a profile that only its own hardware runs.
        left_in_float: (tensor or operation, reason).
    """

    path: Path
    profile: str
    file_bytes: int
    float_file_bytes: int
    logical_bytes: int
    container_bytes: int
    verifications: tuple[Verification, ...]
    left_in_float: tuple[tuple[str, str], ...]


def deliver(
    student: Student,
    teacher: Teacher,
    images: Tensor,
    path: Path,
    *,
    profile: str = "ort",
    pack_weights: bool = False,
    runtimes: Sequence[str] | None = None,
    threads: int = 0,
) -> Delivery:
    """Export a student to `path` and prove the file on normalised images (N, C, H, W).

    Args:
        runtimes: to run it with besides the profile's own, where it must agree with the student; what others make of it
            is reported. By default all that are installed.

    Raises:
        UserError: the student cannot be exported, a runtime is missing, or the file does not agree with the student; in
            each case nothing is left at `path`.
    """
    if path.suffix != ".onnx":
        raise UserError(f"An exported file is called something.onnx; got {path}.")
    unproved = path.with_name(f"{path.stem}.unproved.onnx")
    with tempfile.TemporaryDirectory() as folder:
        full = Path(folder) / "full_precision.onnx"
        try:
            export_student(student, teacher, unproved, profile=profile, pack_weights=pack_weights)
            export_teacher(teacher, full)
            container = check_structure(unproved, profile)
            verifications = tuple(
                verify(unproved, full, student, images, runtime=runtime, threads=threads)
                for runtime in _runtimes(PROFILES[profile].runtime, runtimes)
            )
            for proof in verifications:
                if proof.runtime == PROFILES[profile].runtime:
                    proof.require_agreement(path)
            sizes = unproved.stat().st_size, full.stat().st_size
            os.replace(unproved, path)
        finally:
            unproved.unlink(missing_ok=True)
    return Delivery(
        path=path,
        profile=profile,
        file_bytes=sizes[0],
        float_file_bytes=sizes[1],
        logical_bytes=student.size().total_bytes,
        container_bytes=container,
        verifications=verifications,
        left_in_float=tuple(student.left_in_float()),
    )


def check_structure(path: Path, profile: str) -> int:
    """Bytes of all tensors in the file, once it is found to be valid ONNX that keeps the profile's rules.

    Raises:
        UserError: it is not.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UserError(f"{path} is not valid ONNX: {first_line(error)}.") from error
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    if PROFILES[profile].symmetric:
        for node in model.graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                zero_point = numpy_helper.to_array(tensors[node.input[2]])
                if zero_point.dtype != "int8" or zero_point.any():
                    raise UserError(f"{path}: {node.name} is not a symmetric int8 grid, as '{profile}' needs.")
    return sum(_bytes(tensor) for tensor in tensors.values())


def _bytes(tensor: object) -> int:
    from onnx import numpy_helper

    array = numpy_helper.to_array(tensor)  # type: ignore[arg-type]
    packed = str(array.dtype) in ("int4", "uint4")
    return -(-array.size // 2) if packed else array.nbytes


def _runtimes(home: str | None, others: Sequence[str] | None) -> tuple[str, ...]:
    """Where a file is run: at home, if it has one, and elsewhere as asked, or wherever it can be."""
    if home is None:
        return tuple(others or ())
    if others is None:
        others = [name for name in RUNTIMES if installed(name)]
    return (home, *(name for name in others if name != home))
