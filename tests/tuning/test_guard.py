from __future__ import annotations

import math

import pytest

from mirageq.errors import UserError
from mirageq.tuning.guard import DivergenceGuard, TuningDiverged


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_alarms_at_once(bad):
    assert DivergenceGuard().alarmed_by(bad)


def test_an_explosion_alarms_but_noise_and_a_single_spike_do_not():
    guard = DivergenceGuard()
    noisy = [1.0, 2.5, 0.7, 1.8, 60.0, 1.2, 0.9]
    assert not any(guard.alarmed_by(loss) for loss in noisy)
    assert any(guard.alarmed_by(10.0 * 2**step) for step in range(8))


def test_it_lowers_the_rate_three_times_and_then_gives_up():
    guard = DivergenceGuard()
    for count in (1, 2, 3):
        assert f"({count} of 3)" in guard.back_off(10, math.nan, 0.1)
        assert guard.lr_scale == pytest.approx(0.1**count)
    with pytest.raises(TuningDiverged, match="although the learning rate was lowered 3 times, to 0.0001") as error:
        guard.back_off(10, math.nan, 0.1)
    assert isinstance(error.value, UserError)


@pytest.mark.parametrize("least", [0.0, -1e-6, 1e-7])
def test_a_divergence_that_is_rounded_to_nothing_is_no_measure(least):
    guard = DivergenceGuard()
    assert not any(guard.alarmed_by(loss) for loss in [least, *[1e-5] * 50])
    assert guard.calm(guard.every)
    assert any(guard.alarmed_by(0.1) for _ in range(5))


def test_losses_of_a_run_that_was_taken_back_are_no_measure():
    guard = DivergenceGuard()
    guard.alarmed_by(0.1)
    guard.back_off(1, math.nan, 1.0)
    assert not any(guard.alarmed_by(2.0) for _ in range(50))
    assert guard.calm(guard.every)
    assert guard.alarmed_by(500.0)


def test_its_state_survives_a_round_trip():
    guard = DivergenceGuard()
    guard.alarmed_by(3.0)
    guard.back_off(1, math.nan, 1.0)
    other = DivergenceGuard()
    other.load_state_dict(guard.state_dict())
    assert repr(other) == repr(guard)
