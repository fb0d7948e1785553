"""Files are written and run: nothing here stands in for ONNX Runtime."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mirageq import Reconstruct, Scheme, Teacher, UserError
from mirageq.export import check_structure, deliver, export_student, export_teacher, verify
from mirageq.export.arithmetic import in_kernel_arithmetic
from mirageq.export.emit import PROFILES, integer_network
from mirageq.export.verify import Verification, open_file
from mirageq.images import SyntheticSet
from mirageq.quant import convert
from mirageq.testing import SHAPE, TinyResNet


@torch.no_grad()
def draw_weights(network, seed):
    """Fixed random weights, each layer's by its fan-in; returns the generator, to draw more from."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(parameter[0].numel(), 1) ** 0.5)
    return generator


class Everything(nn.Module):
    """Depthwise convolution, ReLU6, concatenation, squeeze-and-excite, hard swish, pooling: one of each."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.narrow, self.widen = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.bn2, self.last = nn.BatchNorm2d(16), nn.Linear(16, 7)
        draw_weights(self.eval(), seed=3)

    def forward(self, x):
        x = F.relu6(self.bn0(self.stem(x)))
        x = torch.cat([x, F.relu6(self.bn1(self.deep(x)))], 1)
        squeezed = F.relu(self.narrow(x.mean((2, 3), keepdim=True)))
        x = F.hardswish(self.bn2(x * torch.sigmoid(self.widen(squeezed))))
        return self.last(F.max_pool2d(x, 2).mean((2, 3)))


@pytest.fixture(scope="module")
def images():
    return torch.randn(60, *SHAPE, generator=torch.Generator().manual_seed(0))


def student_of(network, images, **scheme):
    teacher = Teacher.wrap(network, SHAPE, mean=(0.5,) * 3, std=(0.25,) * 3)
    student = convert(teacher.network, Scheme(**scheme))
    student.calibrate([images])
    return teacher, student


SCHEMES = [
    {"weight_bits": 8, "activation_bits": 8, "placement": "deploy"},
    {"weight_bits": 4, "activation_bits": 4, "placement": "deploy", "weight_range": "mse", "activation_range": "mse"},
    {"weight_bits": 3, "activation_bits": 5, "placement": "deploy", "first_last_bits": 8, "first_output_bits": 8},
    {"weight_bits": 4, "activation_bits": 4, "placement": "paper"},
    {"weight_bits": 4, "activation_bits": 3, "placement": "deploy", "activation_range": "mse", "residual_bits": 8},
    {"weight_bits": 8, "activation_bits": 8, "placement": "deploy", "activation_symmetric": True},
]


class TwoHeads(nn.Module):
    """Logits that are joined, scaled and moved."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.f, self.g = nn.Conv2d(3, 8, 3), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(x)).mean((2, 3))
        logits = 16 * torch.cat([self.f(x), self.g(x)], 1)
        return logits - logits.mean(1, keepdim=True)


CASES = [(TwoHeads, SCHEMES[0]), (TwoHeads, SCHEMES[2])]
CASES += [(network, scheme) for network in (TinyResNet, Everything) for scheme in SCHEMES]
CASES.pop()  # signed activations around a max pool: ONNX Runtime 1.31 itself mixes them with unsigned zero points


