"""Each loss against a slow loop written from its definition."""

from __future__ import annotations

import math

import pytest
import torch

from mirageq.losses import bn_alignment, deviation_alignment, distillation, marginal_distance
from mirageq.methods.intraq import soft_inception, soft_targets
from mirageq.moments import channel_statistics
from mirageq.observe import Observation
from mirageq.teacher import BatchNormStatistics

rng = torch.Generator()


@pytest.fixture(autouse=True)
def from_the_start():
    rng.manual_seed(0)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((4, 3, 5, 6), torch.contiguous_format), ((4, 3, 5, 6), torch.channels_last), ((8, 7), torch.contiguous_format)],
)
def test_channel_statistics_and_their_gradient(shape, layout):
    x = (2 + 3 * torch.randn(shape, generator=rng)).contiguous(memory_format=layout).requires_grad_()
    mean, var = channel_statistics(x)
    dims = [0, *range(2, len(shape))]
    expected_var, expected_mean = torch.var_mean(x, dims, correction=0)
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(var, expected_var, rtol=1e-4, atol=1e-5)
    weights = torch.randn(2, shape[1], generator=rng)
    (got,) = torch.autograd.grad((weights[0] * mean + weights[1] * var).sum(), x)
    (expected,) = torch.autograd.grad((weights[0] * expected_mean + weights[1] * expected_var).sum(), x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_channel_statistics_of_bfloat16_are_summed_in_float32():
    x = torch.full((256, 1, 32, 32), 1.0, dtype=torch.bfloat16)
    mean, var = channel_statistics(x)
    assert mean.dtype == torch.float32
    assert mean.item() == pytest.approx(1)
    assert var.item() == pytest.approx(0, abs=1e-5)


def test_bn_alignment_is_the_mean_over_layers_of_channel_mean_squared_errors():
    inputs = {name: torch.randn(6, channels, 4, 4, generator=rng) for name, channels in (("a", 3), ("b", 5))}
    norms = [
        BatchNormStatistics(name, torch.randn(x.shape[1], generator=rng), torch.rand(x.shape[1], generator=rng))
        for name, x in inputs.items()
    ]
    total = 0.0
    for norm in norms:
        x, layer = inputs[norm.name], 0.0
        for channel in range(x.shape[1]):
            values = x[:, channel].flatten().tolist()
            mean = sum(values) / len(values)
            var = sum((value - mean) ** 2 for value in values) / len(values)
            layer += (mean - norm.mean[channel].item()) ** 2 + (var - norm.var[channel].item()) ** 2
        total += layer / x.shape[1]
    seen = Observation(torch.zeros(6, 2), torch.zeros(6, 2), inputs)
    assert bn_alignment(seen, norms).item() == pytest.approx(total / 2, rel=1e-4)


def test_zeroq_aligns_standard_deviations():
    x = torch.randn(6, 3, 4, 4, generator=rng)
    mean, var = torch.randn(3, generator=rng), torch.rand(3, generator=rng)
    expected = sum(
        ((x[:, c].mean() - mean[c]) ** 2 + (x[:, c].std(correction=0) - var[c].sqrt()) ** 2).item() for c in range(3)
    )
    assert deviation_alignment(*channel_statistics(x), mean, var).item() == pytest.approx(expected / 3, rel=1e-3)


def test_soft_inception_is_a_squared_error_of_one_probability():
    logits, labels, targets = (
        torch.randn(4, 6, generator=rng),
        torch.tensor([0, 5, 2, 2]),
        torch.tensor([1, 0.9, 0.95, 1]),
    )
    total = 0.0
    for row, label, target in zip(logits.tolist(), labels.tolist(), targets.tolist(), strict=True):
        probability = math.exp(row[label]) / sum(math.exp(value) for value in row)
        total += (probability - target) ** 2
    assert soft_inception(logits, labels, targets).item() == pytest.approx(total / 4, rel=1e-5)


def test_soft_targets_are_one_for_half_and_uniform_for_the_rest():
    targets = soft_targets(10_000, 0.6, torch.Generator().manual_seed(0))
    soft = targets[targets < 1]
    assert len(soft) == pytest.approx(5000, abs=200)
    assert soft.min() >= 0.6
    assert soft.mean().item() == pytest.approx(0.8, abs=0.01)
    assert (soft_targets(100, 1.0, torch.Generator()) == 1).all()


def test_marginal_distance_counts_only_images_whose_class_has_a_centre():
    features, centres = torch.randn(5, 8, generator=rng), torch.randn(5, 8, generator=rng)
    known, low, high = torch.tensor([True, False, True, True, False]), 0.6, 1.0
    total = 0.0
    for i in (0, 2, 3):
        distance = 1 - (features[i] @ centres[i] / features[i].norm() / centres[i].norm()).item()
        total += max(low - distance, 0) + max(distance - high, 0)
    got = marginal_distance(features, centres, known, low, high)
    assert got.item() == pytest.approx(total / 3, rel=1e-4)


def test_marginal_distance_is_zero_without_centres_or_with_the_widest_margins():
    features, centres = torch.randn(5, 8, generator=rng), torch.randn(5, 8, generator=rng)
    assert marginal_distance(features, centres, torch.zeros(5, dtype=torch.bool), 0.3, 0.8) == 0
    assert marginal_distance(features, centres, torch.ones(5, dtype=torch.bool), 0.0, 2.0) == 0


def test_distillation_matches_its_sum_and_vanishes_for_equal_logits():
    student, teacher, t = torch.randn(4, 5, generator=rng), torch.randn(4, 5, generator=rng), 3.0
    p, q = (teacher / t).softmax(1), (student / t).softmax(1)
    expected = (p * (p / q).log()).sum().item() / 4 * t**2
    assert distillation(student, teacher, t).item() == pytest.approx(expected, rel=1e-4)
    assert distillation(teacher, teacher, t).item() == pytest.approx(0, abs=1e-6)
