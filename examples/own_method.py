"""A method of your own, in one file: images that are smoothed noise.

    cd examples && mirageq quantize timm:resnet18 --method own_method:SmoothNoise --bits w8a8 \
            --set tuner.steps=0 --out runs/mine

Idea: noise blurred until it has the scale of objects.
Reference: none.
Differences from official code: there is none.
Cost: nothing.
Choose it: never; it shows how a method plugs in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mirageq.images import ImageSource, SyntheticSet
from mirageq.journal import Journal
from mirageq.seeding import stream
from mirageq.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class SmoothNoise:
    """Settings: the side of the box that blurs, an odd number of pixels."""

    side: int = 5

    def synthesize(self, teacher: Teacher, count: int, *, seed: int = 0, journal: Journal | None = None) -> ImageSource:
        noise = torch.randn(count, *teacher.image_shape, generator=stream(seed, "smooth"))
        images = F.avg_pool2d(noise, self.side, stride=1, padding=self.side // 2) * self.side
        return SyntheticSet(images, teacher.pseudo_labels(images.to(teacher.device)).cpu(), seed=seed)
