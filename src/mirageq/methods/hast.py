"""HAST: images that are hard for the network, because easy ones teach a student too little.

Idea: paint images whose batch statistics are the remembered ones and that the network assigns to a class, but weigh
each image's cross-entropy by how hard it still is: (1 - p)^gamma fades as the probability p of its class grows, so no
image is painted to full certainty at the expense of the statistics, and the set keeps its difficult members.
Reference: Li et al., "Hard Sample Matters a Lot in Zero-Shot Quantization", CVPR 2023.
Differences from the official code: the student's side of HAST (images made harder by a signed step, attention aligned)
is not here; any tuner can follow. Crops, which its ImageNet script shows half of the batches through, are a setting.
Cost: IntraQ's: one forward and backward pass an image and iteration, 1,000 iterations.
Choose it: for images of classes without IntraQ's centres and margins, and to judge students that learned elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mirageq.augment import random_resized_crop
from mirageq.canvas import Canvas, Observe
from mirageq.errors import UserError, check_crop_scale, check_fraction, check_not_negative
from mirageq.images import ImageSource
from mirageq.journal import Journal
from mirageq.losses import bn_alignment
from mirageq.paint import Descent
from mirageq.teacher import Teacher

LEAST_DOUBT = 1e-6  # what 1 - p counts as at least


@dataclass(frozen=True, kw_only=True)
class HAST(Descent):
    """Settings of HAST, by default the paper's for CIFAR.

    For ImageNet they are `class_weight` 0.1, `focus` 0.5 and `crop_probability` 0.5.

    Attributes:
        class_weight: of the focal cross-entropy (beta).
        focus: how fast a class that is recognised stops to count (gamma); 0 is plain cross-entropy.
        bn_weight: of the BatchNorm alignment.
        crop_probability: chance, per iteration, that the batch is seen through random crops and flips.
        crop_scale: smallest area of a crop.
    """

    class_weight: float = 10.0
    focus: float = 2.0
    bn_weight: float = 1.0
    crop_probability: float = 0.0
    crop_scale: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "class_weight", "bn_weight")
        check_fraction(self, "crop_probability")
        check_crop_scale(self.crop_scale)
        if self.focus < 0:
            raise UserError(f"focus is an exponent of at least 0; got {self.focus}.")

    def synthesize(self, teacher: Teacher, count: int, *, seed: int = 0, journal: Journal | None = None) -> ImageSource:
        """Paint `count` images, a batch at a time."""
        teacher.require_batch_norms("HAST")
        canvas = Canvas(teacher, count, self, seed, journal or Journal())
        for part in canvas.parts():
            labels = part.draw_labels(teacher.classes).to(teacher.device)
            canvas.paint(part, partial(self._loss, teacher, canvas.observe, labels), labels)
        return canvas.finish()

    def _loss(
        self, teacher: Teacher, observe: Observe, labels: Tensor, images: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        if self.crop_probability and torch.rand((), generator=generator) < self.crop_probability:
            images = random_resized_crop(images, generator, scale=(self.crop_scale, 1.0))
        seen = observe(images)
        return {
            "bn": self.bn_weight * bn_alignment(seen, teacher.batch_norms),
            "class": self.class_weight * focal_cross_entropy(seen.logits, labels, self.focus),
        }


def focal_cross_entropy(logits: Tensor, labels: Tensor, focus: float) -> Tensor:
    """Mean of (1 - p)^focus * -log p over images, p the probability of the assigned class.

    A root (focus below 1) has no slope at p = 1, so 1 - p counts as `LEAST_DOUBT` at least.
    """
    log_probability = -F.cross_entropy(logits.float(), labels, reduction="none")
    return ((1 - log_probability.exp()).clamp_min(LEAST_DOUBT).pow(focus) * -log_probability).mean()
