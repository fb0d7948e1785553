from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from mirageq import Scheme
from mirageq.graph import capture
from mirageq.quant import convert
from mirageq.quant.dead_channels import silence_dead_channels
from mirageq.quant.fold import fold_batch_norms

SHAPE = (3, 8, 8)


class Separable(nn.Module):
    """A first, a padded depthwise and a 1x1 convolution. Of what the first one gives, channels 0 to 2 are dead."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.project = nn.Conv2d(6, 4, 1)
        self.linear = nn.Linear(4, 5)
        with torch.no_grad():
            self.first.weight[:3] *= 1e-9
            self.norm.bias[:3] = -1
            self.depthwise.weight[:3] = 50
            self.depthwise.bias[:3] = torch.tensor([0.7, -0.5, 0.3])
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(F.relu6(self.norm(self.first(x))), (0, 1, 0, 1))
        return self.linear(self.project(F.relu(self.depthwise(x))).mean((2, 3)))


def test_what_reads_dead_channels_is_zeroed_and_the_function_stays():
    torch.manual_seed(0)
    network = Separable()
    module = fold_batch_norms(capture(network, SHAPE))
    images = torch.randn(20, *SHAPE)
    before = module(images)
    assert silence_dead_channels(module) == 4  # three after the first layer, and the one whose bias is negative then
    assert torch.equal(module(images), before)
    weights = {name: value for name, value in module.named_parameters() if value.dim() == 4}
    (depthwise,) = (value for name, value in weights.items() if "depthwise" in name)
    (project,) = (value for name, value in weights.items() if "project" in name)
    assert (depthwise.flatten(1).abs().sum(1) == 0).tolist() == [True] * 3 + [False] * 3
    assert (project.flatten(2).abs().sum((0, 2)) == 0).tolist() == [False, True] + [False] * 4


def test_biases_beside_dead_inputs_keep_their_resolution():
    torch.manual_seed(0)
    network = Separable()
    student = convert(capture(network, SHAPE), Scheme(placement="deploy", weight_bits=4, activation_bits=4))
    student.calibrate([torch.randn(20, *SHAPE)])
    bias, step = student.integer_biases()["depthwise.bias"]
    assert torch.allclose((bias / step).round() * step, network.depthwise.bias, atol=0.05)


def test_channels_that_live_or_pass_no_relu_are_left_alone():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    with torch.no_grad():
        network[0].weight[0], network[0].bias[0] = 0, -1  # negative, not dead
    module = fold_batch_norms(capture(network, SHAPE))
    assert silence_dead_channels(module) == 0
