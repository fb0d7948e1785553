"""Synthetic images: what a method makes, and what calibration and tuning read."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mirageq.errors import UserError
from mirageq.folders import replacing
from mirageq.hashing import hash_tensors
from mirageq.seeding import stream


class Batch(NamedTuple):
    """Normalised images (N, C, H, W), float32, and the class each one was made for (N,), int64."""

    images: Tensor
    labels: Tensor


class ImageSource(Protocol):
    """Where images come from, be it a finished set or a generator that keeps learning."""

    def sample(self, count: int) -> Batch:
        """`count` images (a finished set gives at most as many as it has), always the same for the same state."""
        ...

    def batches(self, batch_size: int, student: Callable[[Tensor], Tensor] | None = None) -> Iterator[Batch]:
        """Batches without end, for tuning; a source may learn from `student` (images -> logits) meanwhile."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on from here: tensors and plain numbers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class SyntheticSet:
    """A finished set of images. They may lie in memory or in a file that is read as it is needed.

    Args:
        images: (N, C, H, W), any float type.
        labels: (N,).
        seed: of the order in which `batches` draws.
    """

    def __init__(self, images: Tensor, labels: Tensor, *, seed: int = 0) -> None:
        if len(images) != len(labels) or len(images) == 0:
            raise UserError(
                f"A set needs as many labels as images, and at least one; got {len(labels)} and {len(images)}."
            )
        self.images, self.labels, self.seed = images, labels, seed
        self._drawn = self._resume_at = 0

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, count: int) -> Batch:
        return Batch(self.images[:count].float(), self.labels[:count])

    def batches(self, batch_size: int, student: Callable[[Tensor], Tensor] | None = None) -> Iterator[Batch]:
        check_batch(batch_size, len(self))
        per_epoch = len(self) // batch_size
        self._drawn, self._resume_at = self._resume_at, 0
        while True:
            epoch, index = divmod(self._drawn, per_epoch)
            order = torch.randperm(len(self), generator=stream(self.seed, "order", epoch))
            chosen = order[index * batch_size : (index + 1) * batch_size]
            self._drawn += 1
            yield Batch(self.images[chosen].float(), self.labels[chosen])

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drawn = self._resume_at = state["drawn"]

    def digest(self) -> str:
        """SHA-256 of the images and labels."""
        return hash_tensors({"images": self.images, "labels": self.labels})

    def save(self, path: Path) -> None:
        """Write the set, as float16, to a safetensors file; an interruption leaves none, or the one before.

        Raises:
            UserError: the path cannot be written.
        """
        tensors = {"images": self.images.half().contiguous(), "labels": self.labels.contiguous()}
        try:
            with replacing(path) as written:
                save_file(tensors, written)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be written: {error}.") from error

    @staticmethod
    def load(path: Path, *, seed: int = 0) -> SyntheticSet:
        """Open a file written by a run, or any safetensors file with `images` and `labels`.

        Raises:
            UserError: missing, damaged, unfinished, or without these tensors.
        """
        try:
            with safe_open(path, framework="pt") as file:
                images, labels = file.get_tensor("images"), file.get_tensor("labels")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is not a readable file of synthetic images ({error}).") from error
        whole = labels.dim() == 1 and not labels.is_floating_point() and images.dim() == 4
        if not whole or not images.is_floating_point():
            raise UserError(
                f"{path} is no file of synthetic images: they are (N, C, H, W) numbers with labels (N,); got "
                f"{images.dtype} {tuple(images.shape)} and {labels.dtype} {tuple(labels.shape)}."
            )
        labels = labels.long()
        if (labels < 0).any():
            raise UserError(f"{path} holds {int((labels < 0).sum())} unfinished images; resume the run that writes it.")
        return SyntheticSet(images, labels, seed=seed)


