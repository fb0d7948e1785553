from __future__ import annotations

from functools import partial

import pytest
import torch

from mirageq import IntraQ, Teacher, UserError, ZeroQ
from mirageq.canvas import Canvas
from mirageq.images import GrowingSet
from mirageq.journal import Journal
from mirageq.methods.genie import Genie
from mirageq.methods.real import Real
from mirageq.paint import Descent, Parameters, cosine, descend, paint
from mirageq.testing import SHAPE, TinyResNet

TARGET = torch.linspace(-1, 1, 3 * 4 * 4).view(1, 3, 4, 4)


def towards_target(images, generator):
    return {"distance": (images - TARGET).square().mean()}


def painted(journal=None, **settings):
    start = torch.zeros(2, 3, 4, 4)
    journal = journal or Journal()
    return paint(start, towards_target, Descent(**settings), torch.Generator(), journal=journal, name="images")


@pytest.mark.parametrize("schedule", ["plateau", "cosine"])
def test_the_descent_reaches_a_simple_target(schedule):
    images = painted(iterations=200, lr=0.1, schedule=schedule)
    torch.testing.assert_close(images, TARGET.expand(2, -1, -1, -1), atol=0.05, rtol=0)


def test_rates_fall_as_their_schedule_says():
    flat, falling = Journal(), Journal()
    painted(flat, iterations=40, lr=1e-9, patience=5, min_lr=1e-12)
    painted(falling, iterations=40, lr=0.1, schedule="cosine", min_lr=0.01)
    rates = [row["lr"] for row in falling.history]
    assert rates == sorted(rates, reverse=True)
    assert rates[20] == pytest.approx(cosine(0.1, 0.01, 0.5)) == pytest.approx(0.055)
    assert flat.history[0]["lr"] == 1e-9


@pytest.mark.parametrize("schedule", ["plateau", "cosine"])
def test_rates_of_groups_keep_their_ratio(schedule):
    first, second = (torch.zeros(3, requires_grad=True) for _ in range(2))
    descend(
        [Parameters([first]), Parameters([second], rate=0.05)],
        lambda: first + second,
        lambda x, generator: {"flat": x.sum() - x.sum().detach()},  # Adam moves each number by its rate
        Descent(iterations=40, lr=0.1, schedule=schedule, patience=2, min_lr=1e-3),
        torch.Generator(),
        journal=Journal(),
        name="x",
    )
    assert second.detach() == pytest.approx(0.05 * first.detach(), rel=1e-3)
    assert 0.1 < -first[0] < 3


def test_clamped_images_are_pixels_that_exist():
    teacher = Teacher.wrap(TinyResNet(), SHAPE, mean=(0.5, 0.4, 0.3), std=(0.5, 0.5, 0.25))
    low, high = teacher.pixel_range()
    free, clamped = (
        IntraQ(iterations=5, batch_size=8, clamp=clamp).synthesize(teacher, 8).sample(8).images
        for clamp in (False, True)
    )
    assert (free > high + 0.1).any()
    assert (clamped >= low - 1e-3).all()
    assert (clamped <= high + 1e-3).all()


def test_a_generators_images_are_stretched_to_the_pixels_there_are():
    shown = {}
    for mean, std in ((0.5, 0.5), (0.5, 0.25)):
        teacher = Teacher.wrap(TinyResNet(), SHAPE, mean=(mean,) * 3, std=(std,) * 3)
        images = (
            Genie(iterations=1, batch_size=16, clamp=True, lr=1e-6, min_lr=0).synthesize(teacher, 16).sample(16).images
        )
        shown[std] = images * std + mean
        assert shown[std].min() >= -1e-3
        assert shown[std].max() <= 1 + 1e-3
        assert shown[std].std() == pytest.approx(0.25, abs=0.05)
    assert torch.allclose(shown[0.5], shown[0.25], atol=1e-2)


def test_clamping_needs_the_normalisation():
    with pytest.raises(UserError, match="range of pixels follows from the network's normalisation"):
        ZeroQ(clamp=True).synthesize(Teacher.wrap(TinyResNet(), SHAPE), 4)


def test_a_loss_that_is_not_finite_is_told():
    with pytest.raises(UserError, match="loss became nan at iteration 0 of images. Lower lr"):
        paint(
            torch.zeros(1, 3, 4, 4),
            lambda images, generator: {"bad": images.sum() * float("nan")},
            Descent(iterations=3),
            torch.Generator(),
            journal=Journal(),
            name="images",
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, "iterations must be positive; got 0"),
        ({"batch_size": -1}, "batch_size must be positive"),
        ({"precision": "float16"}, "Unknown precision 'float16'; did you mean 'bfloat16'"),
        ({"min_lr": -1.0}, "min_lr must not be negative"),
        ({"lr": 1e-5}, "falls to min_lr, which is at most lr; got 0.0001 and 1e-05"),
        ({"lr_factor": 1.0}, r"lr_factor is what the rate is multiplied by to fall, in \(0, 1\); got 1.0"),
        ({"schedule": "cosin"}, "Unknown schedule 'cosin'; did you mean 'cosine'"),
    ],
)
def test_settings_that_make_no_sense_are_told(settings, message):
    with pytest.raises(UserError, match=message):
        Descent(**settings)


@pytest.mark.parametrize("method", [IntraQ, Genie])
def test_images_may_be_smaller_than_the_networks(method):
    teacher = Teacher.wrap(TinyResNet(), SHAPE)
    source = method(iterations=2, batch_size=4, image_size=8).synthesize(teacher, 4)
    assert source.sample(4).images.shape == (4, 3, 8, 8)


@pytest.mark.parametrize("size", [8, 1000])
def test_a_network_of_one_size_says_so(size):
    teacher = Teacher.wrap(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 5)), SHAPE)
    with pytest.raises(UserError, match=f"takes images of 16 x 16 pixels and none of {size} x {size}. Leave method"):
        Canvas(teacher, 4, Descent(image_size=size), 0, Journal())
    assert Canvas(teacher, 4, Descent(image_size=16), 0, Journal()).image_shape == SHAPE


@pytest.mark.parametrize("settings", [Descent, partial(Real, path="images.npz")])
def test_an_image_size_is_positive(settings):
    with pytest.raises(UserError, match="image_size is a number of pixels; got 0"):
        settings(image_size=0)


def test_a_part_that_is_painted_and_not_yet_written_is_not_painted_again(tmp_path, monkeypatch):
    teacher, method = Teacher.wrap(TinyResNet(), SHAPE), ZeroQ(iterations=4, batch_size=4)
    whole = method.synthesize(teacher, 4).sample(4).images
    write = GrowingSet.write
    monkeypatch.setattr(GrowingSet, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        method.synthesize(teacher, 4, journal=Journal(tmp_path, checkpoint_seconds=0))
    monkeypatch.setattr(GrowingSet, "write", write)
    monkeypatch.setattr(torch.optim.Adam, "step", None)  # no step is taken any more
    assert torch.equal(method.synthesize(teacher, 4, journal=Journal(tmp_path)).sample(4).images, whole)
    assert not (tmp_path / "checkpoints").exists()
