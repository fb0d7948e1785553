"""Proof that a file computes what the student computes, by running it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mirageq.errors import UserError, did_you_mean, first_line
from mirageq.export.arithmetic import in_double, in_kernel_arithmetic
from mirageq.quant import Student

CHUNK = 20
TOLERANCE = 1e-4
"""Of a logit, as a share of the largest one: float summation in another order, not another integer."""
MOST_MISMATCHES = {"onnxruntime": 0.002, "openvino": 0.02}
"""Share of images that may fall in another class before a file is refused. ONNX Runtime's kernels are known to the last
code; OpenVINO moves scales through the graph (its low-precision transformations), not always to the same places."""

EXACT_PRODUCTS = "session.x64quantprecision", "1"
"""ONNX Runtime's session option without which processors that have no VNNI add products of 8-bit codes and weights in
16 bits, and cut off what is beyond; with it they compute what all others do. It changes nothing where there is VNNI."""

LATENCY_SECONDS = 4.0

Run = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How a file and its student compare.

    Attributes:
        runtime: that ran the file.
        count: images.
        agreement: percent of them whose most likely class is the same as the student's, computed in the arithmetic of
            the runtime's kernels (`mirageq.export.kernels`).
        exact: percent of them whose logits are all the same, up to float summation.
        largest_difference: of any logit.
        float_agreement: percent of them whose class is that of the student computed in float64.
        allowed: images that may fall in another class: a runtime's share (`MOST_MISMATCHES`), at least one, and twice
            as many as change when the student itself is computed in float32, in float64, or as the kernels do.
        milliseconds, float_milliseconds: median latency of one image, of the file and of the full-precision network, in
            turns in one process.
    """

    runtime: str
    count: int
    agreement: float
    exact: float
    largest_difference: float
    float_agreement: float
    allowed: int
    milliseconds: float
    float_milliseconds: float

    @property
    def speedup(self) -> float:
        return self.float_milliseconds / self.milliseconds

    def require_agreement(self, path: Path) -> None:
        """Raise a `UserError` if more images than rounding explains change class."""
        changed = round(self.count * (1 - self.agreement / 100))
        if changed > self.allowed:
            raise UserError(
                f"{path} would not compute what the student computes: {self.runtime} puts {changed} of {self.count} "
                f"images in another class (a logit differs by up to {self.largest_difference:.3g}). It was not kept."
            )


def verify(
    path: Path, float_path: Path, student: Student, images: Tensor, *, runtime: str, threads: int = 0
) -> Verification:
    """Run the file at `path` on normalised images (N, C, H, W) and compare it with the student.

    Args:
        float_path: the full-precision network, for latency.
        threads: of the runtime; 0 leaves the choice to it.

    Raises:
        UserError: the runtime is not installed or refuses the file.
    """
    quantized, full = (open_file(file, runtime, threads) for file in (path, float_path))
    exact = in_double(student)  # float32 sums are too coarse between two codes
    simulated = _logits(lambda chunk: exact(chunk.double()), images)
    unsettled = int((simulated.argmax(1) != _logits(student, images).argmax(1)).sum())
    kernels = in_kernel_arithmetic(student, runtime)
    expected = _logits(lambda chunk: kernels(chunk.double()), images)
    unsettled = max(unsettled, int((simulated.argmax(1) != expected.argmax(1)).sum()))
    got = np.concatenate([quantized(chunk.cpu().numpy()) for chunk in images.split(CHUNK)])
    difference = np.abs(expected - got).max(1)
    same = expected.argmax(1) == got.argmax(1)
    milliseconds, float_milliseconds = latency(quantized, full, images[:1].cpu().numpy())
    return Verification(
        runtime=runtime,
        count=len(images),
        agreement=100 * float(same.mean()),
        exact=100 * float((difference <= TOLERANCE * np.abs(expected).max()).mean()),
        largest_difference=float(difference.max()),
        float_agreement=100 * float((simulated.argmax(1) == got.argmax(1)).mean()),
        allowed=max(1, int(MOST_MISMATCHES[runtime] * len(images)), 2 * unsettled),
        milliseconds=milliseconds,
        float_milliseconds=float_milliseconds,
    )


@torch.no_grad()
def _logits(network: Callable[[Tensor], Tensor], images: Tensor) -> np.ndarray:
    return torch.cat([network(chunk) for chunk in images.split(CHUNK)]).float().cpu().numpy()


def latency(first: Run, second: Run, image: np.ndarray) -> tuple[float, float]:
    """Median milliseconds of two networks on one image, run in turns so that a busy machine slows both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(3):
        first(image), second(image)
    begun = time.perf_counter()
    while time.perf_counter() - begun < LATENCY_SECONDS or len(times[0]) < 5:
        for run, spent in zip((first, second), times, strict=True):
            started = time.perf_counter()
            run(image)
            spent.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[0]), statistics.median(times[1])


def open_file(path: Path, runtime: str, threads: int = 0) -> Run:
    """The file as a function: normalised images (N, C, H, W) -> logits (N, classes).

    Raises:
        UserError: unknown or missing runtime, or a file it cannot read.
    """
    if runtime not in RUNTIMES:
        raise UserError(f"There is no runtime '{runtime}' to verify with; {did_you_mean(runtime, RUNTIMES)}.")
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    return RUNTIMES[runtime](path, threads)


def installed(runtime: str) -> bool:
    """Whether the packages of a runtime are there."""
    try:
        __import__(runtime)
    except ImportError:
        return False
    return True


def _onnxruntime(path: Path, threads: int) -> Run:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("Verifying with onnxruntime needs it: pip install 'mirageq[onnx]'.") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry(*EXACT_PRODUCTS)
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no public base class
        raise UserError(f"ONNX Runtime cannot read {path}: {first_line(error)}.") from error
    return lambda images: session.run(None, {"images": images})[0]


def _openvino(path: Path, threads: int) -> Run:
    try:
        import openvino
    except ImportError as error:
        raise UserError("Verifying with openvino needs it: pip install 'mirageq[openvino]'.") from error
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}  # it would choose bf16
    if threads:
        settings["INFERENCE_NUM_THREADS"] = str(threads)
    try:
        model = openvino.Core().compile_model(str(path), "CPU", settings)
    except RuntimeError as error:
        raise UserError(f"OpenVINO cannot read {path}: {first_line(error)}.") from error
    return lambda images: model([images])[0]


RUNTIMES: dict[str, Callable[[Path, int], Run]] = {"onnxruntime": _onnxruntime, "openvino": _openvino}
