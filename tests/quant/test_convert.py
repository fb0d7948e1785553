from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mirageq import Noise, Teacher, quantize
from mirageq.capture import capture
from mirageq.errors import UserError
from mirageq.graph import stored
from mirageq.quant import Scheme, convert
from mirageq.quant.quantizers import BiasQuantizer
from mirageq.testing import CLASSES, SHAPE, TinyResNet
from mirageq.tuning import Reconstruct, SQuant

PLACEMENTS = pytest.mark.parametrize("placement", ["paper", "deploy"])


@pytest.fixture(scope="module")
def network():
    return capture(TinyResNet(), SHAPE)


@pytest.fixture
def images():
    return torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(3))


def student_of(network, images, **settings):
    student = convert(network, Scheme(**settings))
    student.calibrate(images.split(8))
    return student


@PLACEMENTS
@pytest.mark.parametrize("weight_range", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("activation_range", ["minmax", "ema", "percentile", "mse"])
def test_8_bits_are_close_to_float(network, images, placement, weight_range, activation_range):
    settings = {"placement": placement, "weight_range": weight_range, "activation_range": activation_range}
    student = student_of(network, images, weight_bits=8, activation_bits=8, **settings)
    expected = network(images)
    assert (student(images) - expected).norm() < 0.03 * expected.norm()
    few = student_of(network, images, weight_bits=2, activation_bits=2, **settings)
    assert (few(images) - expected).norm() > 0.03 * expected.norm()


@PLACEMENTS
def test_the_network_is_left_alone_and_nothing_is_shared(network, images, placement):
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    code = network.code
    student = student_of(network, images, placement=placement, weight_range="mse")
    student(images).sum().backward()
    with torch.no_grad():
        for tensor in student.state_dict().values():
            tensor.zero_()
    assert network.code == code
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


@PLACEMENTS
@pytest.mark.parametrize("clip_gradient", [True, False])
def test_everything_learnable_gets_a_gradient(network, images, placement, clip_gradient):
    frozen = copy.deepcopy(network).requires_grad_(False)
    student = student_of(frozen, images, placement=placement, clip_gradient=clip_gradient)
    logits, features = student.observe(images)
    (logits.square().sum() + features.sum()).backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    expected = 4 + 1 + (6 if placement == "paper" else 3)  # weights, the linear bias, and norms or folded biases
    assert len(list(student.parameters())) == expected


@PLACEMENTS
def test_observed_features_are_what_the_last_layer_reads(network, images, placement):
    student = student_of(network, images, placement=placement)
    logits, features = student.observe(images)
    assert torch.equal(logits, student(images))
    assert logits.shape == (16, CLASSES)
    assert features.shape == (16, 12)
    if placement == "deploy":
        quantizer = student.activation_quantizers["conv3.mean"]
        codes = features / quantizer.scale
        assert torch.allclose(codes, codes.round(), atol=1e-4)
        assert codes.round().max() <= 15
    assert torch.equal(student.logits_network()(images), logits)


def test_four_dimensional_features_are_averaged(images):
    class Convolutional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 1)

        def forward(self, x):
            return self.head(self.conv(x).relu()).mean((2, 3))

    network = capture(Convolutional(), SHAPE)
    assert student_of(network, images).observe(images)[1].shape == (16, 6)


@PLACEMENTS
def test_train_and_eval_change_nothing(network, images, placement):
    student = student_of(network, images, placement=placement)
    student.eval()
    expected, state = student(images), copy.deepcopy(student.state_dict())
    student.train()
    assert torch.equal(student(images), expected)
    assert all(torch.equal(tensor, state[name]) for name, tensor in student.state_dict().items())


@PLACEMENTS
@pytest.mark.parametrize("weight_range", ["minmax", "mse"])
def test_state_dict_round_trip_is_bit_equal(network, images, placement, weight_range):
    scheme = Scheme(placement=placement, weight_range=weight_range)
    student = student_of(network, images, placement=placement, weight_range=weight_range)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    again = convert(capture(TinyResNet(), SHAPE), scheme)
    again.load_state_dict({name: tensor.clone() for name, tensor in student.state_dict().items()})
    assert torch.equal(again(images), student(images))
    assert torch.equal(copy.deepcopy(student)(images), student(images))
    pointers = [tensor.data_ptr() for tensor in student.state_dict().values()]
    assert len(set(pointers)) == len(pointers), "a file of tensors must not hold one twice"


