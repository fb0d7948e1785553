"""Real images as a source: the yardstick that every data-free number stands next to. Never data-free.

Idea: a random choice of images, with their true labels, from a labelled file that `mirageq evaluate` can read.
Reference: none; the papers' "real data" column.
Differences from official code: there is none.
Cost: reading the file.
Choose it: with `name = "mirageq.methods.real:Real"`, to learn how much the lack of data costs. Give images of the
training set, not those the accuracy is measured on. It synthesises nothing, so it is not in the list of methods.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mirageq.data import open_images
from mirageq.errors import UserError, check_image_size
from mirageq.images import ImageSource, SyntheticSet
from mirageq.journal import Journal
from mirageq.seeding import stream
from mirageq.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class Real:
    """Real images.

    Attributes:
        path: image folder, CIFAR file or parquet of JPEG, as for `mirageq evaluate`.
        resize: pixels of the short side before the crop; None crops the image as it is.
        image_size: height and width of the crop around their centre, in pixels; None takes the network's own.
    """

    path: str
    resize: int | None = None
    image_size: int | None = None

    def __post_init__(self) -> None:
        check_image_size(self.image_size)

    def synthesize(self, teacher: Teacher, count: int, *, seed: int = 0, journal: Journal | None = None) -> ImageSource:
        """`count` of the file's images, chosen by the seed."""
        if teacher.mean is None or teacher.std is None:
            raise UserError("Real images must be normalised as the network expects; give its mean and std.")
        data = open_images(self.path, teacher.shape_at(self.image_size), resize=self.resize)
        if data.count < count:
            raise UserError(f"{self.path} holds {data.count} images, and {count} were asked for. Lower images.")
        chosen = torch.randperm(data.count, generator=stream(seed, "real"))[:count].tolist()
        pixels, labels = (torch.cat(parts) for parts in zip(*data.batches(256, chosen), strict=True))
        data.check_labels(labels, teacher.classes)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (teacher.mean, teacher.std))
        return SyntheticSet((pixels / 255 - mean) / std, labels, seed=seed)
