"""Batched, differentiable augmentation of image tensors.

Crop, resize and flip together say where each output pixel reads its image, so a whole batch is one sampling grid:
no Python loop over images, and exact gradients back to the full image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ATTEMPTS = 10  # as torchvision's RandomResizedCrop: this many draws, then the whole image


def random_resized_crop(
    images: Tensor,
    generator: torch.Generator,
    *,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
) -> Tensor:
    """Crop each image of (N, C, H, W) independently, resize it back, and mirror it with probability `flip`.

    `scale` is the range of the crop's area as a fraction of the image, `ratio` that of its aspect (width / height) in
    parts of the image's own: the distribution of torchvision's `RandomResizedCrop` for square images, stretched for
    others. Bilinear, edges as in cropping first and resizing then.
    """
    count, _, height, width = images.shape
    top, left, rows, columns = random_boxes(count, height, width, generator, scale, ratio)
    mirrored = torch.rand(count, generator=generator) < flip
    vertical = source_positions(top, rows, height)
    horizontal = source_positions(left, columns, width)
    horizontal = torch.where(mirrored[:, None], horizontal.flip(1), horizontal)
    grid = torch.stack(
        [
            (2 * horizontal / max(width - 1, 1) - 1)[:, None, :].expand(-1, height, -1),
            (2 * vertical / max(height - 1, 1) - 1)[:, :, None].expand(-1, -1, width),
        ],
        dim=-1,
    )
    grid = grid.to(images.device, images.dtype)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=True)


def random_boxes(
    count: int,
    height: int,
    width: int,
    generator: torch.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw `count` crop boxes: top, left, rows, columns, each (count,) of whole pixels."""
    shape = (ATTEMPTS, count)
    area = height * width * torch.empty(shape).uniform_(*scale, generator=generator)
    aspect = torch.empty(shape).uniform_(math.log(ratio[0]), math.log(ratio[1]), generator=generator).exp()
    aspect *= width / height
    columns, rows = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (columns >= 1) & (columns <= width) & (rows >= 1) & (rows <= height)
    first, each = fits.long().argmax(0), torch.arange(count)
    fitted = fits.any(0)
    rows = torch.where(fitted, rows[first, each], height)
    columns = torch.where(fitted, columns[first, each], width)
    top = (torch.rand(count, generator=generator) * (height - rows + 1)).long()
    left = (torch.rand(count, generator=generator) * (width - columns + 1)).long()
    return top, left, rows, columns


def source_positions(start: Tensor, length: Tensor, size: int) -> Tensor:
    """(N, size) positions, in pixels, that `size` outputs read when `length[n]` pixels from `start[n]` are stretched.

    Positions stay on the crop's own pixels, so nothing outside the crop leaks in at its edges.
    """
    inside = (torch.arange(size) + 0.5) * (length[:, None] / size) - 0.5
    return start[:, None] + inside.clamp_min(0).minimum(length[:, None] - 1.0)


def shifted(images: Tensor, generator: torch.Generator, most: int, *, flip: float = 0.0) -> Tensor:
    """(N, C, H, W) moved by up to `most` whole pixels each way, the same for all, mirrored at the border.

    Each image is flipped with probability `flip`.
    """
    down, right = (torch.randint(0, 2 * most + 1, (2,), generator=generator) - most).tolist()
    moved = _Moved.apply(images, down, right) if down or right else images
    if not flip:
        return moved
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator).to(images.device) < flip
    return torch.where(mirrored, moved.flip(3), moved)


class _Moved(torch.autograd.Function):
    """Pixel (y, x) is that of (y + down, x + right), mirrored at the border, in the layout of memory that images have.

    Padding and cutting out do the same in two passes more, four more for the gradient, and lose the layout.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, down: int, right: int) -> Tensor:
        ctx.moves = down, right
        moved = torch.empty_like(images)
        for (to_rows, from_rows), (to_columns, from_columns) in _strips(images, down, right):
            moved[..., to_rows, to_columns] = images[..., from_rows, from_columns]
        return moved

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        result = torch.zeros_like(gradient)
        for (to_rows, from_rows), (to_columns, from_columns) in _strips(gradient, *ctx.moves):
            result[..., from_rows, from_columns] += gradient[..., to_rows, to_columns]
        return result, None, None


def _strips(images: Tensor, down: int, right: int) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """Rectangles of a moved image as (rows there, rows here), (columns there, columns here)."""
    height, width = images.shape[-2:]
    return product(_stretches(height, down), _stretches(width, right))


def _stretches(size: int, move: int) -> list[tuple[slice, slice]]:
    """(there, here): the part of a line of `size` pixels that only moves, and each pixel mirrored behind its end."""
    first, behind = max(-move, 0), size - max(move, 0)
    moved = [(slice(first, behind), slice(first + move, behind + move))]
    for place in (*range(first), *range(behind, size)):
        mirror = size - 1 - abs(size - 1 - abs(place + move))
        moved.append((slice(place, place + 1), slice(mirror, mirror + 1)))
    return moved


def mixed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blend each image of (N, C, H, W) with another of the batch, in a proportion uniform in [0, 1] (mixup, 2018)."""
    share = torch.rand(len(images), 1, 1, 1, generator=generator).to(images.device)
    other = images[torch.randperm(len(images), generator=generator).to(images.device)]
    return torch.lerp(other, images, share)


def low_passed(images: Tensor, cutoff: float | Tensor) -> Tensor:
    """Images (N, C, H, W) with each frequency f, in parts of the highest, multiplied by exp(-f^2 / (2 cutoff^2)).

    `cutoff` is one for all, or (N,), one for each image. No pixel leaves the range that its channel had: the Gaussian
    ends at the highest frequency, and would ring.
    """
    height, width = images.shape[-2:]
    down, across = torch.fft.fftfreq(height) * 2, torch.fft.rfftfreq(width) * 2
    narrow = torch.as_tensor(cutoff).view(-1, 1, 1, 1)
    gain = torch.exp(-(down[:, None].square() + across.square()) / (2 * narrow**2))
    spectrum = torch.fft.rfft2(images) * gain.to(images.device)
    passed = torch.fft.irfft2(spectrum, s=(height, width))
    return passed.clamp(images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)).contiguous()