@PLACEMENTS
def test_use_before_calibration_says_what_to_do(network, images, placement):
    student = convert(network, Scheme(placement=placement))
    first = next(iter(student.activation_quantizers))
    with pytest.raises(UserError, match=f"activation '{first}' has no range yet. Call student.calibrate"):
        student(images)
    fresh = convert(network, Scheme(placement=placement))
    student.load_state_dict(fresh.state_dict())
    with pytest.raises(UserError, match="no range yet"):
        student(images)
    with pytest.raises(UserError, match="No calibration image"):
        student.calibrate([])
    with pytest.raises(UserError, match=f"'{first}' is NaN or infinite"):
        student.calibrate([images * float("nan")])
    with pytest.raises(UserError, match="no range yet"):
        student(images)


def test_failed_calibration_keeps_the_earlier_ranges(network, images):
    student = student_of(network, images, placement="deploy")
    expected = student(images)
    with pytest.raises(UserError, match="NaN"):
        student.calibrate([images * 5, images * float("inf")])
    assert torch.equal(student(images), expected)


def test_calibration_sees_float_activations_and_quantized_weights(network, images):
    student = convert(network, Scheme(weight_bits=2, activation_range="minmax", placement="deploy"))
    student.calibrate([images])
    for part in student.activation_quantizers.values():
        part.state = "off"
    for part in student.bias_quantizers.values():
        part.state = "off"
    seen = student.observe(images)[1]
    quantizer = student.activation_quantizers["conv3.mean"]
    assert float(quantizer.scale) == pytest.approx(float(seen.detach().max()) / 15, rel=1e-5)


def test_deployed_biases_are_int32_steps(network, images):
    student = student_of(network, images, placement="deploy", weight_bits=8, activation_bits=8)
    checked = 0
    for node in student.network.graph.find_nodes(op="call_module"):
        part = student.network.get_submodule(node.target)
        if isinstance(part, BiasQuantizer):
            bias, input_scale = (stored(student.network, argument) for argument in node.args[:2])
            weights = student.network.get_submodule(node.args[2].args[0].target)
            scale = weights.affine(stored(student.network, node.args[2].args[0].args[0]))[0]
            codes = part(bias, input_scale, scale) / (input_scale * scale.flatten())
            assert torch.allclose(codes, codes.round(), atol=1e-3)
            assert (codes.round() != 0).any()
            checked += 1
    assert checked == 4


def test_minmax_weights_follow_and_fixed_ranges_stay(network, images):
    for kind, follows in (("minmax", True), ("mse", False)):
        student = student_of(network, images, weight_range=kind)
        quantizer = student.weight_quantizers["conv2"]
        weight = student.network.get_parameter("conv2.weight")
        before = quantizer.affine(weight)[0].clone()
        after = quantizer.affine(weight * 2)[0]
        assert torch.equal(after, before * 2 if follows else before)
        assert quantizer.codes(weight).dtype == torch.int32


def test_a_weight_used_twice_has_one_quantizer(images):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
            self.fc = nn.Linear(8, 4)

        def forward(self, x):
            x = self.conv(self.stem(x).relu()).relu()
            return self.fc(self.conv(x).relu().mean((2, 3)))

    student = student_of(capture(Twice(), SHAPE), images, placement="deploy")
    assert list(student.weight_quantizers) == ["stem", "conv", "fc"]
    assert len(student.bias_quantizers) == 4  # the same bias, in the steps of two inputs
    assert [part.name for part, _ in student.quantized_weights()] == ["stem", "conv", "fc"]
    assert student.size().weight_bytes == (8 * 3 * 9 + 8 * 8 + 8 * 4) // 2
    assert student(images).isfinite().all()


def test_size(network):
    size = convert(network, Scheme(weight_bits=4, placement="deploy")).size()
    weights = 8 * 3 * 9 + 8 * 8 * 9 + 12 * 8 * 9 + 12 * CLASSES
    channels = 8 + 8 + 12 + CLASSES
    assert size.weight_bytes == weights // 2
    assert size.scale_bytes == 4 * channels + 8 * 6
    assert size.float_bytes == 4 * channels
    assert size.total_bytes == size.weight_bytes + size.scale_bytes + size.float_bytes
    assert size.fp32_bytes == 4 * (weights + CLASSES + 4 * (8 + 8 + 12))
    paper = convert(network, Scheme(weight_bits=4)).size()
    assert paper.scale_bytes == 8 * channels + 8 * 3
    assert paper.float_bytes == 4 * (CLASSES + 4 * (8 + 8 + 12))
    assert paper.fp32_bytes == size.fp32_bytes


