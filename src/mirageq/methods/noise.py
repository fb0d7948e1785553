"""Gaussian noise: the baseline every method must beat.

Idea: no synthesis at all. Images are N(0, 1) in the normalised input space, labelled by the teacher.
Reference: none; it is the control of every table here.
Differences from official code: there is none.
Cost: nothing.
Choose it: to learn what the quantizer and the tuning achieve without help from the images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mirageq.errors import check_image_size
from mirageq.images import GrowingSet, ImageSource
from mirageq.journal import Journal
from mirageq.seeding import stream
from mirageq.teacher import Teacher

CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Gaussian noise as images.

    Attributes:
        image_size: height and width of the images, in pixels; None takes the network's own.
    """

    image_size: int | None = None

    def __post_init__(self) -> None:
        check_image_size(self.image_size)

    def synthesize(self, teacher: Teacher, count: int, *, seed: int = 0, journal: Journal | None = None) -> ImageSource:
        """Draw `count` images."""
        path = journal.folder / "synthetic.safetensors" if journal and journal.folder else None
        shape = teacher.shape_at(self.image_size)
        drawn = GrowingSet(count, shape, path)
        for start in range(drawn.finished, count, CHUNK):
            size = min(CHUNK, count - start)
            images = torch.randn(size, *shape, generator=stream(seed, "noise", start))
            drawn.write(start, images, teacher.pseudo_labels(images.to(teacher.device)))
        return drawn.finish(seed)
