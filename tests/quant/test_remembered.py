from __future__ import annotations

import pytest
import torch

from mirageq import Noise, Scheme, Teacher, UserError
from mirageq.capture import capture
from mirageq.quant import convert
from mirageq.quant.remembered import MOMENTS, Remembering, matched
from mirageq.testing import TinyResNet

SHAPE = (3, 8, 8)


class NormFirst(torch.nn.Module):
    """A norm that no layer comes right before, as in DenseNet: folding makes a convolution of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(7)
        self.last = torch.nn.Linear(7, 5)
        torch.nn.init.uniform_(self.norm.weight, 0.5, 2.0)
        torch.nn.init.normal_(self.norm.bias)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.norm(torch.cat((self.conv(x), x), 1))).mean((2, 3)))


def test_channels_get_the_moments_they_should_have():
    torch.manual_seed(0)
    mean, deviation = torch.randn(5), torch.rand(5)
    result = matched(3 + 2 * torch.randn(40, 5, 6, 6), mean, deviation)
    assert torch.allclose(result.mean((0, 2, 3)), mean, atol=1e-5)
    assert torch.allclose(result.std((0, 2, 3), correction=0), deviation, atol=1e-5)


@pytest.mark.parametrize("network", [TinyResNet, NormFirst])
@pytest.mark.parametrize("placement", ["paper", "deploy"])
def test_every_norm_is_remembered_whether_folded_or_not(network, placement):
    torch.manual_seed(0)
    teacher = Teacher.wrap(network(), SHAPE)
    student = convert(teacher.network, Scheme(placement=placement, ranges_from="batch_norms"))
    nodes = [node for node in student.network.graph.nodes if MOMENTS in node.meta]
    assert len(nodes) == len(teacher.batch_norms)
    seen = {}
    run = Remembering(student.network)
    for part in (*student.weight_quantizers.values(), *student.activation_quantizers.values()):
        part.state = "off"
    for part in student.bias_quantizers.values():
        part.state = "off"
    plain = run.run_node
    run.run_node = lambda node: seen.setdefault(node, plain(node))
    run.run(torch.randn(64, *SHAPE))
    for node in nodes:
        mean, deviation = node.meta[MOMENTS]
        assert torch.allclose(seen[node].mean((0, 2, 3)), mean, atol=1e-4)
        assert torch.allclose(seen[node].std((0, 2, 3), correction=0), deviation, atol=1e-3)


def test_ranges_do_not_follow_the_size_of_the_noise():
    torch.manual_seed(0)
    network = capture(TinyResNet(), SHAPE)
    ranges = []
    for size in (1.0, 7.0):
        student = convert(network, Scheme(ranges_from="batch_norms", activation_range="minmax"))
        student.calibrate([size * Noise().synthesize(Teacher.wrap(TinyResNet(), SHAPE), 64).sample(64).images])
        ranges.append([float(part.scale) for part in student.activation_quantizers.values()])
    assert ranges[0] == pytest.approx(ranges[1], rel=1e-3)


def test_a_network_without_norms_is_refused():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 5))
    with pytest.raises(UserError, match=r"need BatchNorm layers.*ranges_from=images"):
        convert(capture(network, SHAPE), Scheme(ranges_from="batch_norms"))


def test_a_channel_that_hardly_varies_is_remembered_as_smaller_than_gamma():
    network = NormFirst()
    network.norm.running_var.fill_(3 * network.norm.eps)
    student = convert(Teacher.wrap(network, SHAPE).network, Scheme(placement="paper", ranges_from="batch_norms"))
    (node,) = (node for node in student.network.graph.nodes if MOMENTS in node.meta)
    assert torch.allclose(node.meta[MOMENTS][1], network.norm.weight.abs() * 0.75**0.5)


def test_one_number_a_channel_gets_the_mean():
    mean, deviation = torch.tensor([1.0, 2.0]), torch.ones(2)
    assert matched(torch.zeros(1, 2), mean, deviation).tolist() == [[1.0, 2.0]]
    assert matched(torch.zeros(1, 2, 1, 1), mean, deviation).shape == (1, 2, 1, 1)


def test_a_scale_that_follows_the_images_is_said():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.fc = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 5)

        def forward(self, x):
            x, bn = self.conv(x), self.bn
            scale = bn.weight * x.mean()
            return self.fc(
                torch.batch_norm(x, scale, bn.bias, bn.running_mean, bn.running_var, False, 0.1, 1e-5, False).mean(
                    (2, 3)
                )
            )

    network = capture(Own(), (3, 8, 8))
    convert(network, Scheme())
    with pytest.raises(UserError, match="computes its scale or shift from the images; only stored ones are remembered"):
        convert(network, Scheme(ranges_from="batch_norms"))
    with pytest.raises(UserError, match="computes its scale or shift from the images; only stored ones can be folded"):
        convert(network, Scheme(placement="deploy"))
