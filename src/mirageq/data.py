"""Labelled images for measuring accuracy. Synthesis, calibration and tuning never see them."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mirageq.errors import UserError, first_line

PIXELS, LABELS = "pixels.npy", "labels.npy"
"""What a calibration pack keeps its images (N, H, W, C) uint8 and labels (N,) in."""

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


class _Files(Protocol):
    """What a format offers: how many images, and the pixels (H, W, C) uint8 and label of one."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[np.ndarray, int]: ...


class LabelledImages:
    """Images with labels, fitted to a network's input size. Make one with `open_images`.

    `classes` is how many there are, where the format tells.

    Each image is first scaled so that its short side is `resize` pixels (if given), then cropped around its centre.
    """

    def __init__(
        self, name: str, files: _Files, image_shape: tuple[int, int, int], resize: int | None, limit: int | None
    ) -> None:
        self.name = name
        self._files, self._shape, self._resize = files, image_shape, resize
        self.count = min(len(files), limit or len(files))
        self.classes: int | None = getattr(files, "classes", None)

    def check_labels(self, labels: Tensor, classes: int) -> None:
        """Raise a `UserError` unless these labels can be those of a network of so many classes."""
        if self.classes not in (None, classes):
            raise UserError(
                f"{self.name} has {self.classes} sub-folders, and the network knows {classes} classes: a label is a "
                "sub-folder's place, so there must be one for each class, if need be an empty one."
            )
        for label in (int(labels.max()), int(labels.min())):
            if not 0 <= label < classes:
                raise UserError(
                    f"The images have the label {label}, and the network knows {classes} classes. "
                    "Give images of the data set it was trained for."
                )

    def fitting(self, pixels: int, most: int) -> int:
        """How many images, at least one and `most` at most, have so many pixels together."""
        return max(1, min(most, pixels // (self._shape[1] * self._shape[2])))

    def batches(self, batch_size: int, chosen: Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels (B, C, H, W) uint8, RGB or grey, and labels (B,) int64; in the files' order, or those chosen.

        Raises:
            UserError: an image is smaller than the network's input, or has another number of channels.
        """
        order = range(self.count) if chosen is None else chosen
        for start in range(0, len(order), batch_size):
            picked = [self._files[index] for index in order[start : start + batch_size]]
            pixels = np.stack([self._fit(image) for image, _ in picked])
            yield (
                torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
                torch.tensor([label for _, label in picked]),
            )

    def digest(self) -> str:
        """SHA-256 over pixels and labels, as a network sees them."""
        digest = hashlib.sha256()
        for pixels, labels in self.batches(256):
            digest.update(pixels.numpy().tobytes())
            digest.update(labels.numpy().tobytes())
        return digest.hexdigest()

    def _fit(self, image: np.ndarray) -> np.ndarray:
        channels, height, width = self._shape
        if self._resize:
            image = _scale(image, self._resize)
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        if top < 0 or left < 0:
            raise UserError(
                f"An image of {image.shape[1]}x{image.shape[0]} pixels is smaller than the network's {width}x{height}. "
                "Scale them up with --resize."
            )
        if image.shape[2] != channels:
            raise UserError(f"The images have {image.shape[2]} channels, and the network takes {channels}.")
        return image[top : top + height, left : left + width]


def open_images(
    path: Path | str, image_shape: tuple[int, int, int], *, resize: int | None = None, limit: int | None = None
) -> LabelledImages:
    """Open labelled images.

    Args:
        path: a folder with one sub-folder a class (labels in the order of their names), a `.npz` with `images`
            (N, H, W, C) uint8 and `labels`, a binary CIFAR file (`test_batch.bin`, or CIFAR-100's `test.bin`), a
            parquet file with columns `jpeg` (or `image`) and `label`, or a calibration pack: synthetic images, labelled
            with the classes they were made for, on which settings may be chosen.
        image_shape: (C, H, W) that the network takes; image files are read as grey where C is 1, else as RGB.
        resize: pixels of the short side before the centre crop; None crops the image as it is.
        limit: only the first so many; of a folder, as many of each class as it can be.

    Raises:
        UserError: nothing there, or not one of these formats.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"There is no file or folder {path} to evaluate on.")
    if resize is not None and resize < max(image_shape[1:]):
        raise UserError(f"--resize must be at least the network's input, {max(image_shape[1:])}; got {resize}.")
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be positive; got {limit}.")
    files = _open(path, channels=image_shape[0])
    if len(files) == 0:
        raise UserError(f"{path} holds no images.")
    return LabelledImages(path.name, files, image_shape, resize, limit)


def _open(path: Path, channels: int) -> _Files:
    if path.is_dir() and not (path / PIXELS).exists():
        return _Folder(path, channels)
    readers: dict[str, Callable[[Path], _Files]] = {
        ".npz": _npz,
        ".bin": _cifar_binary,
        ".parquet": partial(_Parquet, channels=channels),
    }
    if path.is_dir():
        path, readers = path / PIXELS, {".npy": _pack}
    if path.suffix not in readers:
        raise UserError(f"{path} is none of: image folder, {', '.join(readers)}.")
    try:
        return readers[path.suffix](path)
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as labelled images: {first_line(error)}.") from error


class _Arrays:
    def __init__(self, images: np.ndarray, labels: Sequence[int] | np.ndarray) -> None:
        self.images, self.labels = images, _whole(labels)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])


def _whole(labels: Sequence[int] | np.ndarray) -> np.ndarray:
    numbers = np.asarray(labels)
    if len(numbers) and numbers.dtype.kind not in "iu":
        raise ValueError(f"labels are whole numbers, got {numbers.dtype}")
    return numbers


def _npz(path: Path) -> _Arrays:
    with np.load(path) as file:
        images, labels = file["images"], file["labels"]
    if images.dtype != np.uint8 or images.ndim != 4 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"expected images (N, H, W, C) uint8 and labels (N,), got {images.dtype} {images.shape} and {labels.shape}"
        )
    return _Arrays(images, labels)