class GrowingSet:
    """Room for `count` images of which the first few are finished; in memory, or in a safetensors file.

    Images are kept in float16: half the disk and memory, with steps (5e-4 near 1) far below what 8 bits resolve.
    In the file an image counts as finished when its label is no longer -1, so a file is valid at any moment.
    """

    def __init__(self, count: int, image_shape: tuple[int, int, int], path: Path | None = None) -> None:
        self._path, self._partial = path, path.with_suffix(".partial") if path else None
        shape = (count, *image_shape)
        if path is None or self._partial is None:
            self.images, self.labels = np.zeros(shape, np.float16), np.full(count, -1, np.int64)
        elif path.exists():  # finished already: it is only read, perhaps by several processes at once
            self.images, self.labels = _map(path, _layout(shape), "r")
        else:
            if not self._partial.exists():
                _create(self._partial, _layout(shape))
            self.images, self.labels = _map(self._partial, _layout(shape), "r+")

    @property
    def finished(self) -> int:
        return int((self.labels >= 0).sum())

    def write(self, start: int, images: Tensor, labels: Tensor) -> None:
        """Put finished images in place; they are on disk when this returns."""
        stop = start + len(images)
        self.images[start:stop] = images.detach().cpu().numpy().astype(np.float16)
        self._flush()
        self.labels[start:stop] = labels.cpu().numpy()
        self._flush()

    def read(self, start: int, stop: int) -> Batch:
        return Batch(
            torch.from_numpy(self.images[start:stop].astype(np.float32)),
            torch.from_numpy(self.labels[start:stop].copy()),
        )

    def finish(self, seed: int) -> SyntheticSet:
        """The finished set; a file gets its final name."""
        if self._path is None or self._partial is None:
            return SyntheticSet(torch.from_numpy(self.images), torch.from_numpy(self.labels), seed=seed)
        left = len(self.labels) - self.finished
        del self.images, self.labels
        if left:
            raise UserError(f"{self._partial} holds {left} unfinished images; begin its run anew.")
        if not self._path.exists():
            os.replace(self._partial, self._path)
        return SyntheticSet.load(self._path, seed=seed)

    def _flush(self) -> None:
        for array in (self.images, self.labels):
            if isinstance(array, np.memmap):
                array.flush()


def check_batch(batch_size: int, count: int) -> None:
    """Raise a `UserError` unless a set of `count` images fills a batch."""
    if batch_size > count:
        raise UserError(
            f"The batch size {batch_size} is larger than the set of {count} synthetic images. "
            "Make more images or use a smaller batch."
        )


def _layout(shape: tuple[int, ...]) -> bytes:
    """The safetensors header of a set: labels first, then images, little-endian."""
    labels = 8 * shape[0]
    images = 2 * int(np.prod(shape))
    header = {
        "labels": {"dtype": "I64", "shape": [shape[0]], "data_offsets": [0, labels]},
        "images": {"dtype": "F16", "shape": list(shape), "data_offsets": [labels, labels + images]},
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _create(path: Path, layout: bytes) -> None:
    header = json.loads(layout[8:])
    count, end = header["labels"]["shape"][0], header["images"]["data_offsets"][1]
    with replacing(path) as written, written.open("wb") as file:
        file.write(layout)
        file.write(np.full(count, -1, "<i8").tobytes())
        file.truncate(len(layout) + end)
        if hasattr(os, "posix_fallocate"):  # a full disk is told here, and not by a signal once it is written to
            os.posix_fallocate(file.fileno(), 0, len(layout) + end)


def _map(path: Path, layout: bytes, mode: Literal["r", "r+"]) -> tuple[np.ndarray, np.ndarray]:
    with path.open("rb") as file:
        if file.read(len(layout)) != layout:
            raise UserError(
                f"{path} was begun with another image count or shape. Use another output folder, or the same settings."
            )
    header = json.loads(layout[8:])
    shape = tuple(header["images"]["shape"])
    labels = np.memmap(path, "<i8", mode, len(layout), shape[:1])
    return np.memmap(path, "<f2", mode, len(layout) + header["images"]["data_offsets"][0], shape), labels
