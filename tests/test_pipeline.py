from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

from mirageq import GDFQ, Distill, IntraQ, Noise, Scheme, Teacher, UserError, agreement, quantize
from mirageq.methods.zeroq import ZeroQ
from mirageq.pipeline import untuned
from mirageq.recipe import Recipe, describe_part
from mirageq.testing import CLASSES, SHAPE, TinyResNet
from mirageq.tuning import Reconstruct, SQuant

SMALL = {"images": 32, "calibration_images": 32, "tuner": Distill(steps=20, batch_size=8, kd_weight=1.0, ce_weight=0.0)}


def test_from_model_to_tuned_student():
    model = TinyResNet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = quantize(
        model,
        IntraQ(iterations=10, batch_size=16),
        image_shape=SHAPE,
        scheme=Scheme(weight_bits=8, activation_bits=8, placement="deploy"),
        **SMALL,
    )
    images = result.source.sample(32).images
    assert result.student(images).shape == (32, CLASSES)
    assert agreement(result.student, result.teacher, images) > 90
    assert set(result.seconds) == {"convert", "synthesize", "calibrate", "tune"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_seed_decides_everything():
    teacher = Teacher.wrap(TinyResNet(), SHAPE)
    images = torch.randn(8, *SHAPE)
    first, again, other = (
        quantize(teacher, IntraQ(iterations=4, batch_size=16), seed=seed, **SMALL).student(images) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_more_bits_answer_more_like_the_teacher():
    teacher = Teacher.wrap(TinyResNet(), SHAPE)
    images = torch.randn(64, *SHAPE)
    errors = []
    for bits in (2, 4, 8):
        scheme = Scheme(weight_bits=bits, activation_bits=bits, weight_range="mse", activation_range="mse")
        student = quantize(teacher, Noise(), scheme=scheme, **{**SMALL, "tuner": Distill(steps=0)}).student
        errors.append((student(images) - teacher(images)).square().mean().item())
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


def test_what_is_missing_is_told(monkeypatch):
    with pytest.raises(UserError, match="Give image_shape"):
        quantize(TinyResNet(), Noise())
    with monkeypatch.context() as patch:
        patch.setattr(Noise, "synthesize", lambda *_, **__: pytest.fail("images were made"))
        with pytest.raises(UserError, match="calibration_images must be positive; got 0"):
            quantize(TinyResNet(), Noise(), image_shape=SHAPE, tuner=Distill(steps=0), images=4, calibration_images=0)
    with pytest.raises(UserError, match="images must be positive; got 0"):
        quantize(TinyResNet(), IntraQ(), image_shape=SHAPE, tuner=Distill(steps=0), images=0)


def test_a_teacher_has_its_own_device():
    teacher = Teacher.wrap(TinyResNet(), SHAPE)
    with pytest.raises(UserError, match="The teacher is on cpu; wrap it with device=meta instead"):
        quantize(teacher, Noise(), device="meta")


def test_a_generator_never_runs_out_of_images():
    teacher, quick = Teacher.wrap(TinyResNet(), SHAPE), {"warmup": 1, "batch_size": 4, "width": 8, "latent": 4}
    tuner = Reconstruct(steps=1, images=16, batch_size=16, then=Distill(steps=1, batch_size=16, ce_weight=0.0))
    scheme = Scheme(weight_range="mse")
    quantize(teacher, GDFQ(**quick), scheme=scheme, tuner=tuner, images=8, calibration_images=8)
    with pytest.raises(UserError, match="batch size 16 is larger than the 8 images to reconstruct on"):
        quantize(teacher, Noise(), scheme=scheme, tuner=tuner, images=8, calibration_images=8)
    with pytest.raises(UserError, match="batch size 16 is larger than the set of 8 synthetic images"):
        quantize(teacher, Noise(), scheme=scheme, tuner=SQuant(then=Distill(batch_size=16)), images=8)


def test_what_is_no_method_is_told():
    class Plain:
        def synthesize(self, teacher, count, *, seed=0, journal=None):
            raise AssertionError

    for method, told in ((Plain(), "make it a dataclass of settings"), (3, r"it has no synthesize\(teacher, count")):
        with pytest.raises(UserError, match=told):
            quantize(TinyResNet(), method, image_shape=SHAPE)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_tunes_whatever_the_caller_computes_in(mode):
    with mode():
        for model in (TinyResNet(), Teacher.wrap(TinyResNet(), SHAPE)):
            shape = None if isinstance(model, Teacher) else SHAPE
            result = quantize(model, IntraQ(iterations=2, batch_size=16), image_shape=shape, **SMALL)
    assert result.student(result.source.sample(4).images).requires_grad


def test_a_method_may_say_that_its_source_never_ends():
    @dataclass(frozen=True, kw_only=True)
    class Endless(Noise):
        endless: ClassVar[bool] = True

    teacher, scheme = Teacher.wrap(TinyResNet(), SHAPE), Scheme(weight_range="mse")
    tuner = Reconstruct(steps=1, images=16, batch_size=16)
    untuned(teacher, Recipe(method=Endless(), scheme=scheme, tuner=tuner, images=8))
    with pytest.raises(UserError, match="batch size 16 is larger than the 8 images"):
        untuned(teacher, Recipe(method=Noise(), scheme=scheme, tuner=tuner, images=8))


def test_methods_with_slots_are_methods():
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Slotted:
        within: ZeroQ = field(default_factory=lambda: ZeroQ(clamp=True))

        def synthesize(self, teacher, count, *, seed=0, journal=None):
            raise AssertionError

    with pytest.raises(UserError, match="The range of pixels follows from"):
        quantize(TinyResNet(), Slotted(), image_shape=SHAPE)
    assert describe_part(Slotted())["within"]["clamp"] is True
