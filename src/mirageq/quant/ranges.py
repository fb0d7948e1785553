"""Where to cut: the range [lo, hi] of a tensor that the integer grid will cover.

Weights are seen whole (`weight_range`). Activations are seen batch by batch by an observer, which is asked for its
range at the end; an observer lives only while a student is being calibrated. Percentiles and least squared errors are
those of Nagel et al., "A White Paper on Neural Network Quantization", 2021, sec. 3.1.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from mirageq.errors import UserError
from mirageq.quant.fake_quant import affine_parameters, fake_quantize, grid
from mirageq.quant.scheme import ActivationRange, WeightRange

EMA_DECAY = 0.9
HISTOGRAM_BINS = 2048
"""The most bins a histogram uses; it has more than half as many."""
SHRINKS = tuple(1 - 0.01 * step for step in range(80))
"""Parts of the min-max range tried by "mse": 1.00, 0.99, ... 0.21."""
AT_ONCE = 2**17  # numbers quantized at once while they are tried


class RangeObserver(Protocol):
    """Sees batches of one activation, then tells its range."""

    def update(self, x: Tensor) -> None:
        """Take in a batch, any shape. Raises `UserError` if a value is NaN or infinite."""

    def range(self) -> tuple[Tensor, Tensor]:
        """(lo, hi), both (). Raises `UserError` if no batch was seen."""


def range_observer(
    kind: ActivationRange, layer: str, bits: int, symmetric: bool, percentile: float = 99.99
) -> RangeObserver:
    """An observer of the kind a scheme asks for; `layer` names the activation in errors."""
    if kind == "minmax":
        return MinMax(layer)
    if kind == "ema":
        return Ema(layer)
    if kind == "percentile":
        return Percentile(layer, percentile)
    return LeastSquares(layer, bits, symmetric)


def weight_range(
    weight: Tensor, kind: WeightRange, bits: int, symmetric: bool, percentile: float = 99.99
) -> tuple[Tensor, Tensor]:
    """The range of each output channel.

    Args:
        weight: (O, ...).
        kind: "minmax"; "percentile", that part of a channel's values inside on each side; "mse", the part of the
            min-max range with the least squared quantization error, of those in `SHRINKS`.
        bits, symmetric: of the grid, for "mse".
        percentile: for "percentile".

    Returns:
        lo, hi: (O, 1, ...), broadcastable to `weight`.
    """
    shape = (-1, *[1] * (weight.dim() - 1))
    rows = weight.detach().flatten(1)
    if kind == "percentile" and percentile < 100:
        ordered = rows.sort(dim=1).values
        lo, hi = _rank(ordered, 1 - percentile / 100), _rank(ordered, percentile / 100)
    else:
        lo, hi = torch.aminmax(rows, dim=1)
    if kind == "mse":
        shrink = _best_shrink(rows, torch.ones_like(rows), lo, hi, bits, symmetric)
        lo, hi = lo * shrink, hi * shrink
    return lo.view(shape), hi.view(shape)


class MinMax:
    """The smallest and largest value of all batches."""

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.extremes: tuple[Tensor, Tensor] | None = None

    def update(self, x: Tensor) -> None:
        lo, hi = _finite_extremes(x, self.layer)
        if self.extremes is not None:
            lo, hi = torch.minimum(lo, self.extremes[0]), torch.maximum(hi, self.extremes[1])
        self.extremes = lo, hi

    def range(self) -> tuple[Tensor, Tensor]:
        return _seen(self.extremes, self.layer)


class Ema:
    """The exponential moving average (decay 0.9) of the batches' smallest and largest values.

    The average starts at 0, so after t batches it holds 1 - 0.9^t of its weight; it is divided by that when read. The
    papers' code (inherited from ZeroQ) divides the *stored* average at each batch, which inflates early ranges
    thousandfold.
    """

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.batches = 0
        self.average: tuple[Tensor, Tensor] | None = None

    def update(self, x: Tensor) -> None:
        new = _finite_extremes(x, self.layer)
        lo, hi = self.average or (torch.zeros_like(new[0]), torch.zeros_like(new[1]))
        self.average = torch.lerp(new[0], lo, EMA_DECAY), torch.lerp(new[1], hi, EMA_DECAY)
        self.batches += 1

    def range(self) -> tuple[Tensor, Tensor]:
        lo, hi = _seen(self.average, self.layer)
        weight = 1 - EMA_DECAY**self.batches
        return lo / weight, hi / weight


class Percentile:
    """The range that leaves out (100 - percentile) % of all values on each side, to within a histogram bin."""

    def __init__(self, layer: str, percentile: float) -> None:
        self.layer, self.percentile = layer, percentile
        self.extremes = MinMax(layer)
        self.histogram = Histogram()

    def update(self, x: Tensor) -> None:
        self.extremes.update(x)
        self.histogram.add(x, *self.extremes.range())

    def range(self) -> tuple[Tensor, Tensor]:
        lo, hi = self.extremes.range()
        counts, left = self.histogram.counts, self.histogram.left_edges()
        reached = counts.cumsum(0)
        total = int(reached[-1])
        outside = int(total * (1 - self.percentile / 100))  # whole numbers: float32 ends to count at 2^24
        first, last = (reached > outside).nonzero()[0, 0], (reached >= total - outside).nonzero()[0, 0]
        return torch.maximum(lo, left[first]), torch.minimum(hi, left[last] + self.histogram.width)


class LeastSquares:
    """The part of the min-max range with the least squared quantization error, of those in `SHRINKS`."""

    def __init__(self, layer: str, bits: int, symmetric: bool) -> None:
        self.layer, self.bits, self.symmetric = layer, bits, symmetric
        self.extremes = MinMax(layer)
        self.histogram = Histogram()

    def update(self, x: Tensor) -> None:
        self.extremes.update(x)
        self.histogram.add(x, *self.extremes.range())

    def range(self) -> tuple[Tensor, Tensor]:
        lo, hi = self.extremes.range()
        middles = (self.histogram.left_edges() + self.histogram.width / 2).clamp(lo, hi)
        counts = self.histogram.counts.to(middles.dtype)
        shrink = _best_shrink(middles[None], counts[None], lo[None], hi[None], self.bits, self.symmetric)[0]
        return lo * shrink, hi * shrink


class Histogram:
    """Counts of values in bins whose range grows with the data.

    Edges are multiples of a power of two, and a bin only ever doubles its width: old counts then move to new bins
    exactly, whatever the order of the batches.
    """

    def __init__(self) -> None:
        self.exponent: int | None = None
        self.start = 0
        self.counts = torch.zeros(0, dtype=torch.int64)

    @property
    def width(self) -> float:
        """Of a bin."""
        return 2.0 ** (self.exponent or 0)

    def left_edges(self) -> Tensor:
        """(bins,)"""
        bins = torch.arange(len(self.counts), device=self.counts.device)
        return (bins + self.start).to(torch.float32) * self.width

    def add(self, x: Tensor, lo: Tensor, hi: Tensor) -> None:
        """Count the values of `x`; [lo, hi] holds everything seen so far, `x` included."""
        self._cover(float(lo), float(hi), x.device)
        bins = (x.detach().flatten() / self.width).floor_().to(torch.int64) - self.start
        self.counts += torch.bincount(bins, minlength=len(self.counts))

    def _cover(self, lo: float, hi: float, device: torch.device) -> None:
        span = max(hi - lo, max(abs(lo), abs(hi)) * 2.0**-20, 2.0**-100)
        finest = math.frexp(span / HISTOGRAM_BINS)[1]
        exponent = finest if self.exponent is None else max(self.exponent, finest)
        start, stop = int(lo // 2.0**exponent), int(hi // 2.0**exponent) + 1
        counts = torch.zeros(stop - start, dtype=torch.int64, device=device)
        if self.exponent is not None:
            old = torch.arange(len(self.counts), device=device) + self.start
            counts.index_add_(0, (old >> (exponent - self.exponent)) - start, self.counts)
        self.exponent, self.start, self.counts = exponent, start, counts


def _best_shrink(rows: Tensor, weights: Tensor, lo: Tensor, hi: Tensor, bits: int, symmetric: bool) -> Tensor:
    """For each row (R, K) the part of [lo, hi] (R,) in `SHRINKS` with the least weighted squared error: (R,)."""
    shrinks, squared = torch.tensor(SHRINKS, device=lo.device), []
    for some in shrinks[:, None].split(max(AT_ONCE // rows.numel(), 1)):
        scale, zero_point = affine_parameters(lo * some, hi * some, bits, symmetric)
        bounds = grid(bits, symmetric)
        error = fake_quantize(rows.expand(len(some), -1, -1), scale[..., None], zero_point[..., None], *bounds) - rows
        squared.append((error.square_() * weights).sum(2))
    return shrinks[torch.cat(squared).argmin(0)]


def _rank(ordered: Tensor, part: float) -> Tensor:
    """The quantile `part` of each sorted row (R, K), linearly interpolated: (R,).

    `torch.quantile` would refuse a tensor of more than 2^24 numbers.
    """
    position = part * (ordered.shape[1] - 1)
    below = min(int(position), ordered.shape[1] - 1)
    above = min(below + 1, ordered.shape[1] - 1)
    return torch.lerp(ordered[:, below], ordered[:, above], position - below)


def _finite_extremes(x: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    lo, hi = torch.aminmax(x.detach())
    if not (lo.isfinite() & hi.isfinite()):
        raise UserError(
            f"The activation '{layer}' is NaN or infinite on a calibration batch. Check the images and the checkpoint."
        )
    return lo, hi


def _seen(extremes: tuple[Tensor, Tensor] | None, layer: str) -> tuple[Tensor, Tensor]:
    if extremes is None:
        raise UserError(
            f"No calibration image has reached the activation '{layer}', so it has no range. "
            "Call student.calibrate with at least one batch of images first."
        )
    return extremes
