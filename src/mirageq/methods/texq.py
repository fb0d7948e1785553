"""TexQ: a generator guided by one texture-calibrated image and its features for each class.

Idea: first paint a single calibration image for each class, whose texture energies are those of natural images and
whose BatchNorm statistics are aligned loosely in shallow layers and tightly in deep ones. Its penultimate features are
the class's centre. Then train a generator as GDFQ does, with each image's features kept near the centre of its class,
but not on it.
Reference: Chen et al., "TexQ: Zero-shot Network Quantization with Texture Feature Distribution Calibration", NeurIPS
2023. Known to us by abstract, notes and tables only; no code was public.
Differences from the official code cannot be told; these points are unknown and chosen here:
  1. Texture: the mean absolute responses of the 9 rotation-pooled Laws filters (k = 9 is given; which 9 is not), as
     shares of their sum. Natural images' shares are those of Gaussian fields with a 1/f amplitude spectrum, the
     textbook model of natural scenes, since no real image may be seen.
  2. Layered alignment: squared excess over a tolerance that falls linearly from `tolerance` (of the remembered
     deviation for means, of the variance for variances) at the first BatchNorm to none at the last.
  3. The margins 0.3 and 0.5 are read as the least and greatest cosine distance from the class centre.
  4. The published eps of 0.015 has no known role and is not used. Mixup belongs to the tuner, not to the images.
Cost: GDFQ's, and one painted image per class.
Choose it: to compare guides for a generator under one protocol.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mirageq.canvas import Canvas
from mirageq.errors import UserError, check_not_negative, check_positive
from mirageq.generator import GeneratorTraining
from mirageq.generator_source import Draw, GeneratorSource
from mirageq.images import ImageSource
from mirageq.journal import Journal
from mirageq.losses import check_margins, marginal_distance
from mirageq.observe import Observation
from mirageq.paint import Descent
from mirageq.seeding import stream
from mirageq.teacher import BatchNormStatistics, Teacher

LAWS = {"L": (1, 4, 6, 4, 1), "E": (-1, -2, 0, 2, 1), "S": (-1, 0, 2, 0, -1), "R": (1, -4, 6, -4, 1)}
"""One-dimensional level, edge, spot and ripple filters (Laws, 1980)."""

POOLED = ("LE", "LR", "ES", "SS", "RR", "LS", "EE", "ER", "SR")
"""The nine textures; a filter and its transpose count as one."""

NATURAL_FIELDS = 64


@dataclass(frozen=True, kw_only=True)
class TexQ(GeneratorTraining):
    """Settings of TexQ: the frame's (see `GeneratorTraining`), and

    Attributes:
        centre_iterations, centre_lr, centre_batch: of the descent that paints the calibration images.
        texture_weight: of the divergence between an image's texture energies and natural ones.
        tolerance: of the first BatchNorm's alignment while painting: so many remembered standard deviations for means,
            and that part of the remembered variance for variances.
        margin_low, margin_high: cosine distances between which features stay from their class centre.
        margin_weight: of that constraint on the generator.
    """

    centre_iterations: int = 1500
    centre_lr: float = 0.05
    centre_batch: int = 128
    texture_weight: float = 1.0
    tolerance: float = 0.5
    margin_low: float = 0.3
    margin_high: float = 0.5
    margin_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "centre_iterations", "centre_lr", "centre_batch")
        check_not_negative(self, "texture_weight", "tolerance", "margin_weight")
        check_margins(self.margin_low, self.margin_high)

    def synthesize(self, teacher: Teacher, count: int, *, seed: int = 0, journal: Journal | None = None) -> ImageSource:
        """Paint a calibration image for each class, take its features as the centre, and train the generator."""
        teacher.require_batch_norms("TexQ")
        journal = journal or Journal()
        centres = _Centres(self._calibration_features(teacher, seed, journal.within("centres")), self)
        source = GeneratorSource(teacher, self, seed, centres)
        source.warm_up(journal)
        return source

    def _calibration_features(self, teacher: Teacher, seed: int, journal: Journal) -> Tensor:
        """(classes, D) features of one painted image for each class."""
        descent = Descent(
            batch_size=self.centre_batch,
            iterations=self.centre_iterations,
            lr=self.centre_lr,
            min_lr=min(Descent.min_lr, self.centre_lr),
            schedule="cosine",
            precision=self.precision,
        )
        if min(teacher.image_shape[1:]) < len(LAWS["L"]):
            raise UserError(
                f"TexQ looks at textures of {len(LAWS['L'])} x {len(LAWS['L'])} pixels, and the images have "
                f"{teacher.image_shape[1]} x {teacher.image_shape[2]}. Use clusterq or gdfq."
            )
        natural = natural_energies(teacher.image_shape, stream(seed, "texq", "natural")).to(teacher.device)
        canvas = Canvas(teacher, teacher.classes, descent, seed, journal)
        features = []
        for part in canvas.parts():
            labels = torch.arange(part.start, part.stop, device=teacher.device)
            finished = canvas.paint(part, partial(self._painting_loss, teacher, labels, natural), labels)
            with torch.no_grad():
                features.append(teacher.observe(finished.images).features)
        canvas.finish()
        return torch.cat(features)

    def _painting_loss(
        self, teacher: Teacher, labels: Tensor, natural: Tensor, images: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        seen = teacher.observe(images)
        return {
            "class": F.cross_entropy(seen.logits.float(), labels),
            "bn": layered_alignment(seen, teacher.batch_norms, self.tolerance),
            "texture": self.texture_weight * texture_divergence(images, natural),
        }


class _Centres:
    """The guide: features stay within the margins around their class's centre. Remembers nothing that changes."""

    def __init__(self, features: Tensor, settings: TexQ) -> None:
        self.features, self.settings = features, settings

    def terms(self, seen: Observation, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        known = torch.ones_like(labels, dtype=torch.bool)
        settings = self.settings
        outside = marginal_distance(
            seen.features, self.features[labels], known, settings.margin_low, settings.margin_high
        )
        return {"centre": settings.margin_weight * outside}

    def after_update(self, step: int, draw: Draw) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def texture_energies(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, 9): mean absolute Laws responses of the grey image, as shares of their sum."""
    grey = images.float().mean(1, keepdim=True)
    grey = grey - grey.mean((2, 3), keepdim=True)
    pairs = sorted({pair for name in POOLED for pair in (name, name[::-1])})
    filters = torch.tensor([[[a * b for b in LAWS[pair[1]]] for a in LAWS[pair[0]]] for pair in pairs])
    responses = F.conv2d(grey, filters[:, None].to(grey)).abs().mean((2, 3))
    index = {pair: place for place, pair in enumerate(pairs)}
    pooled = torch.stack([(responses[:, index[name]] + responses[:, index[name[::-1]]]) / 2 for name in POOLED], 1)
    return pooled / pooled.sum(1, keepdim=True).clamp_min(1e-12)


def natural_energies(image_shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """(9,) mean texture shares of Gaussian fields with a 1/f amplitude spectrum (Field, 1987)."""
    channels, height, width = image_shape
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
    frequency[0, 0] = math.inf  # no mean
    white = torch.randn(NATURAL_FIELDS, 1, height, width, generator=generator)
    fields = torch.fft.irfft2(torch.fft.rfft2(white) / frequency, s=(height, width))
    return texture_energies(fields.expand(-1, channels, -1, -1)).mean(0)


def texture_divergence(images: Tensor, natural: Tensor) -> Tensor:
    """KL(natural || image) of texture shares, averaged over images."""
    shares = texture_energies(images).clamp_min(1e-8)
    return F.kl_div(shares.log(), natural.expand_as(shares), reduction="batchmean")


def layered_alignment(seen: Observation, remembered: Sequence[BatchNormStatistics], tolerance: float) -> Tensor:
    """BatchNorm alignment that forgives `tolerance` deviations in the first layer, falling linearly to none."""
    terms = []
    for index, norm in enumerate(remembered):
        slack = tolerance * (1 - index / max(len(remembered) - 1, 1))
        mean, var = seen.moments[norm.name]
        excess_mean = F.relu((mean - norm.mean).abs() - slack * norm.var.sqrt())
        excess_var = F.relu((var - norm.var).abs() - slack * norm.var)
        terms.append(excess_mean.square().mean() + excess_var.square().mean())
    return torch.stack(terms).mean()
