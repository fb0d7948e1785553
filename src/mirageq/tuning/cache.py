"""Activations of all images at one place of a network, in memory or in a file that goes with them.

Maps lie channels last: convolutions of few channels take a fifth of the time so.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

CHUNK = 32
FLOAT_BYTES = 4


class Cache:
    """Activations (N, ...) float32 of all images.

    Args:
        values: a tensor, or rows in a file.
        folder: where they are kept, and what `through` makes of them,
        limit: if they take more bytes than this.
    """

    def __init__(self, values: Tensor | Spilled, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        if isinstance(values, Tensor):
            fits = self._fits(values.shape)
            values = values.contiguous(memory_format=_layout(values.dim())) if fits else _spilled(values, folder)
        self._values = values

    @property
    def shape(self) -> torch.Size:
        return self._values.shape

    def __len__(self) -> int:
        return self.shape[0]

    def take(self, chosen: Tensor) -> Tensor:
        """The rows with these numbers (B,), (B, ...)."""
        if isinstance(self._values, Spilled) or self._values.dim() != 4:
            return self._values[chosen]
        return _as_they_lie(self._values).index_select(0, chosen).permute(0, 3, 1, 2)  # a quarter of indexing's time

    @torch.no_grad()
    def through(self, run: nn.Module, device: torch.device) -> Cache:
        """What `run` makes of all of them, chunk by chunk."""
        room: Tensor | Spilled | None = None
        for start in range(0, len(self), CHUNK):
            chosen = torch.arange(start, min(start + CHUNK, len(self)))
            result = run(self.take(chosen).to(device)).float().cpu()
            if room is None:
                shape = torch.Size((len(self), *result.shape[1:]))
                room = _empty(shape) if self._fits(shape) else Spilled(shape, self._folder)
            room[start : start + len(result)] = result
        assert room is not None
        return Cache(room, self._folder, self._limit)

    def _fits(self, shape: torch.Size) -> bool:
        return FLOAT_BYTES * math.prod(shape) <= self._limit


class Spilled:
    """Rows of float32 in a temporary file, which vanishes with the object."""

    def __init__(self, shape: torch.Size, folder: Path) -> None:
        self.shape = shape
        self._row_bytes = FLOAT_BYTES * math.prod(shape[1:])
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed with the object

    def __getitem__(self, chosen: Tensor) -> Tensor:
        rows = _empty(torch.Size((len(chosen), *self.shape[1:])))
        for row, index in zip(_as_they_lie(rows), chosen.tolist(), strict=True):
            self._file.seek(index * self._row_bytes)
            self._file.readinto(row.numpy())  # type: ignore[attr-defined]
        return rows

    def __setitem__(self, place: slice, values: Tensor) -> None:
        self._file.seek(place.start * self._row_bytes)
        self._file.write(_as_they_lie(values).contiguous().numpy().tobytes())


def _spilled(values: Tensor, folder: Path) -> Spilled:
    room = Spilled(values.shape, folder)
    for start in range(0, len(values), CHUNK):
        room[start : start + CHUNK] = values[start : start + CHUNK]
    return room


def _empty(shape: torch.Size) -> Tensor:
    return torch.empty(shape, memory_format=_layout(len(shape)))


def _layout(dimensions: int) -> torch.memory_format:
    return torch.channels_last if dimensions == 4 else torch.contiguous_format


def _as_they_lie(values: Tensor) -> Tensor:
    """(N, C, H, W) as (N, H, W, C), the order in memory; other shapes as they are."""
    return values.permute(0, 2, 3, 1) if values.dim() == 4 else values
