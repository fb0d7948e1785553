"""Calibration packs: synthetic images as plain pixels, for any tool that calibrates on real ones.

A pack is a folder: `pixels.npy` (N, H, W, C) uint8 RGB, `labels.npy` (N,) int64, and `pack.json`, which tells how a
pixel becomes the network's input. The adapters (`mirageq.export.adapters`) turn it into what each tool reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mirageq.data import LABELS, PIXELS
from mirageq.errors import UserError
from mirageq.folders import check_folder
from mirageq.images import Batch
from mirageq.teacher import Teacher

FORMAT = 1
MANIFEST = "pack.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a pack says of itself.

    Attributes:
        image_shape: (C, H, W) that the network takes.
        mean, std: the network's input is (pixel / 255 - mean) / std, per channel.
        count: images.
        clipped: share of values that lay outside what a pixel can show, and were clipped.
        sha256: of the pixels.
        made_by: method, seed, network and its hash, for the record.
    """

    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    count: int
    clipped: float
    sha256: str
    made_by: dict[str, str | int]
    format: int = FORMAT


@dataclass(frozen=True)
class Pack:
    """An open pack.

    Attributes:
        pixels: (N, H, W, C) uint8 RGB, read from the file as needed.
        labels: (N,) int64, the class each image was made for.
    """

    manifest: Manifest
    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def inputs(self, start: int, stop: int, *, channels_last: bool = False) -> np.ndarray:
        """Images `start` to `stop` as the network takes them: (n, C, H, W) float32 normalised, or (n, H, W, C)."""
        mean, std = (np.asarray(values, np.float32) for values in (self.manifest.mean, self.manifest.std))
        normalised = (self.pixels[start:stop].astype(np.float32) / 255 - mean) / std
        return normalised if channels_last else np.ascontiguousarray(normalised.transpose(0, 3, 1, 2))


def write_pack(batch: Batch, teacher: Teacher, folder: Path, made_by: dict[str, str | int]) -> Manifest:
    """Write normalised images as a pack in a new or empty folder.

    Raises:
        UserError: the normalisation is unknown, the images are not of the network's size, or the folder holds something
            or cannot be written.
    """
    shape = tuple(batch.images.shape[1:])
    if shape != teacher.image_shape:
        raise UserError(
            f"These images have the shape {shape}, and other tools feed the network "
            f"{teacher.image_shape}. Paint them without method.image_size."
        )
    if teacher.mean is None or teacher.std is None:
        raise UserError("Pixels follow from the network's normalisation, which is unknown; give its mean and std.")
    check_folder(folder)
    mean, std = (np.asarray(values, np.float32).reshape(-1, 1, 1) for values in (teacher.mean, teacher.std))
    values = 255 * (batch.images.cpu().numpy() * std + mean)
    pixels = np.ascontiguousarray(values.clip(0, 255).round().astype(np.uint8).transpose(0, 2, 3, 1))
    manifest = Manifest(
        image_shape=teacher.image_shape,
        mean=teacher.mean,
        std=teacher.std,
        count=len(pixels),
        clipped=float(((values < -0.5) | (values > 255.5)).mean()),
        sha256=hashlib.sha256(pixels.tobytes()).hexdigest(),
        made_by=made_by,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.resolve().parent) as workplace:
        unfinished = Path(workplace)
        np.save(unfinished / PIXELS, pixels)
        np.save(unfinished / LABELS, batch.labels.cpu().numpy())
        (unfinished / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n")
        folder.mkdir(exist_ok=True)
        for name in (PIXELS, LABELS, MANIFEST):  # last what makes it a pack
            os.replace(unfinished / name, folder / name)
    return manifest


def open_pack(folder: Path | str) -> Pack:
    """Open the pack in `folder`.

    Raises:
        UserError: there is none, or it is damaged or of another format.
    """
    folder = Path(folder)
    try:
        table = json.loads((folder / MANIFEST).read_text())
        if table.get("format") != FORMAT:
            raise UserError(
                f"{folder} was written in format {table.get('format')}, this version reads format {FORMAT}. "
                "Make it again with this version of mirageq."
            )
        facts: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in table.items()}
        manifest = Manifest(**facts)
        pixels, labels = np.load(folder / PIXELS, mmap_mode="r"), np.load(folder / LABELS)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} is not a readable calibration pack ({error}).") from error
    if hashlib.sha256(pixels.tobytes()).hexdigest() != manifest.sha256:
        raise UserError(f"{folder / PIXELS} is damaged: its hash is not the one in {MANIFEST}. Make the pack again.")
    return Pack(manifest, pixels, labels)
