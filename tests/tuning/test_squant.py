from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mirageq import Scheme, Teacher, UserError
from mirageq.quant import convert
from mirageq.quant.fake_quant import grid
from mirageq.recipe import build, read
from mirageq.testing import TinyResNet
from mirageq.tuning.squant import SQuant, cancelled

SHAPE = (3, 8, 8)


def slow_kernels(steps, low, high):
    """Stage K, one kernel after another: flip the codes whose error reaches farthest the way the sum goes."""
    codes = steps.round()
    for row in range(len(steps)):
        errors = codes[row] - steps[row]
        total = float(errors.sum())
        sign = 1 if total > 0 else -1
        for index in sorted(range(len(errors)), key=lambda i: -sign * float(errors[i]))[: round(abs(total))]:
            if low <= codes[row, index] - sign <= high:
                codes[row, index] -= sign
    return codes


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), size=st.integers(2, 9))
def test_stage_k_is_the_slow_loop(seed, size):
    steps = 20 * torch.rand(12, size, generator=torch.Generator().manual_seed(seed)) - 10
    low, high = torch.tensor(-100.0), torch.tensor(100.0)
    fast = cancelled(steps.round()[None], steps[None], low, high)[0]
    assert torch.equal(fast, slow_kernels(steps, -100, 100))
    assert ((fast - steps).sum(1).abs() <= 0.5 + 1e-4).all()


@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (7, 12, 1, 1), (4, 30)])
def test_errors_cancel_in_kernels_and_channels_and_codes_stay_neighbours(shape):
    torch.manual_seed(0)
    steps = 6 * torch.randn(shape)
    ends = torch.full((shape[0], *[1] * (len(shape) - 1)), 100.0)
    codes = SQuant().codes(steps, -ends, ends)
    assert torch.equal(codes, codes.round())
    assert (codes - steps).abs().max() < 1
    assert (codes - steps).flatten(1).sum(1).abs().max() <= 0.5 + 1e-3
    nearest = SQuant(kernels=False, channels=False).codes(steps, -ends, ends)
    assert torch.equal(nearest, steps.round())
    assert (nearest - steps).flatten(1).sum(1).abs().max() > 0.5


def test_what_the_grid_cuts_off_is_no_error_to_make_up_for():
    steps = torch.tensor([[9.0, 9.0, 9.0, 0.1, -0.2, 0.3]])
    ends = torch.full((1, 1), 7.0)
    assert torch.equal(SQuant().codes(steps, -ends - 1, ends), torch.tensor([[7.0, 7, 7, 0, 0, 0]]))


@pytest.mark.parametrize("placement", ["paper", "deploy"])
def test_a_student_is_rounded_without_an_image(placement):
    torch.manual_seed(0)
    teacher = Teacher.wrap(TinyResNet(), SHAPE)
    scheme = Scheme(weight_bits=3, activation_bits=8, placement=placement, weight_range="percentile", percentile=100.0)
    student = convert(teacher.network, scheme)
    before = [weight.detach().clone() for _, weight in student.quantized_weights()]
    SQuant().tune(teacher, student, None)
    moved = 0
    for (quantizer, weight), old in zip(student.quantized_weights(), before, strict=True):
        low, high = grid(3, quantizer.symmetric)
        scale, zero_point = quantizer.affine(weight)
        codes = quantizer.codes(weight)
        assert torch.allclose((codes - zero_point) * scale, weight, atol=1e-6)
        assert codes.min() >= low
        assert codes.max() <= high
        moved += int((codes != quantizer.codes(old)).sum())
    assert moved > 0


def test_the_shipped_recipe_is_squant_and_a_grid_that_moves_is_refused():
    recipe = build(read("squant"))
    assert recipe.tuner == SQuant()
    assert recipe.scheme.bits == "w8a8"
    assert recipe.scheme.ranges_from == "batch_norms"
    teacher = Teacher.wrap(TinyResNet(), SHAPE)
    with pytest.raises(UserError, match=r"SQuant rounds weights on a grid that stays"):
        SQuant().tune(teacher, convert(teacher.network, Scheme()), None)
