"""Dead leaves: repeatable, normalised, and edged like photographs."""

from __future__ import annotations

import pytest
import torch

from mirageq.errors import UserError
from mirageq.leaves import dead_leaves
from mirageq.methods.genie import Genie
from mirageq.methods.zeroq import ZeroQ
from mirageq.teacher import Teacher
from mirageq.testing import SHAPE, TinyResNet


def leaves(count, size=32, seed=0):
    return dead_leaves(count, (3, size, size), torch.Generator().manual_seed(seed))


def test_they_are_normalised_and_follow_the_generator_alone():
    images = leaves(64)
    assert images.shape == (64, 3, 32, 32)
    assert images.mean((0, 2, 3)).abs().max() < 0.2
    assert (images.std((0, 2, 3)) - 1).abs().max() < 0.3
    assert torch.equal(images, leaves(64))
    assert not torch.equal(images, leaves(64, seed=1))


def test_neighbours_are_alike_but_for_edges():
    images = leaves(32, size=64)
    steps = (images[..., 1:] - images[..., :-1]).abs() / images.std()
    assert steps.median() < 0.1  # of Gaussian noise: 0.95
    assert (steps > 1).float().mean() > 0.02


@pytest.mark.parametrize("clamp", [True, False])
def test_painting_may_begin_from_them(clamp):
    teacher = Teacher.wrap(TinyResNet(), SHAPE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    settings = {"batch_size": 4, "iterations": 1, "lr": 1e-6, "min_lr": 0.0, "clamp": clamp}
    plain = ZeroQ(**settings).synthesize(teacher, 6, seed=3).sample(6).images
    images = ZeroQ(**settings, start="leaves").synthesize(teacher, 6, seed=3).sample(6).images
    assert not torch.equal(images, plain)
    assert not torch.equal(images[:2], images[4:])  # batches do not begin alike
    assert bool(images.abs().max() <= 2) is clamp  # the range of pixels, normalised
    steps = [(each[..., 1:] - each[..., :-1]).abs().median() for each in (images, plain)]
    assert steps[0] < 0.5 * steps[1]


def test_what_does_not_begin_from_pixels_refuses_them():
    with pytest.raises(UserError, match="GENIE's images are drawn from latent vectors; they cannot start from leaves"):
        Genie(start="leaves")