def _pack(path: Path) -> _Arrays:
    return _Arrays(np.load(path, mmap_mode="r"), np.load(path.with_name(LABELS)))


def _cifar_binary(path: Path) -> _Arrays:
    """Records of 1 (CIFAR-10) or 2 (CIFAR-100: coarse, fine) label bytes and 3x32x32 pixels."""
    content = np.fromfile(path, np.uint8)
    for label_bytes in (1, 2):
        record = label_bytes + 3072
        if len(content) and len(content) % record == 0:
            records = content.reshape(-1, record)
            images = records[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            return _Arrays(images, records[:, label_bytes - 1])
    raise ValueError(f"{len(content)} bytes are no whole number of CIFAR records (3,073 or 3,074 bytes each)")


class _Folder:
    def __init__(self, path: Path, channels: int) -> None:
        self.channels = channels
        classes = _by_name(folder for folder in path.iterdir() if folder.is_dir())
        if not classes:
            raise UserError(f"{path} has no sub-folders; an image folder has one a class, in the order of the labels.")
        found = [
            (place, label, file)
            for label, folder in enumerate(classes)
            for place, file in enumerate(_by_name(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES))
        ]
        found.sort(key=lambda entry: entry[:2])  # so that the first few are of all classes
        self.files = [(file, label) for _, label, file in found]
        self.classes = len(classes)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        file, label = self.files[index]
        return _decode(file.read_bytes(), str(file), self.channels), label


def _by_name(paths: Iterable[Path]) -> list[Path]:
    """In one order on all systems."""
    return sorted(paths, key=lambda path: path.name)


class _Parquet:
    def __init__(self, path: Path, channels: int) -> None:
        self.channels = channels
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise UserError("Reading parquet needs pyarrow: pip install 'mirageq[data]'.") from error
        names = pyarrow.parquet.read_schema(path).names
        column = "image" if "image" in names and "jpeg" not in names else "jpeg"
        table = pyarrow.parquet.read_table(path, columns=[column, "label"])
        self.images, self.labels = table[column], _whole(table["label"].to_pylist()).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image = self.images[index].as_py()
        content = image.get("bytes") if isinstance(image, dict) else image  # as Hugging Face's data sets have it
        return _decode(content, f"image {index}", self.channels), self.labels[index]


def _decode(content: object, name: str, channels: int) -> np.ndarray:
    """(H, W, C) of an image file: grey for a network of one channel, else RGB; of 16 bits the upper eight."""
    if not isinstance(content, bytes):
        raise UserError(f"{name} is no encoded image: it is stored as {type(content).__name__}, not as bytes.")
    pillow = _pillow()
    try:
        image = pillow.open(io.BytesIO(content))
        if image.mode.startswith("I"):  # Pillow would cut off what is above 255
            image = pillow.fromarray((np.asarray(image) // 256).astype(np.uint8))
        pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        raise UserError(f"{name} is not a whole image: {first_line(error)}.") from error
    return pixels.reshape(*pixels.shape[:2], -1)


def _scale(image: np.ndarray, short_side: int) -> np.ndarray:
    height, width = image.shape[:2]
    factor = short_side / min(height, width)
    pillow = _pillow()
    size = (round(width * factor), round(height * factor))
    bands = [pillow.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(image, 2, 0)]
    return np.stack([np.asarray(band.resize(size, pillow.Resampling.BICUBIC)) for band in bands], 2)


def _pillow():
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError("Reading images needs Pillow: pip install 'mirageq[data]'.") from error
    return Image
