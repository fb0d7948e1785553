"""Loss terms that two or more methods share: pure functions of tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from mirageq.errors import UserError
from mirageq.observe import Glance, Observation
from mirageq.teacher import BatchNormStatistics

EPS = 1e-6
"""Added to variances before a square root."""


def bn_alignment(seen: Observation | Glance, remembered: Iterable[BatchNormStatistics]) -> Tensor:
    """Batch-normalisation statistics alignment, the term every method of the family shares.

    `1/L sum_l [MSE(mean_l) + MSE(variance_l)]`, the squared errors averaged over channels, between the batch
    statistics of each BN *input* and the running statistics (IntraQ eq. 2).
    """
    terms = []
    for norm in remembered:
        mean, var = seen.moments[norm.name]
        terms.append(F.mse_loss(mean, norm.mean) + F.mse_loss(var, norm.var))
    return torch.stack(terms).mean()


def deviation_alignment(mean: Tensor, var: Tensor, wanted_mean: Tensor, wanted_var: Tensor) -> Tensor:
    """Squared distances, averaged over channels, of means and of standard deviations, all four (C,) (ZeroQ eq. 3)."""
    deviation, wanted = (value.add(EPS).sqrt() for value in (var, wanted_var))
    return F.mse_loss(mean, wanted_mean) + F.mse_loss(deviation, wanted)


def bn_deviation_alignment(seen: Observation | Glance, remembered: Iterable[BatchNormStatistics]) -> Tensor:
    """ZeroQ's form of the alignment (eq. 3): `deviation_alignment` at each BN input, summed over layers."""
    return torch.stack(
        [deviation_alignment(*seen.moments[norm.name], norm.mean, norm.var) for norm in remembered]
    ).sum()


def check_margins(low: float, high: float) -> None:
    """Raise a `UserError` unless `marginal_distance` can take these margins."""
    if not 0 <= low <= high <= 2:
        raise UserError(
            f"The margins are cosine distances with 0 <= margin_low <= margin_high <= 2; got {low} and {high}."
        )


def marginal_distance(features: Tensor, centres: Tensor, known: Tensor, low: float, high: float) -> Tensor:
    """Hinge on the cosine distance d of each feature to its class centre: stay in [low, high] (IntraQ eq. 7).

    Args:
        features, centres: (N, D).
        known: (N,) bool, whether the class has a centre yet; others do not count.
    """
    distance = 1 - F.cosine_similarity(features.float(), centres, dim=1)
    outside = F.relu(low - distance) + F.relu(distance - high)
    return (outside * known).sum() / (known.sum() + 1e-6)


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T^2 KL(softmax(teacher/T) || softmax(student/T))`, averaged over the batch; logits are (N, classes).

    Multiplying by `T^2` keeps the size of the gradient independent of the temperature (Hinton et al., 2015).
    """
    log_student = F.log_softmax(student.float() / temperature, 1)
    log_teacher = F.log_softmax(teacher.float() / temperature, 1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2
