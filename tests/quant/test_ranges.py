from __future__ import annotations

import pytest
import torch

from mirageq.errors import UserError
from mirageq.quant.fake_quant import affine_parameters, fake_quantize, grid
from mirageq.quant.ranges import HISTOGRAM_BINS, SHRINKS, Histogram, Percentile, range_observer, weight_range

KINDS = ("minmax", "ema", "percentile", "mse")


def batches(seed=0, count=7):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 4, 3, 3, generator=generator) * (1 + step) + 0.3 for step in range(count)]


def observed(kind, data, **settings):
    observer = range_observer(kind, "layer", settings.pop("bits", 4), settings.pop("symmetric", False), **settings)
    for batch in data:
        observer.update(batch)
    return observer.range()


def squared_error(x, lo, hi, bits=4, symmetric=False):
    parameters = affine_parameters(lo, hi, bits, symmetric)
    return (fake_quantize(x, *parameters, *grid(bits, symmetric)) - x).square().sum()


@pytest.mark.parametrize("steps", range(1, 30, 4))
def test_ema_of_a_constant_is_the_constant_at_every_step(steps):
    lo, hi = observed("ema", [torch.tensor([-2.0, 5.0])] * steps)
    assert (float(lo), float(hi)) == pytest.approx((-2, 5), rel=1e-5)


def test_ema_against_a_slow_loop():
    lo = hi = total = 0.0
    for batch in batches():
        lo, hi, total = 0.9 * lo + 0.1 * float(batch.min()), 0.9 * hi + 0.1 * float(batch.max()), 0.9 * total + 0.1
    seen = observed("ema", batches())
    assert [float(end) for end in seen] == pytest.approx([lo / total, hi / total], rel=1e-5)


def test_minmax():
    everything = torch.cat(batches())
    assert observed("minmax", batches()) == (everything.min(), everything.max())


@pytest.mark.parametrize("percentile", [60.0, 95.0, 99.0, 100.0])
def test_percentile_within_a_bin_of_the_exact_one(percentile):
    everything = torch.cat(batches()).flatten()
    lo, hi = observed("percentile", batches(), percentile=percentile)
    bin_width = 2 * (everything.max() - everything.min()) / HISTOGRAM_BINS
    ordered, outside = everything.sort().values, int(len(everything) * (1 - percentile / 100))
    assert abs(lo - ordered[outside]) <= bin_width
    assert abs(hi - ordered[-1 - outside]) <= bin_width


def test_histogram_does_not_depend_on_the_order_of_growing_batches():
    data = [batch * 10.0**power for batch, power in zip(batches(), (-3, 0, 2, -1, 1, 3, -2), strict=True)]
    histograms = []
    for order in (data, data[::-1]):
        histogram, seen = Histogram(), torch.zeros(0)
        for batch in order:
            seen = torch.cat([seen, batch.flatten()])
            histogram.add(batch, seen.min(), seen.max())
        histograms.append(histogram)
    first, second = histograms
    assert torch.equal(first.counts, second.counts)
    assert torch.equal(first.left_edges(), second.left_edges())
    assert first.counts.sum() == sum(batch.numel() for batch in data)
    assert len(first.counts) <= HISTOGRAM_BINS + 1
    slow = [int(((seen >= edge) & (seen < edge + first.width)).sum()) for edge in first.left_edges()]
    assert first.counts.tolist() == slow


@pytest.mark.parametrize("data", [torch.zeros(5), torch.full((5,), 1000.0), torch.tensor([1e-30, 0.0]), -torch.ones(3)])
@pytest.mark.parametrize("kind", KINDS)
def test_ranges_of_hardly_varying_activations(kind, data):
    lo, hi = observed(kind, [data, data])
    assert lo <= hi
    assert hi <= data.max() + 1e-5 * data.abs().max()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_range_is_no_worse_than_minmax_and_near_the_best(bits, symmetric):
    x = torch.cat(batches())
    lo, hi = observed("minmax", batches())
    mine = squared_error(x, *observed("mse", batches(), bits=bits, symmetric=symmetric), bits, symmetric)
    best = min(squared_error(x, lo * shrink, hi * shrink, bits, symmetric) for shrink in SHRINKS)
    assert mine <= squared_error(x, lo, hi, bits, symmetric)
    assert mine <= best * 1.05


def test_a_percentile_counts_beyond_what_float32_can():
    observer = Percentile("layer", 100.0)
    observer.update(torch.tensor([-2.0, 50.0]))
    observer.histogram.counts[observer.histogram.counts.argmax()] += 2**24 - 1
    lo, hi = observer.range()
    assert (float(lo), float(hi)) == (-2.0, 50.0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_weight_mse_against_a_slow_loop_over_channels(symmetric):
    weight = torch.randn(6, 4, 3, 3).pow(3)
    lo, hi = weight_range(weight, "mse", 3, symmetric)
    assert lo.shape == hi.shape == (6, 1, 1, 1)
    for channel in range(6):
        row = weight[channel]
        errors = [squared_error(row, row.min() * part, row.max() * part, 3, symmetric) for part in SHRINKS]
        mine = squared_error(row, lo[channel], hi[channel], 3, symmetric)
        assert float(mine) == pytest.approx(float(min(errors)), rel=1e-4)
        assert mine <= errors[0]


def test_weight_minmax_and_percentile():
    weight = torch.randn(5, 7, 2)
    lo, hi = weight_range(weight, "minmax", 4, True)
    assert torch.equal(lo.flatten(), weight.flatten(1).min(1).values)
    assert torch.equal(hi.flatten(), weight.flatten(1).max(1).values)
    lo, hi = weight_range(weight, "percentile", 4, True, 90)
    quantiles = torch.quantile(weight.flatten(1), torch.tensor([0.1, 0.9]), dim=1)
    assert torch.allclose(torch.stack([lo.flatten(), hi.flatten()]), quantiles, atol=1e-5)
    assert weight_range(torch.randn(3, 4), "minmax", 4, True)[0].shape == (3, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_an_observer_that_saw_nothing_refuses(kind):
    with pytest.raises(UserError, match="No calibration image has reached the activation 'layer'"):
        observed(kind, [])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_not_finite_are_refused(kind, bad):
    with pytest.raises(UserError, match="activation 'layer' is NaN or infinite"):
        observed(kind, [torch.tensor([1.0, bad])])
