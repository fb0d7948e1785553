"""Batched, differentiable augmentation of image tensors.

Crop, resize and flip together say where each output pixel reads its image, so a whole batch is one sampling grid:
no Python loop over images, and exact gradients back to the full image.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

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

    `scale` is the range of the crop's area as a fraction of the image, `ratio` that of its aspect (width / height),
    with the distribution of torchvision's `RandomResizedCrop`; bilinear, edges as in cropping first and resizing then.
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
    height, width = images.shape[-2:]
    down, right = torch.randint(0, 2 * most + 1, (2,), generator=generator).tolist()
    moved = F.pad(images, (most,) * 4, mode="reflect")[..., down : down + height, right : right + width]
    if not flip:
        return moved
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator).to(images.device) < flip
    return torch.where(mirrored, moved.flip(3), moved)


def mixed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blend each image of (N, C, H, W) with another of the batch, in a proportion uniform in [0, 1] (mixup, 2018)."""
    share = torch.rand(len(images), 1, 1, 1, generator=generator).to(images.device)
    other = images[torch.randperm(len(images), generator=generator).to(images.device)]
    return torch.lerp(other, images, share)


def low_passed(images: Tensor, cutoff: float | Tensor) -> Tensor:
    """Images (N, C, H, W) with each frequency f, in parts of the highest, multiplied by exp(-f^2 / (2 cutoff^2)).

    `cutoff` is one for all, or (N,), one for each image.
    """
    height, width = images.shape[-2:]
    down, across = torch.fft.fftfreq(height) * 2, torch.fft.rfftfreq(width) * 2
    narrow = torch.as_tensor(cutoff).view(-1, 1, 1, 1)
    gain = torch.exp(-(down[:, None].square() + across.square()) / (2 * narrow**2))
    spectrum = torch.fft.rfft2(images) * gain.to(images.device)
    return torch.fft.irfft2(spectrum, s=(height, width)).contiguous()
