from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mirageq.quant.fake_quant import (
    SMALLEST_SCALE,
    affine_parameters,
    fake_quantize,
    grid,
    integers,
    learned_fake_quantize,
    round_bias,
)

values = st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=40).map(torch.tensor)
bits = st.integers(2, 8)
quick = settings(max_examples=60, deadline=None)


def on_grid_of(x, bits, symmetric):
    scale, zero_point = affine_parameters(x.min(), x.max(), bits, symmetric)
    return scale, zero_point, *grid(bits, symmetric)


@quick
@given(values, bits, st.booleans())
def test_idempotent(x, bits, symmetric):
    parameters = on_grid_of(x, bits, symmetric)
    once = fake_quantize(x, *parameters)
    assert torch.equal(fake_quantize(once, *parameters), once)


@quick
@given(values, bits, st.booleans())
def test_error_is_at_most_half_a_step_inside_the_range(x, bits, symmetric):
    parameters = on_grid_of(x, bits, symmetric)
    error = (fake_quantize(x, *parameters) - x).abs().max()
    assert error <= parameters[0] * (0.5 + 1e-3)


@quick
@given(values, values, bits, st.booleans())
def test_codes_stay_on_the_grid_and_give_the_value(x, other, bits, symmetric):
    scale, zero_point, qmin, qmax = on_grid_of(other, bits, symmetric)
    codes = integers(x, scale, zero_point, qmin, qmax)
    assert codes.dtype == torch.int32
    assert qmin <= codes.min()
    assert codes.max() <= qmax
    assert qmin <= zero_point <= qmax
    assert zero_point == zero_point.round()
    assert torch.equal((codes - zero_point) * scale, fake_quantize(x, scale, zero_point, qmin, qmax))


@quick
@given(values, bits, st.booleans())
def test_zero_is_exact_and_order_is_kept(x, bits, symmetric):
    parameters = on_grid_of(x, bits, symmetric)
    assert fake_quantize(torch.zeros(1), *parameters) == 0
    assert (fake_quantize(x.sort().values, *parameters).diff() >= 0).all()


@quick
@given(values, bits, st.booleans())
def test_agrees_with_torch_where_inverse_and_division_agree(x, bits, symmetric):
    scale, zero_point, qmin, qmax = on_grid_of(x, bits, symmetric)
    scale = 2.0 ** scale.log2().ceil()  # torch multiplies by 1 / scale; the same for a power of two
    expected = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), qmin, qmax)
    assert torch.equal(fake_quantize(x, scale, zero_point, qmin, qmax), expected)


def test_halves_round_to_even_by_division():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert fake_quantize(x, torch.tensor(1.0), torch.tensor(8.0), 0, 15).tolist() == [0, 2, 2, 0, -2]
    third = torch.tensor(0.3)
    x = torch.arange(200) * 0.15
    assert torch.equal(integers(x, third, torch.tensor(0.0), 0, 255), (x / third).round().int())


def test_per_channel_parameters_are_those_of_each_channel():
    weight = torch.randn(5, 3, 2, 2)
    lo, hi = weight.flatten(1).min(1).values, weight.flatten(1).max(1).values
    scale, zero_point = affine_parameters(lo, hi, 4, False)
    whole = fake_quantize(weight, scale.view(-1, 1, 1, 1), zero_point.view(-1, 1, 1, 1), 0, 15)
    for channel in range(5):
        assert torch.equal(whole[channel], fake_quantize(weight[channel], scale[channel], zero_point[channel], 0, 15))


@pytest.mark.parametrize("symmetric", [True, False])
def test_ranges_that_are_degenerate_or_on_one_side(symmetric):
    zero = torch.zeros(())
    scale, zero_point = affine_parameters(zero, zero, 4, symmetric)
    assert scale == SMALLEST_SCALE
    assert torch.equal(fake_quantize(torch.zeros(3), scale, zero_point, *grid(4, symmetric)), torch.zeros(3))
    for lo, hi in ((2.0, 6.0), (-6.0, -2.0)):  # widened to hold zero
        scale, zero_point = affine_parameters(torch.tensor(lo), torch.tensor(hi), 8, symmetric)
        ends = torch.tensor([lo, hi, 0.0])
        assert torch.allclose(fake_quantize(ends, scale, zero_point, *grid(8, symmetric)), ends, atol=float(scale))


