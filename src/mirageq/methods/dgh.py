"""DGH: the whole set shares the statistics, and its logits reach as far as real ones do.

Idea: BatchNorm remembers the moments of a whole training set, so the whole synthetic set has to match them, not each
batch by itself; and behind the last BatchNorm nothing holds the distribution, so stretch it: push every image's largest
and smallest logit apart. Images are seen smoothed and through random shifts and flips, as in training. Meant for
networks of which every tensor is quantized.
Reference: Dikstein et al., "Data Generation for Hardware-Friendly Post-Training Quantization", WACV 2025 (its abstract
and overview; no code was read).
Differences from the official method: batches are painted one after another, each aligned with the set so far and itself
together, instead of all in turns; the shifts, the smoothing and the weights are ours; labels are the teacher's guesses.
Cost: that of ZeroQ.
Choose it: for calibration and the placement `deploy`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mirageq.augment import shifted
from mirageq.canvas import Canvas, Observe
from mirageq.errors import UserError, check_not_negative
from mirageq.images import ImageSource
from mirageq.journal import Journal
from mirageq.losses import deviation_alignment
from mirageq.observe import Glance, Observation
from mirageq.paint import Descent
from mirageq.teacher import Teacher

Sums = dict[str, tuple[Tensor, Tensor]]
"""Layer -> sums over finished images of the channels' means and mean squares, each (C,)."""


@dataclass(frozen=True, kw_only=True)
class DGH(Descent):
    """Settings of DGH.

    Attributes:
        stretch_weight: of the logits' spread.
        shift: random shifts, in parts of the image's side, of what the teacher sees; flips come with them.
        smooth: let the teacher see the images through a 3 x 3 binomial filter; they are stored so.
    """

    batch_size: int = 64
    iterations: int = 500
    stretch_weight: float = 0.01
    shift: float = 0.125
    smooth: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "stretch_weight")
        if not 0 <= self.shift < 0.5:
            raise UserError(f"shift is a part of the image's side, below one half; got {self.shift}.")

    def synthesize(self, teacher: Teacher, count: int, *, seed: int = 0, journal: Journal | None = None) -> ImageSource:
        """Paint `count` images, a batch at a time; each makes up for what the set before it lacks."""
        teacher.require_batch_norms("DGH")
        canvas = Canvas(teacher, count, self, seed, journal or Journal())
        sums: Sums = {}
        for part in canvas.parts():
            develop = smoothed if self.smooth else None
            finished = canvas.paint(
                part, partial(self._loss, teacher, canvas.observe, sums, part.start), develop=develop
            )
            with torch.no_grad():
                sums = joined(sums, teacher.observe(finished.images), len(finished.images))
        return canvas.finish()

    def _loss(
        self, teacher: Teacher, observe: Observe, sums: Sums, done: int, images: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        images = shifted(images, generator, int(self.shift * min(images.shape[2:])), flip=0.5)
        seen = observe(smoothed(images) if self.smooth else images)
        total = joined(sums, seen, len(images))
        terms = []
        for norm in teacher.batch_norms:
            mean, square = (value / (done + len(images)) for value in total[norm.name])
            var = (square - mean.square()).clamp_min(0)
            terms.append(deviation_alignment(mean, var, norm.mean, norm.var))
        spread = seen.logits.float().amax(1) - seen.logits.float().amin(1)
        return {"bn": torch.stack(terms).mean(), "stretch": -self.stretch_weight * spread.mean()}


def joined(sums: Sums, seen: Observation | Glance, count: int) -> Sums:
    """The sums after `count` further images."""
    result = {}
    for name, (mean, var) in seen.moments.items():
        before = sums.get(name, (0.0, 0.0))
        result[name] = before[0] + count * mean, before[1] + count * (var + mean.square())
    return result


def smoothed(images: Tensor) -> Tensor:
    """Images (N, C, H, W) through a 3 x 3 binomial filter, mirrored at the border."""
    line = torch.tensor([0.25, 0.5, 0.25], device=images.device, dtype=images.dtype)
    channels = images.shape[1]
    kernel = (line[:, None] * line).expand(channels, 1, 3, 3)
    return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), kernel, groups=channels)
