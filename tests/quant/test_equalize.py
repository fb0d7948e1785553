from __future__ import annotations

import pytest
import torch
from torch import nn

from mirageq import Scheme, Teacher, UserError
from mirageq.capture import capture
from mirageq.graph import layer_name
from mirageq.quant import convert
from mirageq.quant.equalize import equalize, find_pairs
from mirageq.quant.fold import fold_batch_norms
from mirageq.quant.quantizers import in_float
from mirageq.testing import TinyResNet

SHAPE = (3, 8, 8)


class Inverted(nn.Module):
    """1x1, depthwise and 1x1 convolutions, a ReLU6 that nothing may be pushed through, and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.project = nn.Conv2d(6, 4, 1)
        self.capped = nn.Conv2d(4, 4, 1)
        self.last = nn.Linear(4, 5)
        with torch.no_grad():
            self.expand.weight.mul_(torch.logspace(-2, 2, 6).view(-1, 1, 1, 1))
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.project(torch.relu(self.depthwise(torch.relu(self.norm(self.expand(x))))))
        x = x + self.capped(nn.functional.relu6(x))
        return self.last(x.mean((2, 3)))


def narrow() -> nn.Module:
    """One channel between two convolutions: the second looks depthwise, and is not."""
    layers = nn.Conv2d(3, 1, 1), nn.ReLU(), nn.Conv2d(1, 6, 3), nn.Flatten(), nn.Linear(6 * 36, 5)
    return nn.Sequential(*layers)


def two_classifiers() -> nn.Module:
    """What the second linear layer reads are the features, which stay as they are."""
    layers = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(2 * 36, 6), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(6, 5))


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (Inverted, [("expand", "depthwise"), ("depthwise", "project")]),
        (narrow, [("0", "2")]),
        (two_classifiers, [("0", "2")]),
    ],
)
def test_neighbours_get_the_same_ranges_and_the_function_stays(build, names):
    torch.manual_seed(0)
    module = fold_batch_norms(capture(build(), SHAPE))
    images = torch.randn(20, *SHAPE)
    before = module(images)
    pairs = equalize(module)
    assert [(layer_name(pair.first), layer_name(pair.second)) for pair in pairs] == names
    for pair in pairs:
        first, _, second = pair.tensors(module)
        ranges = [weight.flatten(1).abs().amax(1) for weight in (first, second)]
        assert torch.allclose(ranges[0], ranges[1], rtol=1e-2)
    assert torch.allclose(module(images), before, rtol=1e-4, atol=1e-4)


def test_a_layer_that_others_read_too_is_left_alone():
    torch.manual_seed(0)
    module = fold_batch_norms(capture(TinyResNet(), SHAPE))
    assert find_pairs(module) == []  # conv1 is read by conv2 and a sum, conv2 by the sum, conv3 by the pooling


def test_an_equalized_student_computes_what_the_teacher_does_and_remembers_its_moments():
    torch.manual_seed(0)
    teacher = Teacher.wrap(Inverted(), SHAPE)
    student = convert(
        teacher.network, Scheme(placement="deploy", equalize=True, weight_bits=8, ranges_from="batch_norms")
    )
    images = torch.randn(20, *SHAPE)
    with in_float(student), torch.no_grad():
        assert torch.allclose(student(images), teacher(images), rtol=1e-4, atol=1e-4)
    student.calibrate([images])  # on moments that were scaled with their layer
    scale = float(student.activation_quantizers["expand"].scale)
    plain = convert(teacher.network, Scheme(placement="deploy", weight_bits=8, ranges_from="batch_norms"))
    plain.calibrate([images])
    assert scale != float(plain.activation_quantizers["expand"].scale)


def test_a_linear_layer_of_maps_reads_columns_and_no_channels():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.columns, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x):
            return self.fc(self.columns(torch.relu(self.conv(x))).mean((2, 3)))

    assert find_pairs(capture(Net(), SHAPE)) == []


def test_a_network_in_which_nothing_can_be_equalized_is_told():
    with pytest.raises(UserError, match="Nothing can be equalized.*Leave out scheme.equalize"):
        convert(capture(TinyResNet(), SHAPE), Scheme(placement="deploy", equalize=True))


def test_equalization_needs_folded_norms():
    with pytest.raises(UserError, match="needs the placement 'deploy'"):
        Scheme(equalize=True)


def test_a_channel_that_carries_nothing_is_left_as_it_is():
    torch.manual_seed(0)
    network = Inverted()
    with torch.no_grad():
        network.depthwise.weight[2] = 0.0
        network.depthwise.bias[2] = 0.5
        network.project.weight[:, 4] = 0.0
    module = fold_batch_norms(capture(network, SHAPE))
    images = torch.randn(20, *SHAPE)
    before = module(images)
    equalize(module)
    assert torch.allclose(module(images), before, rtol=1e-4, atol=1e-5)
    assert module.get_parameter("depthwise.bias").detach().abs().max() < 10


@pytest.mark.parametrize("kind", ["tied", "from the image"])
def test_a_bias_that_is_not_the_layers_own_keeps_it_as_it_is(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)
            self.fc = nn.Linear(8, 5)
            if kind == "tied":
                self.b.bias = self.a.bias

        def forward(self, x):
            bias = self.a.bias if kind == "tied" else self.a.bias * x.mean()
            x = torch.relu(nn.functional.conv2d(x, self.a.weight, bias))
            return self.fc(self.c(torch.relu(self.b(x))).mean((2, 3)))

    network, images = capture(Net(), (3, 8, 8)), torch.randn(2, 3, 8, 8)
    before = network(images)
    assert [layer_name(pair.first) for pair in equalize(network)] == ([] if kind == "tied" else ["b"])
    torch.testing.assert_close(network(images), before)
