"""IntraQ: class-conditional images that differ within their class.

Idea: on top of BatchNorm alignment, three terms keep images of a class from looking alike. Local object
reinforcement shows the network random crops, so that objects of several sizes and places appear. The marginal
distance constraint keeps each image's features neither too close to nor too far from its class centre. The soft
inception loss asks for a probability drawn at random instead of full certainty.
Reference: Zhong et al., "IntraQ: Learning Synthetic Images with Intra-Class Heterogeneity for Zero-Shot Network
Quantization", CVPR 2022, arXiv 2111.09136.
Differences from the official code (docs/methods.md has the reasons of the main ones):
  1. The released ImageNet script switches two of the three components off (margins 0 and 2, target 1). Here all
     three are on; the ImageNet recipe carries the values that two forks of the script have (0.3, 0.8, 0.9).
  2. As in the code, and unlike the paper's wording: the crop is tossed once per iteration for the whole batch and comes
     with a mirror flip, its size is an area fraction with a random aspect ratio, and half of the images get target 1.
  3. Crops are one differentiable sampling grid for the batch; torchvision's distribution, not its random stream.
  4. Class centres come from all images finished so far, as there, but from the stored (float16) images of this one
     process; the official groups are four processes that reload each other's files.
  5. The teacher's weights take no gradient (the official code computes and drops it).
  6. In the recipes for CIFAR the student learns at 1e-5 instead of 1e-4, at which it diverges. Ranges contain zero,
     also those of a channel whose weights have one sign.
  7. Nothing here calibrates on a generator: activation ranges come from these images (official: GDFQ's generator, 4
     epochs), with the EMA's bias corrected properly. The figure reported is the last step's, never the best on a test
     set.
Cost: one teacher forward and backward pass an image and iteration; the paper takes 5,120 images x 1,000 iterations.
Choose it: where images have to show their class: packs for other tools, and beside ZeroQ's in a union. To tune on
alone, ZeroQ's are as good at 4 bits and better at 3, at a fraction of the cost (benchmarks/RESULTS.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mirageq.augment import random_resized_crop
from mirageq.canvas import Canvas, Observe
from mirageq.errors import check_crop_scale, check_fraction, check_not_negative
from mirageq.images import ImageSource
from mirageq.journal import Journal
from mirageq.losses import bn_alignment, check_margins, marginal_distance
from mirageq.paint import Descent
from mirageq.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class IntraQ(Descent):
    """Settings of IntraQ. The defaults are the paper's for CIFAR-10; recipes carry those of CIFAR-100 and ImageNet.

    Attributes:
        crop_probability: chance, per iteration, that the batch is seen through random crops (p).
        crop_scale: smallest area of a crop (eta).
        target_low: lowest target probability of the soft inception loss (epsilon); 1 gives the plain inception loss.
        margin_low, margin_high: cosine distances between which an image may lie from its class centre (lambda_l,
            lambda_u); 0 and 2 switch the constraint off.
        bn_weight, inception_weight, margin_weight: weights of the three terms; the paper's are 1. Alignment grows
            with activations: on MobileNets an `inception_weight` near 100 keeps classes recognisable.
    """

    crop_probability: float = 0.5
    crop_scale: float = 0.5
    target_low: float = 0.95
    margin_low: float = 0.05
    margin_high: float = 0.8
    bn_weight: float = 1.0
    inception_weight: float = 1.0
    margin_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_crop_scale(self.crop_scale)
        check_fraction(self, "crop_probability", "target_low")
        check_margins(self.margin_low, self.margin_high)
        check_not_negative(self, "bn_weight", "inception_weight", "margin_weight")

    def synthesize(self, teacher: Teacher, count: int, *, seed: int = 0, journal: Journal | None = None) -> ImageSource:
        """Paint `count` images, batch after batch; each batch keeps its distance from the centres of those before."""
        teacher.require_batch_norms("IntraQ")
        canvas = Canvas(teacher, count, self, seed, journal or Journal())
        centres = ClassCentres.none(teacher)
        for part in canvas.parts():
            labels = part.draw_labels(teacher.classes).to(teacher.device)
            targets = soft_targets(len(labels), self.target_low, part.stream("targets")).to(teacher.device)
            finished = canvas.paint(
                part, partial(self._loss, teacher, canvas.observe, labels, targets, centres), labels
            )
            centres = centres.joined_by(teacher, finished.images, labels)
        return canvas.finish()

    def _loss(
        self,
        teacher: Teacher,
        observe: Observe,
        labels: Tensor,
        targets: Tensor,
        centres: ClassCentres,
        images: Tensor,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """One iteration's terms, on the batch as it is or through crops (local object reinforcement)."""
        if torch.rand((), generator=generator) < self.crop_probability:
            images = random_resized_crop(images, generator, scale=(self.crop_scale, 1.0))
        seen = observe(images)
        mean, known = centres.of(labels)
        return {
            "bn": self.bn_weight * bn_alignment(seen, teacher.batch_norms),
            "inception": self.inception_weight * soft_inception(seen.logits, labels, targets),
            "margin": self.margin_weight
            * marginal_distance(seen.features, mean, known, self.margin_low, self.margin_high),
        }


def soft_targets(count: int, low: float, generator: torch.Generator) -> Tensor:
    """(count,) target probabilities, fixed for an image's whole life: 1 for about half, else uniform in [low, 1]."""
    certain = torch.rand(count, generator=generator) < 0.5
    return torch.where(certain, 1.0, low + (1 - low) * torch.rand(count, generator=generator))


def soft_inception(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of the assigned class's *probability* alone (IntraQ eq. 9)."""
    probability = logits.float().softmax(1).gather(1, labels[:, None]).squeeze(1)
    return F.mse_loss(probability, targets)


@dataclass(frozen=True)
class ClassCentres:
    """Running arithmetic means of the penultimate features of finished images: sums (classes, D), counts (classes,)."""

    sums: Tensor
    counts: Tensor

    @staticmethod
    def none(teacher: Teacher) -> ClassCentres:
        sums = torch.zeros(teacher.classes, teacher.feature_dim, device=teacher.device)
        return ClassCentres(sums, sums.new_zeros(teacher.classes))

    def of(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The centres (N, D) of the labels' classes, and whether each exists yet (N,)."""
        counts = self.counts[labels]
        return self.sums[labels] / counts.clamp_min(1)[:, None], counts > 0

    @torch.no_grad()
    def joined_by(self, teacher: Teacher, images: Tensor, labels: Tensor) -> ClassCentres:
        """The centres after these finished, uncropped images."""
        features = teacher.observe(images).features
        return ClassCentres(
            self.sums.index_add(0, labels, features),
            self.counts.index_add(0, labels, torch.ones_like(labels, dtype=self.counts.dtype)),
        )
