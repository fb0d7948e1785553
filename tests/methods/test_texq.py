from __future__ import annotations

import pytest
import torch

from mirageq.errors import UserError
from mirageq.methods.texq import POOLED, TexQ, layered_alignment, natural_energies, texture_divergence, texture_energies
from mirageq.observe import Observation
from mirageq.seeding import stream
from mirageq.teacher import BatchNormStatistics, Teacher


def test_energies_are_shares_that_ignore_contrast_brightness_and_transposition():
    images = torch.rand(4, 3, 20, 20)
    shares = texture_energies(images)
    assert shares.shape == (4, len(POOLED))
    assert shares.sum(1) == pytest.approx(torch.ones(4))
    assert texture_energies(3 * images + 5) == pytest.approx(shares, abs=1e-4)
    assert texture_energies(images.transpose(2, 3)) == pytest.approx(shares, abs=1e-5)


def test_natural_images_have_more_coarse_texture_than_noise():
    natural = natural_energies((3, 32, 32), stream(0, "test"))
    noise = texture_energies(torch.randn(16, 3, 32, 32)).mean(0)
    coarse, fine = POOLED.index("LE"), POOLED.index("RR")
    assert natural[coarse] > 1.5 * noise[coarse]
    assert natural[fine] < 0.7 * noise[fine]


def test_the_divergence_is_zero_for_natural_shares_and_positive_for_noise():
    images = torch.randn(8, 3, 16, 16, requires_grad=True)
    own = texture_energies(images[:1]).detach()[0]
    assert float(texture_divergence(images[:1], own).detach()) == pytest.approx(0, abs=1e-6)
    divergence = texture_divergence(images, natural_energies((3, 16, 16), stream(0, "test")))
    assert divergence > 0.05
    assert torch.autograd.grad(divergence, images)[0].abs().sum() > 0


def test_layered_alignment_forgives_shallow_layers_and_not_the_last():
    x = torch.randn(6, 2, 4, 4)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    norms = [BatchNormStatistics(name, mean + 0.3 * var.sqrt(), var) for name in ("first", "last")]
    only = {"first": x, "last": x}
    seen = Observation(torch.zeros(6, 2), torch.zeros(6, 2), only)
    expected = ((0.3 * var.sqrt()) ** 2).mean() / 2  # the first layer's 0.3 lies within its tolerance of 0.5
    assert float(layered_alignment(seen, norms, 0.5)) == pytest.approx(float(expected), rel=1e-3)
    assert float(layered_alignment(seen, norms, 0.0)) == pytest.approx(2 * float(expected), rel=1e-3)


def test_margins_out_of_order_are_refused():
    with pytest.raises(UserError, match="cosine distances"):
        TexQ(margin_low=0.6, margin_high=0.5)


def test_what_cannot_be_painted_is_refused_at_once():
    with pytest.raises(UserError, match="centre_batch must be positive; got 0"):
        TexQ(centre_batch=0)
    body = (torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(64, 3))
    low = torch.nn.Sequential(*body).eval()
    with pytest.raises(UserError, match="looks at textures of 5 x 5 pixels, and the images have 4 x 4"):
        TexQ(warmup=1).synthesize(Teacher.wrap(low, (3, 4, 4)), 2)
