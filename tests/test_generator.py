from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mirageq.errors import UserError
from mirageq.generator import Generator, GeneratorTraining, convolve_doubled
from mirageq.seeding import stream
from mirageq.testing import SHAPE

SMALL = {"warmup": 8, "batch_size": 6, "width": 8, "latent": 4}


@pytest.mark.parametrize("conditioning", ["embedding", "norm"])
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 30, 27)])
def test_images_have_the_networks_shape_and_normalised_channels(conditioning, shape):
    settings = GeneratorTraining(**SMALL, conditioning=conditioning)
    generator = Generator.drawn(7, shape, settings, stream(0, "test"))
    images = generator(torch.randn(6, 4), torch.arange(6)).detach()
    assert images.shape == (6, *shape)
    assert images.mean((0, 2, 3)) == pytest.approx(torch.zeros(shape[0]), abs=1e-4)
    assert images.var((0, 2, 3), correction=0) == pytest.approx(torch.ones(shape[0]), abs=1e-2)


def test_convolving_the_doubled_image_is_doubling_and_convolving():
    convolution = torch.nn.Conv2d(5, 4, 3, padding=1)
    x = torch.randn(2, 5, 7, 6, requires_grad=True)
    meant, got = convolution(F.interpolate(x, scale_factor=2)), convolve_doubled(x, convolution)
    assert torch.allclose(got, meant, atol=1e-5)
    of, pull = (x, *convolution.parameters()), torch.randn_like(meant)
    for one, other in zip(torch.autograd.grad(got, of, pull), torch.autograd.grad(meant, of, pull), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("conditioning", ["embedding", "norm"])
def test_the_class_changes_the_image(conditioning):
    generator = Generator.drawn(5, SHAPE, GeneratorTraining(**SMALL, conditioning=conditioning), stream(0, "test"))
    for norm in generator.norms:
        torch.nn.init.normal_(norm.scale)
    noise = torch.randn(4, 4)
    same, other = generator(noise, torch.tensor([0, 1, 2, 3])), generator(noise, torch.tensor([0, 1, 2, 4]))
    assert not torch.allclose(same[3], other[3])


def test_a_class_the_generator_does_not_know_is_refused():
    generator = Generator.drawn(5, SHAPE, GeneratorTraining(**SMALL), stream(0, "test"))
    with pytest.raises(UserError, match="knows 5 classes, and was asked for class 5"):
        generator(torch.randn(2, 4), torch.tensor([0, 5]))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"latent": 0}, "latent must be positive"),
        ({"warmup": -1}, "warmup must not be negative"),
        ({"crop_scale": 0.0}, "crop_scale is a fraction"),
        ({"crop_probability": 1.5}, r"crop_probability lies in \[0, 1\]; got 1.5"),
        ({"bn_weight": -1.0}, "bn_weight must not be negative"),
        ({"conditioning": "both"}, "conditioning"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        GeneratorTraining(**setting)