@pytest.mark.parametrize(("network", "scheme"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_the_file_computes_what_the_student_computes(network, scheme, images, tmp_path):
    teacher, student = student_of(network(), images, **scheme)
    path = tmp_path / "model.onnx"
    export_student(student, teacher, path)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version <= 10
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 21
    run = open_file(path, "onnxruntime", 1)
    with torch.no_grad():
        expected = in_kernel_arithmetic(student, "onnxruntime")(images.double()).numpy()
        simulated = student(images).numpy()
    for count in (1, 60):  # any batch size
        got = run(images[:count].numpy())
        close = np.abs(got - expected[:count]).max(1) <= 1e-4 * np.abs(expected).max()
        assert close.mean() >= 0.98
        assert (got.argmax(1) == simulated[:count].argmax(1)).mean() >= 0.98


def initialisers(path):
    from onnx import numpy_helper

    return [(tensor.name, numpy_helper.to_array(tensor)) for tensor in onnx.load(path).graph.initializer]


def test_weights_and_biases_are_stored_as_integers_of_their_bits(images, tmp_path):
    teacher, student = student_of(TinyResNet(), images, weight_bits=3, activation_bits=4, placement="deploy")
    path = tmp_path / "model.onnx"
    export_student(student, teacher, path)
    arrays = [array for _, array in initialisers(path)]
    weights = [array for array in arrays if array.dtype == np.int8 and array.ndim > 1]
    assert len(weights) == len(student.weight_quantizers) == 4
    assert all(array.min() >= -4 and array.max() <= 3 for array in weights)
    assert sum(array.dtype == np.int32 and array.ndim == 1 for array in arrays) == 4
    assert not any(array.dtype == np.float32 and array.ndim > 1 for array in arrays)


def test_no_two_weights_share_zero_points_or_runtimes_without_vnni_fail(images, tmp_path):
    teacher, student = student_of(TinyResNet(), images, weight_bits=8, activation_bits=8, placement="deploy")
    export_student(student, teacher, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    stored = {tensor.name for tensor in model.graph.initializer}
    read = [node.input for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in stored]
    zero_points = [names[2] for names in read if len(names) > 2]
    assert len(set(zero_points)) == len(zero_points) == 4


def test_no_activation_leaves_its_bits(images, tmp_path):
    teacher, student = student_of(TinyResNet(), images, weight_bits=4, activation_bits=3, placement="deploy")
    path = tmp_path / "model.onnx"
    export_student(student, teacher, path)
    model = onnx.load(path)
    clips = [node for node in model.graph.node if node.op_type == "Clip"]
    assert len(clips) == len(student.activation_quantizers) - 1  # the image has 8 bits
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(node.output[0]) for node in clips)
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for codes in session.run(None, {"images": 10 * images.numpy()})[1:]:
        assert codes.dtype == np.uint8
        assert codes.max() <= 7


def test_packed_weights_take_half_the_room_and_compute_the_same(images, tmp_path):
    scheme = {"weight_bits": 4, "activation_bits": 4, "placement": "deploy", "first_last_bits": 8}
    teacher, student = student_of(TinyResNet(), images, **scheme)
    plain, packed = tmp_path / "plain.onnx", tmp_path / "packed.onnx"
    export_student(student, teacher, plain)
    export_student(student, teacher, packed, pack_weights=True)
    kinds = [str(array.dtype) for _, array in initialisers(packed) if array.ndim > 1]
    assert sorted(kinds) == ["int4", "int4", "int8", "int8"]
    assert check_structure(packed, "ort") < check_structure(plain, "ort")
    first, second = (open_file(path, "onnxruntime", 1)(images.numpy()) for path in (plain, packed))
    assert first == pytest.approx(second, abs=1e-5)


def test_tensorrt_gets_signed_grids_without_zero_points_and_float_biases(images, tmp_path):
    scheme = {"weight_bits": 8, "activation_bits": 8, "placement": "deploy", "activation_symmetric": True}
    teacher, student = student_of(TinyResNet(), images, **scheme)
    path = tmp_path / "model.onnx"
    delivery = deliver(student, teacher, images, path, profile="tensorrt")
    assert delivery.verifications == ()
    assert not any(array.dtype == np.int32 and array.ndim == 1 and array.size > 2 for _, array in initialisers(path))
    got = open_file(path, "onnxruntime", 1)(images.numpy())
    with torch.no_grad():
        assert (got.argmax(1) == student(images).argmax(1).numpy()).mean() >= 0.98


@pytest.mark.parametrize(
    ("scheme", "profile", "message"),
    [
        ({"weight_bits": 8, "activation_bits": 8}, "tensorrt", "takes symmetric grids only, and the activation"),
        ({"activation_symmetric": True}, "tensorrt", "at least 8 bits, and .* has 4"),
        ({}, "tflite", "no export profile 'tflite'"),
    ],
)
def test_what_a_profile_does_not_take_is_refused(scheme, profile, message, images, tmp_path):
    teacher, student = student_of(TinyResNet(), images, **scheme, placement="paper")
    with pytest.raises(UserError, match=message):
        export_student(student, teacher, tmp_path / "model.onnx", profile=profile)
    assert list(tmp_path.iterdir()) == []


def test_an_uncalibrated_student_is_refused():
    teacher = Teacher.wrap(TinyResNet(), SHAPE)
    with pytest.raises(UserError, match="calibrate the student before exporting"):
        integer_network(convert(teacher.network, Scheme()), PROFILES["ort"])


class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        self.eval()

    def forward(self, x):
        return self.second(torch.special.bessel_j0(self.first(x)).mean((2, 3)))


def test_an_operation_onnx_does_not_have_is_named_with_its_layer(images, tmp_path):
    teacher, student = student_of(Strange(), images, placement="deploy")
    with pytest.raises(UserError, match="ONNX has no operation for 'special_bessel_j0' at 'first.special_bessel_j0'"):
        export_student(student, teacher, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_is_said(images, tmp_path):
    teacher, student = student_of(TinyResNet(), images)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        export_student(student, teacher, tmp_path / "file" / "model.onnx")
    with pytest.raises(UserError, match=r"called something\.onnx"):
        deliver(student, teacher, images, tmp_path / "model.bin")


def test_a_delivery_says_what_it_is(images, tmp_path):
    teacher, student = student_of(TinyResNet(), images, placement="deploy")
    delivery = deliver(student, teacher, images, tmp_path / "model.onnx", runtimes=["onnxruntime"], threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    (proof,) = delivery.verifications
    assert proof.count == 60
    assert proof.agreement == 100
    assert proof.speedup == proof.float_milliseconds / proof.milliseconds > 0
    assert delivery.logical_bytes < delivery.container_bytes < delivery.file_bytes
    assert ("linear", "the logits, the network's result") in delivery.left_in_float
    model = onnx.load(tmp_path / "model.onnx")
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert facts["mirageq.bits"] == "w4a4"
    assert facts["mirageq.mean"] == "0.5,0.5,0.5"


def test_a_file_that_disagrees_is_not_kept(images, tmp_path, monkeypatch):
    teacher, student = student_of(TinyResNet(), images, placement="deploy")
    other = convert(teacher.network, Scheme(placement="deploy"))
    with torch.no_grad():
        other.network.get_parameter("linear.weight").mul_(-1)
        other.network.get_parameter("linear.bias").mul_(-1)
    other.calibrate([images])
    module = sys.modules["mirageq.export.deliver"]
    monkeypatch.setattr(
        module, "export_student", lambda student, *more, **settings: export_student(other, *more, **settings)
    )
    with pytest.raises(UserError, match=r"onnxruntime puts \d+ of 60 images in another class"):
        deliver(student, teacher, images, tmp_path / "model.onnx", runtimes=[])  # it is proved at home all the same
    assert list(tmp_path.iterdir()) == []


def test_one_image_may_always_differ_but_not_two():
    fields = {"runtime": "onnxruntime", "exact": 0.0, "largest_difference": 1.0, "milliseconds": 1.0}
    fields |= {"float_milliseconds": 1.0, "float_agreement": 100.0, "count": 20}
    Verification(agreement=95.0, allowed=1, **fields).require_agreement("x")
    Verification(agreement=90.0, allowed=2, **fields).require_agreement("x")  # rounding alone changes two
    with pytest.raises(UserError, match="2 of 20"):
        Verification(agreement=90.0, allowed=1, **fields).require_agreement("x")


def test_a_missing_runtime_names_its_extra(images, tmp_path, monkeypatch):
    teacher, student = student_of(TinyResNet(), images)
    path = tmp_path / "model.onnx"
    export_teacher(teacher, path)
    for runtime, extra in (("onnxruntime", "onnx"), ("openvino", "openvino")):
        monkeypatch.setitem(sys.modules, runtime, None)
        with pytest.raises(UserError, match=rf"pip install 'mirageq\[{extra}\]'"):
            verify(path, path, student, images, runtime=runtime)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"Exporting needs onnxscript: pip install 'mirageq\[onnx\]'"):
        export_teacher(teacher, tmp_path / "other.onnx")
    with pytest.raises(UserError, match="no runtime 'onnx'"):
        verify(path, path, student, images, runtime="onnx")


def test_a_truncated_file_is_said(images, tmp_path):
    teacher, _ = student_of(TinyResNet(), images)
    path = tmp_path / "model.onnx"
    export_teacher(teacher, path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match="ONNX Runtime cannot read"):
        open_file(path, "onnxruntime")
    with pytest.raises(UserError, match="There is no file"):
        open_file(tmp_path / "none.onnx", "onnxruntime")
    pytest.importorskip("openvino")
    with pytest.raises(UserError, match="OpenVINO cannot read"):
        open_file(path, "openvino")


def test_a_file_that_breaks_the_rules_is_told(images, tmp_path):
    symmetric = {"weight_bits": 8, "activation_bits": 8, "activation_symmetric": True, "placement": "deploy"}
    teacher, student = student_of(TinyResNet(), images, **symmetric, weight_symmetric=False)
    with pytest.raises(UserError, match="is not a symmetric int8 grid, as 'tensorrt' needs"):
        deliver(student, teacher, images, tmp_path / "model.onnx", profile="tensorrt")
    assert list(tmp_path.iterdir()) == []
    export_teacher(teacher, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    model.graph.node[0].input[0] = "nothing"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(UserError, match="is not valid ONNX"):
        check_structure(tmp_path / "model.onnx", "ort")


def test_what_onnx_cannot_write_is_told(images, tmp_path, monkeypatch):
    teacher, student = student_of(TinyResNet(), images)
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no way\nat all")))
    with pytest.raises(UserError, match=r"The network cannot be written as ONNX: no way\.$"):
        export_student(student, teacher, tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenetv1_100", "mobilenetv2_100", "tf_efficientnet_lite0", "regnety_002", "densenet121"]
)
def test_real_architectures_export_and_agree(name, bits, tmp_path):
    from mirageq import models

    torch.manual_seed(0)
    teacher = Teacher.wrap(models.import_timm().create_model(name).eval(), (3, 96, 96))
    student = convert(teacher.network, Scheme(weight_bits=bits, activation_bits=bits, placement="deploy"))
    images = torch.randn(40, 3, 96, 96)
    student.calibrate(images.split(20))
    delivery = deliver(student, teacher, images, tmp_path / "model.onnx", runtimes=["onnxruntime"])
    assert delivery.verifications[0].agreement >= 95


@pytest.mark.parametrize(("bits", "residual"), [(8, None), (4, None), (4, 8)])
def test_openvino_runs_the_file_of_its_profile(bits, residual, images, tmp_path):
    pytest.importorskip("openvino")
    scheme = {"weight_bits": bits, "activation_bits": bits, "residual_bits": residual, "placement": "deploy"}
    teacher, student = student_of(TinyResNet(), images, **scheme)
    delivery = deliver(student, teacher, images, tmp_path / "model.onnx", profile="openvino", runtimes=["openvino"])
    (proof,) = delivery.verifications
    exact = bits < 8 or torch.cpu._is_vnni_supported()  # which OpenVINO needs at 8 bits
    assert proof.agreement >= (100 if exact else 95)
    assert proof.exact >= (95 if exact else 0)


class Computed(nn.Module):
    """A clamp whose ends are tensors, or a bias that depends on the image."""

    def __init__(self, what):
        super().__init__()
        self.what, generator = what, torch.Generator().manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.zero, self.alpha = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.3))
        with torch.no_grad():
            for weight in (self.conv.weight, self.fc.weight):
                weight.copy_(torch.randn(weight.shape, generator=generator) / 5)
        self.eval()

    def forward(self, x):
        if self.what == "clamp":
            x = torch.clamp(self.conv(x), self.zero, self.alpha)
        else:
            x = F.conv2d(x, self.conv.weight, self.conv.bias * x.mean()).relu()
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("what", ["clamp", "bias"])
def test_what_the_network_computes_stays_in_the_file(what, symmetric, images, tmp_path):
    teacher, student = student_of(Computed(what), images, placement="deploy", activation_symmetric=symmetric)
    delivery = deliver(student, teacher, images, tmp_path / "model.onnx", runtimes=["onnxruntime"], threads=1)
    assert delivery.verifications[0].agreement == 100
    assert delivery.verifications[0].float_agreement >= 95
    if what == "clamp":
        run = open_file(tmp_path / "model.onnx", "onnxruntime", 1)
        with torch.no_grad():
            assert np.abs(run(images.numpy()) - student(images).numpy()).max() < 0.1 * float(student(images).std())


@pytest.mark.parametrize("what", ["softmax", "rim"])
def test_integer_kernels_that_round_otherwise_are_not_used(what, images, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.then, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

        def forward(self, x):
            x = self.conv(x).relu()
            x = x * x.softmax(1) if what == "softmax" else F.avg_pool2d(x, 3, 2, 1, ceil_mode=True)
            return self.fc(self.then(x).relu().mean((2, 3)))

    torch.manual_seed(0)
    teacher, student = student_of(Net().eval(), images, placement="deploy")
    delivery = deliver(student, teacher, images, tmp_path / "model.onnx", runtimes=["onnxruntime"], threads=1)
    assert delivery.verifications[0].exact == 100


@pytest.mark.parametrize(
    ("bits", "profile"), [(4, "ort"), (8, "ort"), (4, "openvino"), (8, "openvino"), (8, "tensorrt")]
)
def test_steps_that_learned_to_reach_beyond_a_relu6_leave_its_layers_integers(bits, profile, images, tmp_path):
    symmetric = profile == "tensorrt"
    scheme = {"placement": "deploy", "activation_bits": bits, "activation_symmetric": symmetric}
    teacher, student = student_of(Everything(), images, **scheme)
    with torch.no_grad():
        for quantizer in student.activation_quantizers.values():
            quantizer.scale.mul_(1.3)
    delivery = deliver(student, teacher, images, tmp_path / "model.onnx", profile=profile, runtimes=[], threads=1)
    for proof in delivery.verifications:
        assert (proof.exact if profile == "ort" else proof.agreement) == 100
    graph = onnx.load(tmp_path / "model.onnx").graph
    convolutions = [node.output[0] for node in graph.node if node.op_type == "Conv"]
    behind = [{node.op_type for node in graph.node if output in node.input} for output in convolutions]
    clamps = [{"Clip"}, {"Clip"}, {"Relu"}] if symmetric else []  # TensorRT fuses them, and has no integer Clip
    assert [read for read in behind if read != {"QuantizeLinear"}] == clamps


@pytest.mark.parametrize("bits", [3, 8])
def test_the_file_of_a_reconstructed_student_computes_what_it_computes(bits, images, tmp_path):
    scheme = {"weight_bits": 4, "activation_bits": bits, "residual_bits": 8, "weight_range": "mse"}
    teacher, student = student_of(Everything(), images, placement="deploy", **scheme)
    tuner = Reconstruct(steps=10, batch_size=16, lr=0.1, scale_lr=0.05, weight_scale_lr=0.01, bias_lr=0.01)
    tuner.tune(teacher, student, SyntheticSet(images, teacher.pseudo_labels(images), seed=0))
    delivery = deliver(student, teacher, images, tmp_path / "model.onnx", runtimes=[], threads=1)
    assert delivery.verifications[0].exact == 100


class Preactivated(nn.Module):
    """Norms behind sums, which no layer takes up; of positive scales, so that their codes are all the same."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        generator = draw_weights(self.eval(), seed=0)
        with torch.no_grad():
            for norm in self.norms:
                norm.weight.abs_()
                norm.running_var.uniform_(0.5, 2, generator=generator)

    def forward(self, x):
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = x + layer(F.relu(norm(x)))
        return self.last(F.relu(self.norms[-1](x)).mean((2, 3)))


@pytest.mark.parametrize("bits", [4, 8])
def test_norms_that_no_layer_takes_up_share_no_codes(bits, images, tmp_path):
    teacher, student = student_of(
        Preactivated(), images, weight_bits=bits, activation_bits=bits, placement="deploy", residual_bits=8
    )
    delivery = deliver(student, teacher, images, tmp_path / "model.onnx", runtimes=["onnxruntime"], threads=1)
    assert delivery.verifications[0].agreement == 100


class ReadTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 5)
        draw_weights(self.eval(), seed=0)

    def forward(self, x):
        return self.last(F.relu(self.layer(F.relu(self.layer(x)))).mean((2, 3)))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_that_is_read_twice_has_a_weight_for_each(bits, images, tmp_path):
    teacher, student = student_of(ReadTwice(), images, weight_bits=bits, activation_bits=bits, placement="deploy")
    delivery = deliver(student, teacher, images, tmp_path / "model.onnx", runtimes=["onnxruntime"], threads=1)
    assert delivery.verifications[0].agreement == 100
