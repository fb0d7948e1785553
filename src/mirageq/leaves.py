"""Dead leaves: random images with the statistics of photographs, for painting to begin from.

Photographs show things in front of one another, of all sizes and with sharp edges; so do leaves of random size, tone
and texture fallen on top of each other (Lee, Mumford and Huang, "Occlusion Models for Natural Images", IJCV 2001). A
network is less surprised by them than by noise, and descent that begins there keeps their smooth faces and edges.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAVES = 300  # of an image; what they leave uncovered shows one more behind them
SMALLEST, LARGEST = 1 / 32, 0.6  # radius, in parts of the image's short side
POWER = 1.8  # radii r are drawn with a density of about r^-(1 + POWER) between these
SQUARE_SHARE = 0.4  # of the leaves are rectangles, the others ellipses


def dead_leaves(count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """(count, C, H, W) images: values with mean about 0 and deviation about 1."""
    channels, height, width = shape

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *size, generator=generator)

    def normal(deviation: float, *size: int) -> Tensor:
        return deviation * torch.randn(count, *size, generator=generator)

    rows = torch.arange(height).view(1, -1, 1).float()
    columns = torch.arange(width).view(1, 1, -1).float()
    side = min(height, width)
    light, tint = normal(0.5, 1), normal(0.24, channels)
    texture = _textures(count, height, width, generator)
    images = torch.zeros(count, channels, height, width)
    bare = torch.ones(count, height, width, dtype=torch.bool)
    least = (SMALLEST / LARGEST) ** POWER
    for index in range(LEAVES + 1):
        radius = side * SMALLEST * uniform(least, 1, 1, 1) ** (-1 / POWER)
        angle, aspect = uniform(0, math.pi, 1, 1), uniform(0.3, 1, 1, 1)
        down, across = rows - uniform(0, height, 1, 1), columns - uniform(0, width, 1, 1)
        along = (across * angle.cos() + down * angle.sin()) / radius
        aside = (down * angle.cos() - across * angle.sin()) / radius
        square = uniform(0, 1, 1, 1) < SQUARE_SHARE
        size = torch.where(square, torch.maximum(along.abs(), aside.abs() / aspect), along.hypot(aside / aspect))
        covered = bare & (size < 1) if index < LEAVES else bare
        tone = light + tint + normal(0.9, 1) + normal(0.3, channels)
        shade = normal(0.5, 1, 1) * along.clamp(-1, 1) + normal(0.5, 1, 1) * aside.clamp(-1, 1)
        rough = uniform(-0.4, 0.4, 1, 1).clamp_min(0)  # half of the leaves are smooth
        leaf = tone[:, :, None, None] + (shade + rough * texture)[:, None]
        images = torch.where(covered[:, None], leaf, images)
        bare = bare & ~covered
    return images


def _textures(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """(count, H, W) noise whose amplitudes fall with a random power of the frequency; mean 0, deviation 1."""
    frequency = torch.fft.fftfreq(height)[:, None].hypot(torch.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    power = 0.5 + 0.8 * torch.rand(count, 1, 1, generator=generator)
    spectrum = torch.fft.rfft2(torch.randn(count, height, width, generator=generator)) / frequency**power
    spectrum[:, 0, 0] = 0
    textures = torch.fft.irfft2(spectrum, s=(height, width))
    return textures / textures.std(dim=(1, 2), keepdim=True)
