"""The rounding of integer kernels, against the kernels themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mirageq import Scheme, Teacher
from mirageq.capture import capture
from mirageq.export import export_student
from mirageq.export.arithmetic import in_double, in_kernel_arithmetic
from mirageq.export.kernels import KERNELS, OrtProduct, OrtSum, Requantization
from mirageq.export.verify import open_file
from mirageq.quant import convert
from mirageq.quant.quantizers import ActivationQuantizer
from mirageq.testing import TinyResNet

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def quantizer(scale: float, zero_point: int) -> ActivationQuantizer:
    made = ActivationQuantizer("x", 8, False)
    with torch.no_grad():
        made.scale.fill_(scale)
        made.zero_point.fill_(zero_point)
    return made.double()


def run(operation: str, inputs: dict[str, np.ndarray], domain: str, **attributes) -> np.ndarray:
    node = onnx.helper.make_node(operation, list(inputs), ["y"], domain=domain, **attributes)
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.UINT8, None)
    constants = [onnx.numpy_helper.from_array(value, name) for name, value in inputs.items()]
    graph = onnx.helper.make_graph([node], "one", [], [result], constants)
    domains = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=domains, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {})[0]


@pytest.mark.parametrize("seed", range(25))
def test_a_sum_of_any_two_codes_is_rounded_as_the_kernel_rounds_it(seed):
    random = np.random.default_rng(seed)
    scales = [np.float32(value) for value in random.uniform(0.01, 0.05, 3)]
    zeros = [np.uint8(value) for value in random.integers(0, 256, 3)]
    a, b = (codes.flatten().astype(np.uint8) for codes in np.meshgrid(np.arange(256), np.arange(256)))
    named = {"a": a, "sa": scales[0], "za": zeros[0], "b": b, "sb": scales[1], "zb": zeros[1]}
    named |= {"sy": scales[2], "zy": zeros[2]}
    expected = run("QLinearAdd", {name: np.asarray(value) for name, value in named.items()}, "com.microsoft")
    first, second, last = (quantizer(float(scale), int(zero)) for scale, zero in zip(scales, zeros, strict=True))
    values = [
        (torch.tensor(codes.astype(np.float64)) - q.zero_point) * q.scale for codes, q in ((a, first), (b, second))
    ]
    got = OrtSum(last, first, second)(*values)
    assert np.array_equal(torch.round(got / last.scale + last.zero_point).numpy(), expected)


def test_from_grid_to_grid_ties_fall_as_in_the_kernel():
    fine, coarse = np.float32(0.0137), np.float32(0.0137 * 13.6)  # 34, 102 and 170 lie in the middle of two codes
    codes = np.arange(256, dtype=np.uint8)
    inputs = {"x": codes * fine, "s": np.asarray(coarse), "z": np.asarray(np.uint8(3))}
    expected = run("QuantizeLinear", inputs, "")
    last = quantizer(float(coarse), 3)
    got = Requantization(last)(torch.tensor(codes * 1.0).double() * float(fine))
    assert np.array_equal(torch.round(got / last.scale + last.zero_point).numpy(), expected)


def test_an_accumulator_is_rounded_as_the_kernel_rounds_it():
    random = np.random.default_rng(0)
    most = 127 if torch.cpu._is_vnni_supported() else 63  # which no processor cuts off
    x, weight = random.integers(0, 256, (1, 32, 40, 40)), random.integers(-most, most + 1, (16, 32, 1, 1))
    scale, steps, wide = np.float32(0.0213), random.uniform(0.001, 0.01, 16).astype(np.float32), np.float32(0.0931)
    inputs = {"x": x.astype(np.uint8), "sx": scale, "zx": np.uint8(0), "w": weight.astype(np.int8), "sw": steps}
    inputs |= {"zw": np.zeros(16, np.int8), "sy": wide, "zy": np.uint8(117)}
    expected = run("QLinearConv", {name: np.asarray(value) for name, value in inputs.items()}, "")
    real = torch.nn.functional.conv2d(torch.tensor(x * 1.0), torch.tensor(weight * 1.0))
    real = real * float(scale) * torch.tensor(steps).double().view(1, -1, 1, 1)
    last = quantizer(float(wide), 117)
    got = OrtProduct(last, torch.tensor(scale), torch.tensor(steps), torch.zeros(16), False)(real)
    assert np.array_equal(torch.round(got / last.scale + last.zero_point).numpy(), expected)


class Pixelwise(nn.Module):
    """A residual block whose every pixel is a logit: nothing is averaged, so no wrong code can hide."""

    def __init__(self, shortcut: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(n, 16, 3, padding=1) for n in (3, 16, 16))
        self.shortcut = nn.Conv2d(16, 16, 1) if shortcut else nn.Identity()
        self.last = nn.Conv2d(16, 2, 1)

    def forward(self, x):
        x = nn.functional.relu(self.first(x))
        return self.last(self.shortcut(x) + self.third(nn.functional.relu(self.second(x)))).flatten(1)


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_openvino_rounds_as_its_kernels_are_written_here(bits, shortcut, tmp_path):
    pytest.importorskip("openvino")
    if bits == 8 and not torch.cpu._is_vnni_supported():
        pytest.skip("needs a processor with VNNI: without it OpenVINO does not compute 8-bit products exactly")
    torch.manual_seed(0)
    teacher = Teacher.wrap(Pixelwise(shortcut), (3, 32, 32))
    student = convert(teacher.network, Scheme(weight_bits=bits, activation_bits=bits, placement="deploy"))
    images = torch.randint(-128, 128, (200, 3, 32, 32)) / 64  # few values, none of them between two codes
    student.calibrate([images])
    export_student(student, teacher, tmp_path / "model.onnx", profile="openvino")
    got = open_file(tmp_path / "model.onnx", "openvino", 1)(images.numpy())
    with torch.no_grad():
        expected = in_kernel_arithmetic(student, "openvino")(images.double()).numpy()
    same = (np.abs(got - expected) <= 1e-5 * np.abs(expected).max()).mean()
    assert same >= (
        1 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 0.999
    )  # where it was found, and beyond


@pytest.mark.parametrize("placement", ["paper", "deploy"])
def test_both_copies_keep_the_students_codes(placement):
    torch.manual_seed(0)
    teacher = Teacher.wrap(TinyResNet(), (3, 8, 8))
    student = convert(teacher.network, Scheme(weight_bits=8, activation_bits=8, placement=placement))
    images = torch.randn(40, 3, 8, 8)
    student.calibrate([images])
    exact = in_double(student)
    for (quantizer, weight), (_, copied) in zip(student.quantized_weights(), exact.quantized_weights(), strict=True):
        scale, zero_point = (value.double() for value in quantizer.affine(weight))
        assert torch.equal(quantizer.codes(weight).double(), torch.round(copied / scale) + zero_point)
    with torch.no_grad():
        expected = student(images)
        for copied in (exact, *(in_kernel_arithmetic(student, runtime) for runtime in KERNELS)):
            close = (copied(images.double()) - expected).abs().amax(1) <= 1e-4 * expected.abs().max()
            assert close.double().mean() >= 0.9  # the others hold a value in the middle of two codes
    assert next(student.parameters()).dtype == torch.float32


def test_a_layer_used_twice_keeps_its_bias_in_the_steps_of_both_inputs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

        def forward(self, x):
            x = self.conv(self.stem(x).relu()).relu()
            return self.fc(self.conv(x).relu().mean((2, 3)))

    torch.manual_seed(0)
    student = convert(capture(Twice().eval(), (3, 8, 8)), Scheme(weight_bits=8, activation_bits=8, placement="deploy"))
    images = torch.randn(40, 3, 8, 8)
    student.calibrate([images])
    kept = in_double(student).network.state_dict()
    (bias, first), (_, second) = (pair for name, pair in student.integer_biases().items() if name.startswith("conv"))
    assert not torch.equal(first, second)
    for step in (first, second):
        expected = torch.round(bias / step).double() * step.double()
        assert any(torch.equal(value, expected) for name, value in kept.items() if name.startswith("bias_quantizers"))
