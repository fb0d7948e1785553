from __future__ import annotations

import pytest
import torch

from mirageq import Noise, Scheme, Teacher, UserError
from mirageq.pipeline import calibrate
from mirageq.quant import convert
from mirageq.testing import TinyResNet
from mirageq.tuning import Correct, Distill

SHAPE = (3, 8, 8)


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return Teacher.wrap(TinyResNet(), SHAPE)


def tuned(teacher, tuner, **scheme):
    student = convert(teacher.network, Scheme(weight_bits=2, activation_bits=8, **scheme))
    source = Noise().synthesize(teacher, 128)
    calibrate(student, source, 128)
    images = source.sample(128).images
    with torch.no_grad():
        before = (student(images) - teacher(images)).mean(0)
    tuner.tune(teacher, student, source)
    with torch.no_grad():
        after = (student(images) - teacher(images)).mean(0)
    return student, before.abs().mean(), after.abs().mean()


@pytest.mark.parametrize("placement", ["paper", "deploy"])
def test_the_mean_of_every_logit_comes_back(teacher, placement):
    _, before, after = tuned(teacher, Correct(images=128), placement=placement)
    assert after < 0.2 * before


def test_each_part_does_its_own_share(teacher):
    shifted, _, biases = tuned(teacher, Correct(images=128, batch_norms=False), placement="paper")
    student, _, both = tuned(teacher, Correct(images=128), placement="paper")
    moved, _, norms = tuned(teacher, Correct(images=128, biases=False), placement="paper")
    plain = convert(teacher.network, Scheme(weight_bits=2, activation_bits=8)).state_dict()
    for one, parts in ((shifted, {"bias"}), (student, {"bias", "running"}), (moved, {"running"})):
        state = one.state_dict()
        changed = {name for name in plain if plain[name].dim() and not torch.equal(state[name], plain[name])}
        assert {"running" if "running_" in name else name.rpartition(".")[2] for name in changed} == parts
    assert both <= max(biases, norms)


def test_a_student_that_needs_no_correction_is_left_as_it_is(teacher):
    student = convert(teacher.network, Scheme(weight_bits=8, activation_bits=8, placement="paper"))
    for part in (*student.weight_quantizers.values(), *student.activation_quantizers.values()):
        part.state = "off"
    before = {name: value.clone() for name, value in student.state_dict().items()}
    Correct(images=32).tune(teacher, student, Noise().synthesize(teacher, 32))
    for name, value in student.state_dict().items():
        assert torch.allclose(value, before[name], atol=1e-5, equal_nan=True), name


def test_another_tuner_follows(teacher):
    alone, _, _ = tuned(teacher, Correct(images=64), placement="deploy")
    followed, _, _ = tuned(teacher, Correct(images=64, then=Distill(steps=2, batch_size=16)), placement="deploy")
    weights = [student.network.get_parameter("conv2.weight") for student in (alone, followed)]
    assert not torch.equal(*weights)
    with pytest.raises(UserError, match="images must be positive; got 0"):
        Correct(images=0)


@pytest.mark.parametrize("placement", ["paper", "deploy"])
def test_a_linear_layer_of_tokens_is_corrected_channel_by_channel(placement):
    class Tokens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.mix, self.fc = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 16), torch.nn.Linear(16, 5)

        def forward(self, x):
            tokens = torch.relu(self.mix(torch.relu(self.conv(x)).flatten(2).transpose(1, 2)))
            return self.fc(tokens.mean(1))

    teacher = Teacher.wrap(Tokens(), (3, 8, 8))
    source = Noise().synthesize(teacher, 64)
    images = source.sample(64).images
    student = convert(teacher.network, Scheme(weight_bits=3, activation_bits=8, placement=placement))
    calibrate(student, source, 64)
    before = (student(images) - teacher(images)).mean(0).abs().max()
    Correct(images=64).tune(teacher, student, source)
    assert (student(images) - teacher(images)).mean(0).abs().max() < 0.2 * before


@pytest.mark.parametrize("norms", [True, False])
def test_what_two_layers_share_is_moved_once_for_both(norms):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.BatchNorm2d(3)
            self.fc = torch.nn.Linear(3, 5)
            self.eval()

        def layer(self, x):
            return torch.relu(self.bn(self.conv(x)) if norms else self.conv(x))

        def forward(self, x):
            return self.fc(self.layer(self.layer(x)).mean((2, 3)))

    teacher = Teacher.wrap(Tied(), (3, 8, 8))
    student = convert(teacher.network, Scheme(weight_bits=8, activation_bits=8, placement="paper"))
    name = "bn.running_mean" if norms else "conv.bias"
    moved = student.network.get_buffer(name) if norms else student.network.get_parameter(name)
    source, meant = Noise().synthesize(teacher, 64), moved.detach().clone()
    calibrate(student, source, 64)
    with torch.no_grad():
        (student.network.get_parameter("conv.bias") if norms else moved).add_(1.0)  # what quantization might have done
    Correct(images=64, biases=not norms).tune(teacher, student, source)
    wanted = meant + (1.0 if norms else 0.0)
    assert (moved - wanted).abs().max() < 0.3  # moved twice it would be 1.0 off
