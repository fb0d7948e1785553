"""Rounding without an image: codes flipped until the errors of each kernel and each channel cancel.

Idea: rounding to nearest minimises each weight's own error, and lets the errors of a kernel add up. If a layer's inputs
are positively correlated, the sum of the errors matters more than each: so flip the fewest codes, those whose second
choice is nearly as good, until the errors of every kernel, then of every output channel, sum to less than half a step.
Reference: SQuant (Guo et al., ICLR 2022): its stages E, K and C, which approximate the Hessian by one diagonal and two
block-constant parts.
Differences from the official code: kernels of one channel that are flipped in stage C are taken in one go, all channels
of a layer at once; a code at the end of its grid is never flipped beyond it.
Cost: none worth naming, no image and no gradient. With `scheme.ranges_from = "batch_norms"` a network is quantized
without synthesis altogether: the baseline that every synthetic image has to beat.
Choose it: at 8 bits, and before anything else; at 4 bits it does not carry to depthwise layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mirageq.images import ImageSource
from mirageq.journal import Journal
from mirageq.quant import Student
from mirageq.quant.fake_quant import grid
from mirageq.teacher import Teacher
from mirageq.tuning.contract import Tuner, require_fixed_grids


@dataclass(frozen=True, kw_only=True)
class SQuant:
    """Settings of SQuant's rounding.

    Attributes:
        kernels, channels: whether the stages K and C are carried out; neither is rounding to nearest.
        then: a tuner to go on with, `[tuner.then]` in a recipe.
    """

    kernels: bool = True
    channels: bool = True
    then: Tuner | None = None

    def check(self, student: Student, images: int | None = None) -> None:
        """Raise a `UserError` for weights whose grid follows them."""
        require_fixed_grids(student, "SQuant")

    def tune(
        self, teacher: Teacher, student: Student, source: ImageSource, *, seed: int = 0, journal: Journal | None = None
    ) -> None:
        """Move the weights of a calibrated `student` to the chosen codes; the source is not asked for images.

        Raises:
            UserError: weights whose grid follows them.
        """
        self.check(student)
        for quantizer, weight in student.quantized_weights():
            with torch.no_grad():
                scale, zero_point = quantizer.affine(weight)
                low, high = grid(quantizer.bits, quantizer.symmetric)
                codes = self.codes(weight / scale, low - zero_point, high - zero_point)
                weight.copy_(codes * scale)
        if self.then:
            self.then.tune(teacher, student, source, seed=seed, journal=journal)

    def codes(self, steps: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The whole numbers (O, I, ...) chosen for weights in units of their step, within [low, high] (O, 1, ...)."""
        steps = torch.minimum(torch.maximum(steps, low), high)  # what the grid cuts off is not an error of rounding
        codes = steps.round()
        kernels = (*steps.shape[:2], -1)
        flat, wanted = codes.reshape(kernels), steps.reshape(kernels)
        low, high = low.reshape(-1, 1, 1), high.reshape(-1, 1, 1)
        if self.kernels and flat.shape[2] > 1:
            flat = cancelled(flat, wanted, low, high)
        if self.channels:
            flat = cancelled_over_kernels(flat, wanted, low, high)
        return flat.view(steps.shape)


def cancelled(codes: Tensor, wanted: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Flip codes (R, S, K) until the errors along K sum to at most half a step (stage K; eqs. 9-11).

    A row that needs n flips gets them at the n codes whose error reaches farthest in the direction of the sum.
    """
    errors = codes - wanted
    total = errors.sum(-1, keepdim=True)
    direction = total.sign()
    flips = total.abs().round()
    reach = _reach(codes, errors, direction, low, high)
    for done in range(int(flips.max())):
        farthest, place = reach.max(-1, keepdim=True)
        chosen = (flips > done) & farthest.isfinite()
        codes = codes.scatter_add(-1, place, torch.where(chosen, -direction, 0.0))
        reach = reach.scatter(-1, place, -torch.inf)
    return codes


def cancelled_over_kernels(codes: Tensor, wanted: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Flip one code in as few kernels (O, I, K) as bring each channel's sum of errors below half a step (stage C)."""
    errors = codes - wanted
    total = errors.sum((1, 2), keepdim=True)
    direction = total.sign()
    reach, place = _reach(codes, errors, direction, low, high).max(-1, keepdim=True)
    of_kernel = torch.where(reach.isfinite(), errors.sum(-1, keepdim=True) * direction, -torch.inf)
    rank = of_kernel.argsort(1, descending=True).argsort(1)
    chosen = (rank < total.abs().round()) & of_kernel.isfinite()
    return codes.scatter_add(-1, place, torch.where(chosen, -direction, 0.0))


def _reach(codes: Tensor, errors: Tensor, direction: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """How far each error goes in a direction; -inf where the flipped code would leave the grid."""
    flipped = codes - direction
    return torch.where((flipped >= low) & (flipped <= high), errors * direction, -torch.inf)
