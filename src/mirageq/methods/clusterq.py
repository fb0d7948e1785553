"""ClusterQ: a generator whose deep-feature statistics gather around a centroid of their class.

Idea: networks separate classes by the statistics of their deeper layers. Each class has, for every BatchNorm in the
deeper half, a centroid: the mean and variance of its channels over an image. Generated images are pulled to the
centroid of their class, which follows them as a moving average; noise on the target keeps a class from collapsing to
one image.
Reference: Gao et al., "Towards Feature Distribution Alignment and Diversity Enhancement for Data-Free Quantization",
ICDM 2022, arXiv 2205.00179.
Differences from the official code, which does not compute what the paper describes:
  1. Centroids come from the images generated for a class (official: from the stored running statistics, so that all
     classes share one centroid that never moves).
  2. Statistics are each image's own, over space (official: the whole batch's, pulled to all labels' centroids at once).
  3. The distance is averaged over layers and images (official: a divisor inside the loop leaves little but the last
     layer; `last_bn_weight` = 0.075 gives that effect, for the ablation).
  4. The diversity term has a gradient: the target, not the statistic and its own copy, carries the noise.
  5. The images that centroids are set by after the warm-up (one a class) and moved by (those the teacher recognises,
     as there) are not cropped, and come in batches (official: one at a time through a training-mode BatchNorm).
  6. As in GDFQ here: ranges are calibrated after the warm-up, and the distillation term's weight is the tuner's.
Cost: GDFQ's, and one generated image per class and centroid update.
Choose it: to study class-wise alignment; whether its parts earn their place is measured in benchmarks/RESULTS.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mirageq.errors import UserError, check_not_negative
from mirageq.generator import GeneratorTraining
from mirageq.generator_source import Draw, GeneratorSource, even_batches
from mirageq.graph import batch_norms, weighted
from mirageq.images import ImageSource
from mirageq.journal import Journal
from mirageq.moments import sample_statistics
from mirageq.observe import Observation
from mirageq.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class ClusterQ(GeneratorTraining):
    """Settings of ClusterQ, its code's for CIFAR-100: the frame's (see `GeneratorTraining`), and

    Attributes:
        cluster_weight: of the distance to the class centroids (0.9 in the paper).
        diversity_weight: of the distance to noisy centroids, within `cluster_weight` (0.1).
        mean_noise, var_noise: half-widths of the uniform noise on centroid means and variances.
        centroid_rate: of the moving average; 0 leaves the first centroids in place.
        centroid_every: generator updates between two centroid updates.
    """

    warmup: int = 2000
    crop_probability: float = 0.5
    cluster_weight: float = 0.9
    diversity_weight: float = 0.1
    mean_noise: float = 0.03
    var_noise: float = 0.05
    centroid_rate: float = 0.2
    centroid_every: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "cluster_weight", "diversity_weight", "mean_noise", "var_noise")
        if not 0 <= self.centroid_rate <= 1 or self.centroid_every < 1:
            raise UserError(
                "centroid_rate lies in [0, 1] and centroid_every is at least 1; got "
                f"{self.centroid_rate} and {self.centroid_every}."
            )

    def synthesize(self, teacher: Teacher, count: int, *, seed: int = 0, journal: Journal | None = None) -> ImageSource:
        """Warm the generator up as GDFQ does, and set the centroids; alignment to them begins with the student."""
        teacher.require_batch_norms("ClusterQ")
        source = GeneratorSource(teacher, self, seed, Centroids(teacher, self))
        source.warm_up(journal or Journal())
        return source


class Centroids:
    """For each class and each BatchNorm of the deeper half: the mean and variance of one image's channels."""

    def __init__(self, teacher: Teacher, settings: ClusterQ) -> None:
        self.teacher, self.settings, self.layers = teacher, settings, deep_layers(teacher)
        blank = teacher.observe(torch.zeros(2, *teacher.image_shape, device=teacher.device)).bn_inputs
        self.layers = [layer for layer in self.layers if len(blank[layer]) == 2]
        if not self.layers:
            raise UserError(
                "ClusterQ aligns BatchNorms of the network's deeper half, and those there see tokens, not images. "
                "Use gdfq or intraq, which take BatchNorms whatever they see."
            )
        self.tables: dict[str, tuple[Tensor, Tensor]] = {}

    def terms(self, seen: Observation, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Class-wise alignment and diversity enhancement, each averaged over layers and images."""
        if not self.tables:
            return {}
        settings, cluster, diverse = self.settings, [], []
        for layer in self.layers:
            statistics = sample_statistics(seen.bn_inputs[layer])
            for statistic, table, width in zip(
                statistics, self.tables[layer], (settings.mean_noise, settings.var_noise), strict=True
            ):
                target = table[labels]
                noise = torch.empty(target.shape).uniform_(-width, width, generator=generator).to(target.device)
                cluster.append(F.mse_loss(statistic, target))
                diverse.append(F.mse_loss(statistic, target + noise))
        weight = settings.cluster_weight / len(self.layers)
        return {
            "cluster": weight * torch.stack(cluster).sum(),
            "diversity": weight * settings.diversity_weight * torch.stack(diverse).sum(),
        }

    @torch.no_grad()
    def after_update(self, step: int, draw: Draw) -> None:
        settings = self.settings
        since = step - settings.warmup
        first = since >= 0 and not self.tables
        if first or (since > 0 and since % settings.centroid_every == 0 and settings.centroid_rate):
            for index, labels in enumerate(even_batches(torch.arange(self.teacher.classes))):
                labels = labels.to(self.teacher.device)
                self._move(labels, self.teacher.observe(draw(labels, f"centroids {step} {index}")), first=first)

    def _move(self, labels: Tensor, seen: Observation, first: bool) -> None:
        """Set the centroids of these classes, or move those whose image the teacher recognises."""
        recognised = seen.logits.argmax(1) == labels
        for layer in self.layers:
            now = sample_statistics(seen.bn_inputs[layer])
            if first:
                if layer not in self.tables:
                    mean, var = (x.new_zeros(self.teacher.classes, x.shape[1]) for x in now)
                    self.tables[layer] = mean, var
                for table, statistic in zip(self.tables[layer], now, strict=True):
                    table[labels] = statistic
            else:
                for table, statistic in zip(self.tables[layer], now, strict=True):
                    moved = torch.lerp(table[labels], statistic, self.settings.centroid_rate)
                    table[labels] = torch.where(recognised[:, None], moved, table[labels])

    def state_dict(self) -> dict[str, list[Tensor]]:
        return {layer: [table.clone() for table in tables] for layer, tables in self.tables.items()}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        device = self.teacher.device
        self.tables = {layer: (mean.to(device), var.to(device)) for layer, (mean, var) in state.items()}


def deep_layers(teacher: Teacher) -> list[str]:
    """The BatchNorms from index floor((L + 1) / 2) - 2 on, L being their number.

    Raises:
        UserError: none of them lies in the deeper half of the network's convolutions and linear layers.
    """
    graph = teacher.network.graph
    order = {node: index for index, node in enumerate(graph.nodes)}
    layers, norms = weighted(graph), batch_norms(graph)
    if order[norms[-1]] < order[layers[len(layers) // 2]]:
        raise UserError(
            "ClusterQ aligns the BatchNorms of the network's deeper half, and this network has none there. "
            "Use gdfq or intraq, which take BatchNorms wherever they are."
        )
    names = [norm.name for norm in teacher.batch_norms]
    return names[max((len(names) + 1) // 2 - 2, 0) :]
