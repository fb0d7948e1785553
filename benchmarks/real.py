"""Real training images as a synthesis source: the column every data-free number is compared with. Never data-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mirageq.data import open_images
from mirageq.images import ImageSource, SyntheticSet
from mirageq.journal import Journal
from mirageq.seeding import stream
from mirageq.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class RealImages:
    """A random choice of images, with their true labels, from a labelled file that `mirageq evaluate` can read."""

    path: str

    def synthesize(self, teacher: Teacher, count: int, *, seed: int = 0, journal: Journal | None = None) -> ImageSource:
        data = open_images(Path(self.path), teacher.image_shape)
        pixels, labels = (torch.cat(parts) for parts in zip(*data.batches(256), strict=True))
        chosen = torch.randperm(len(pixels), generator=stream(seed, "real"))[:count]
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (teacher.mean, teacher.std))
        return SyntheticSet((pixels[chosen] / 255 - mean) / std, labels[chosen], seed=seed)