def test_a_network_without_layers_is_refused():
    class Nothing(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x.mean((2, 3)) * self.gain

    with pytest.raises(UserError, match="no convolution or linear layer"):
        convert(capture(Nothing(), SHAPE), Scheme())


def test_dead_channels_keep_their_bias(images):
    model = TinyResNet()
    with torch.no_grad():
        model.conv1.weight[0] = 0
        model.bn1.bias[0] = 0.7
    network = capture(model, SHAPE)
    student = student_of(network, images, placement="deploy", weight_bits=8, activation_bits=8)
    expected = network(images)
    assert (student(images) - expected).norm() < 0.03 * expected.norm()


def test_moving_the_student_moves_everything(network, images):
    student = student_of(network, images, placement="deploy").to(torch.float64)
    assert {tensor.dtype for tensor in student.state_dict().values()} == {torch.float64, torch.bool}
    assert student(images.double()).dtype == torch.float64


def test_a_bias_beyond_32_bits_is_said():
    network = TinyResNet()
    with torch.no_grad():
        network.conv2.weight[3] = 0
        network.bn2.bias[3] = 1e5
    student = convert(capture(network, SHAPE), Scheme(placement="deploy"))
    with pytest.raises(UserError, match=r"The bias 'conv2.bias' needs .* more than 32 bits hold"):
        student.calibrate([1e-3 * torch.randn(4, *SHAPE)])


def test_what_normalises_the_image_has_its_bits_and_the_first_layer_is_behind_it():
    class Normalising(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.stem, self.fc = nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x):
            return self.fc(torch.relu(self.stem(self.bn((x - 0.5) / 0.25))).mean((2, 3)))

    student = convert(capture(Normalising(), SHAPE), Scheme(placement="deploy", first_last_bits=8, first_output_bits=6))
    bits = {name: quantizer.bits for name, quantizer in student.activation_quantizers.items()}
    assert bits == {"image": 8, "image.sub": 8, "image.div": 8, "bn": 8, "stem": 6, "stem.mean": 8}
    assert {name: quantizer.bits for name, quantizer in student.weight_quantizers.items()} == {
        "bn": 8,
        "stem": 8,
        "fc": 8,
    }


def test_features_of_tokens_are_averaged_over_tokens():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x):
            return self.fc(self.conv(x).flatten(2).transpose(1, 2)).mean(1)

    teacher = Teacher.wrap(Tokens(), SHAPE)
    images = torch.randn(2, *SHAPE)
    assert teacher.feature_dim == 8
    student = convert(teacher.network, Scheme(weight_bits=8, activation_bits=8))
    student.calibrate([images])
    torch.testing.assert_close(student.observe(images)[1], teacher.observe(images).features, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("placement", ["paper", "deploy"])
def test_a_weight_may_be_a_buffer(placement):
    class Blurred(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
            self.register_buffer("blur", torch.ones(8, 1, 3, 3) / 9)

        def forward(self, x):
            x = nn.functional.conv2d(torch.relu(self.stem(x)), self.blur, stride=2, groups=8)
            return self.fc(torch.relu(x).mean((2, 3)))

    teacher = Teacher.wrap(Blurred(), SHAPE)
    scheme = Scheme(placement=placement, weight_range="mse")
    for tuner in (SQuant(), Reconstruct(steps=2, images=8, batch_size=4)):
        student = quantize(teacher, Noise(), scheme=scheme, tuner=tuner, images=8, calibration_images=8).student
        assert student.size().weight_bytes == (8 * 27 + 8 * 9 + 40) // 2


@pytest.mark.parametrize("placement", ["paper", "deploy"])
def test_a_norm_behind_the_last_layer_does_not_become_it(placement):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc, self.bn = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), nn.BatchNorm1d(5)

        def forward(self, x):
            return self.bn(torch.relu(self.fc(torch.relu(self.conv(x)).mean((2, 3)))))

    teacher = Teacher.wrap(Normed(), SHAPE)
    student = convert(teacher.network, Scheme(placement=placement, first_last_bits=8))
    student.calibrate([torch.randn(4, *SHAPE)])
    assert student.weight_quantizers["fc"].bits == 8
    assert student.observe(torch.randn(4, *SHAPE))[1].shape == (4, teacher.feature_dim) == (4, 8)


def test_only_deploy_keeps_what_normalises_the_image_at_8_bits():
    class Clipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x):
            return self.fc(torch.relu(self.conv(x.clamp(0, 1))).mean((2, 3)))

    network = capture(Clipping(), SHAPE)
    for placement, bits in (("paper", 4), ("deploy", 8)):
        assert next(iter(convert(network, Scheme(placement=placement)).activation_quantizers.values())).bits == bits
