"""SelectQ: of many candidate images, keep the ones that represent the network's activations best.

Idea: let another method make several times the images wanted. For each layer, cluster the images by their activation
statistics; an image that lies near a centroid in every layer carries typical knowledge, an outlier does not. Rank
images by that distance summed over layers and keep the nearest.
Reference: Zhang et al., "SelectQ: Calibration Data Selection for Post-Training Quantization", Machine Intelligence
Research, doi 10.1007/s11633-024-1518-0. Known to us by its abstract; no code is public.
Differences from the official method:
  1. It selects from a training set; here the candidates are synthetic, so it stays data-free.
  2. Statistics are each image's channel means and deviations at the inputs of the BatchNorms and the classifier.
     The paper needs no BatchNorm; without any, the classifier's input alone counts.
  3. How its clusters are formed "dynamically" is not told. Here each layer has its own: an image opens a new cluster
     where it lies farther from every centroid than a typical image from the mean, until `clusters` exist; k-means
     settles them. Clusters of less than a quarter of an even share, such as outliers open, do not count.
  4. Distances are divided by their mean in each layer before they are added, so that no layer counts for more.
Cost: the other method's for `candidates_per_image` times the images, and one forward pass of the teacher.
Choose it: to study selection; among images painted to the same statistics it did not help (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mirageq.errors import UserError
from mirageq.images import ImageSource, SyntheticSet
from mirageq.journal import Journal
from mirageq.methods.contract import Method
from mirageq.methods.zeroq import ZeroQ
from mirageq.moments import sample_statistics
from mirageq.teacher import Teacher

CHUNK = 64
SETTLING = 10  # rounds of k-means
LEAST_SHARE = 0.25  # of the images that a cluster would have if all had as many


@dataclass(frozen=True, kw_only=True)
class SelectQ:
    """Settings of SelectQ.

    Attributes:
        candidates: the method that makes the images to choose from, `[method.candidates]` in a recipe.
        candidates_per_image: how many candidates are made for each image kept.
        clusters: most clusters of a layer.
    """

    candidates: Method = field(default_factory=ZeroQ)
    candidates_per_image: float = 3.0
    clusters: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.candidates_per_image < math.inf or self.clusters < 1:
            raise UserError(
                "candidates_per_image and clusters are at least 1; got "
                f"{self.candidates_per_image} and {self.clusters}."
            )

    def synthesize(self, teacher: Teacher, count: int, *, seed: int = 0, journal: Journal | None = None) -> ImageSource:
        """Make the candidates, then keep the `count` nearest to the centroids, in the order they were made."""
        made = max(count, round(count * self.candidates_per_image))
        journal = (journal or Journal()).within("candidates")
        pool = self.candidates.synthesize(teacher, made, seed=seed, journal=journal).sample(made)
        distance = sum(
            (apart := distances_to_centroids(layer, self.clusters)) / apart.mean().clamp_min(1e-12)
            for layer in layer_statistics(teacher, pool.images)
        )
        kept = torch.as_tensor(distance).argsort(stable=True)[:count].sort().values
        return SyntheticSet(pool.images[kept], pool.labels[kept], seed=seed)


@torch.no_grad()
def layer_statistics(teacher: Teacher, images: Tensor) -> list[Tensor]:
    """For each layer, (N, 2C): every image's channel means and deviations, each column scaled to unit variance."""
    layers: list[list[Tensor]] = []
    for chunk in images.split(CHUNK):
        seen = teacher.observe(chunk.to(teacher.device))
        pairs = [sample_statistics(x) for x in seen.bn_inputs.values() if len(x) == len(chunk)]  # not of all tokens
        rows = [torch.cat([mean, var.sqrt()], 1).cpu() for mean, var in pairs] + [seen.features.float().cpu()]
        layers = [[*layer, row] for layer, row in zip(layers or [[] for _ in rows], rows, strict=True)]
    joined = [torch.cat(layer) for layer in layers]
    return [(layer - layer.mean(0)) / layer.std(0).clamp_min(1e-6) for layer in joined]


def distances_to_centroids(points: Tensor, clusters: int) -> Tensor:
    """(N,) distance of each of the points (N, D) to the nearest centroid of at most `clusters`.

    A cluster needs `LEAST_SHARE` of N / `clusters` members, and two: an outlier alone would be its own centroid.
    """
    middle = points.mean(0, keepdim=True)
    typical = torch.cdist(points, middle).mean()
    centroids = points[torch.cdist(points, middle).argmin()][None]
    while len(centroids) < clusters:
        apart = torch.cdist(points, centroids).amin(1)
        if apart.max() <= typical:
            break
        centroids = torch.cat([centroids, points[apart.argmax()][None]])
    for _ in range(SETTLING):
        nearest = torch.cdist(points, centroids).argmin(1)
        sums = torch.zeros_like(centroids).index_add(0, nearest, points)
        counts = torch.bincount(nearest, minlength=len(centroids))
        centroids = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), centroids)
    least = max(2.0, LEAST_SHARE * len(points) / clusters)
    return torch.cdist(points, centroids[counts >= min(least, int(counts.max()))]).amin(1)