def test_symmetric_scale_uses_both_ends_of_the_signed_grid():
    scale, zero_point = affine_parameters(torch.tensor(-8.0), torch.tensor(1.0), 4, True)
    assert (scale, zero_point) == (1.0, 0.0)
    assert affine_parameters(torch.tensor(-1.0), torch.tensor(7.0), 4, True)[0] == 1.0


def test_gradient_passes_everywhere_or_only_inside():
    outer = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for clip, expected in ((False, [1.0, 2.0, 3.0, 4.0]), (True, [0.0, 2.0, 3.0, 0.0])):
        x = torch.tensor([-1.0, 0.2, 14.9, 16.0], requires_grad=True)
        fake_quantize(x, torch.tensor(1.0), torch.tensor(0.0), 0, 15, clip).backward(outer)
        assert x.grad.tolist() == expected


def test_input_is_not_changed_and_nan_is_not_hidden():
    x = torch.tensor([0.3, math.nan])
    before = x.clone()
    result = fake_quantize(x, torch.tensor(0.5), torch.tensor(0.0), 0, 3)
    assert torch.equal(x.nan_to_num(7), before.nan_to_num(7))
    assert result[1].isnan()


def test_bias_is_rounded_to_int32_steps_with_a_straight_gradient():
    bias = torch.tensor([0.26, -1e9, 3.0], requires_grad=True)
    rounded = round_bias(bias, torch.tensor([0.5, 0.1, 0.25]))
    rounded.sum().backward()
    assert rounded[0] == 0.5
    assert rounded[1].item() == pytest.approx(-0.1 * 2**31, rel=1e-6)
    assert rounded[2] == 3.0
    assert bias.grad.tolist() == [1, 1, 1]


def test_compiles_to_the_same_graph_without_breaks():
    def step(x):
        return fake_quantize(x, torch.tensor(0.1), torch.tensor(3.0), 0, 15, True)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert torch.equal(compiled(x), step(x))


@pytest.mark.parametrize(("low", "high"), [(0, 7), (-4, 3)])
def test_a_learned_step_gives_the_same_numbers_and_the_papers_gradients(low, high):
    x, scale, zero_point = torch.linspace(-3, 3, 41).requires_grad_(), torch.tensor(0.3, requires_grad=True), 2.0
    zero = torch.tensor(zero_point if low == 0 else 0.0)
    result = learned_fake_quantize(x, scale, zero, low, high)
    assert torch.equal(result, fake_quantize(x.detach(), scale.detach(), zero, low, high))
    upstream = torch.randn(41, generator=torch.Generator().manual_seed(0))
    to_x, to_scale = torch.autograd.grad((result * upstream).sum(), (x, scale))
    slow, passed = 0.0, []
    for value, weight in zip(x.tolist(), upstream.tolist(), strict=True):
        steps = value / 0.3
        code = round(steps)
        first, last = low - float(zero), high - float(zero)
        slow += weight * (first if code < first else last if code > last else code - steps)
        passed.append(weight if first <= code <= last else 0.0)
    assert float(to_scale) == pytest.approx(slow / math.sqrt(41 * (high - low)), rel=1e-3)
    assert to_x.tolist() == pytest.approx(passed)


def test_learned_steps_of_channels_have_a_gradient_each():
    x = torch.randn(5, 3, 2, 2)
    scale = torch.full((5, 1, 1, 1), 0.2, requires_grad=True)
    zero = torch.zeros(5, 1, 1, 1)
    whole = torch.autograd.grad(learned_fake_quantize(x, scale, zero, -4, 3).square().sum(), scale)[0]
    for channel in range(5):
        one = scale[channel].detach().requires_grad_()
        alone = torch.autograd.grad(learned_fake_quantize(x[channel], one, zero[channel], -4, 3).square().sum(), one)[0]
        assert whole[channel] == pytest.approx(alone, rel=1e-4)
