"""Measuring: accuracy on labelled images, agreement between networks. Nothing here chooses anything."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mirageq.data import LabelledImages
from mirageq.errors import UserError

Classifier = Callable[[Tensor], Tensor]
"""Normalised images (N, C, H, W) -> logits (N, classes)."""


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 in percent over `count` images; `standard_error` of top-1, binomial, in percentage points.

    `divergence` is KL(teacher || model) in nats, the mean over images, where a teacher was given: it needs no labels,
    and tells students apart with fewer images than accuracy does.
    """

    top1: float
    top5: float | None
    count: int
    divergence: float | None = None

    @property
    def standard_error(self) -> float:
        share = self.top1 / 100
        return 100 * math.sqrt(share * (1 - share) / self.count)

    def __str__(self) -> str:
        top5 = f"{self.top5:.2f} % top-5, " if self.top5 is not None else ""
        return f"{self.top1:.2f} % top-1 ± {self.standard_error:.2f} ({top5}{self.count:,} images)"


PIXELS, MOST_IMAGES = 2**21, 128  # of a batch: a network's first maps take a hundred times the memory of its pixels


@torch.no_grad()
def accuracy(
    model: Classifier,
    data: LabelledImages,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    *,
    teacher: Classifier | None = None,
    device: str = "cpu",
) -> Accuracy:
    """The accuracy of `model` on labelled images, each normalised as (pixels / 255 - mean) / std.

    With a `teacher`, also how far it diverges from that one.

    Raises:
        UserError: the normalisation is unknown, or labels do not fit the network's classes.
    """
    if mean is None or std is None:
        raise UserError("The network's normalisation is unknown; give --mean and --std (of pixels in [0, 1]).")
    centre, width = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std))
    first = fifth = count = classes = 0
    divergence = 0.0
    for pixels, labels in data.batches(data.fitting(PIXELS, MOST_IMAGES)):
        images = (pixels.to(device) / 255 - centre) / width
        logits = model(images)
        if teacher:
            expected, given = teacher(images).float().log_softmax(1), logits.float().log_softmax(1)
            divergence += F.kl_div(given, expected, log_target=True, reduction="sum").item()
        labels, classes = labels.to(device), logits.shape[1]
        data.check_labels(labels, classes)
        best = logits.topk(min(5, classes), dim=1).indices
        hits = best == labels[:, None]
        first, fifth, count = first + int(hits[:, 0].sum()), fifth + int(hits.sum()), count + len(labels)
    top5 = 100 * fifth / count if classes > 5 else None
    return Accuracy(100 * first / count, top5, count, divergence / count if teacher else None)


@torch.no_grad()
def agreement(first: Classifier, second: Classifier, images: Tensor, *, batch_size: int = 64) -> float:
    """Percent of normalised images (N, C, H, W) that two networks put in the same class."""
    same = [first(chunk).argmax(1) == second(chunk).argmax(1) for chunk in images.split(batch_size)]
    return 100 * torch.cat(same).float().mean().item()


def intra_class_distance(features: Tensor, labels: Tensor) -> float | None:
    """Mean cosine distance between two images of the same class, over all pairs; None where no class has two.

    The figure by which IntraQ's paper measures heterogeneity (real images 0.44, its own 0.42, ZeroQ 0.17).

    Args:
        features: (N, D) penultimate features.
        labels: (N,).
    """
    distance, same = _cosine_distances(features), _same_class(labels)
    return distance[same].mean().item() if same.any() else None


def silhouette(features: Tensor, labels: Tensor) -> float | None:
    """Mean silhouette of the classes in cosine distance (Rousseeuw, 1987): 1 well apart, 0 overlapping, -1 mixed up.

    Classes with a single image are left out; None where fewer than two remain.
    """
    counts = torch.bincount(labels)
    kept = counts[labels] > 1
    features, labels = features[kept], labels[kept]
    classes, index = labels.unique(return_inverse=True)
    if len(classes) < 2:
        return None
    member = F.one_hot(index).float()
    sums = _cosine_distances(features) @ member
    sizes = member.sum(0)
    own = sums.gather(1, index[:, None]).squeeze(1) / (sizes[index] - 1)
    others = (sums / sizes).masked_fill(member.bool(), math.inf).amin(1)
    return ((others - own) / torch.maximum(others, own).clamp_min(1e-12)).mean().item()


def _cosine_distances(features: Tensor) -> Tensor:
    directions = F.normalize(features.float(), dim=1)
    return (1 - directions @ directions.T).clamp_min(0)


def _same_class(labels: Tensor) -> Tensor:
    """(N, N) bool: two different images of one class."""
    return (labels[:, None] == labels).fill_diagonal_(False)
