"""A calibration pack as each tool wants to read it.

onnxruntime   quantize_static(..., onnxruntime_reader(pack, "images"))
NNCF          nncf.quantize(model, nncf_dataset(pack))          PyTorch, ONNX and OpenVINO models
PyTorch       for images, labels in torch_loader(pack): ...     torchao's and anybody's own calibration loops
files         write_numpy(pack, path)                           representative data set of ai-edge and TFLite
              write_folder(pack, folder)                        PNG images by class
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from mirageq.errors import UserError
from mirageq.export.pack import Pack
from mirageq.folders import check_folder, replacing


def onnxruntime_reader(pack: Pack, input_name: str = "images", *, batch_size: int = 1) -> Any:
    """A `CalibrationDataReader` for `onnxruntime.quantization.quantize_static`."""
    try:
        from onnxruntime.quantization import CalibrationDataReader
    except ImportError as error:
        raise UserError("This adapter needs onnxruntime: pip install 'mirageq[onnx]'.") from error

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rewind()

        def rewind(self) -> None:
            self._batches = _batches(pack, batch_size)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self._batches, None)
            return None if batch is None else {input_name: batch}

    return Reader()


def nncf_dataset(pack: Pack, *, input_name: str | None = None, tensors: bool = False, batch_size: int = 1) -> Any:
    """An `nncf.Dataset` for `nncf.quantize`.

    Args:
        input_name: for ONNX models, which are fed by name.
        tensors: torch tensors, for PyTorch models; otherwise NumPy arrays, as OpenVINO and ONNX models take them.
    """
    try:
        import nncf
    except ImportError as error:
        raise UserError("This adapter needs nncf: pip install nncf.") from error

    def feed(batch: np.ndarray) -> Any:
        if tensors:
            return torch.from_numpy(batch)
        return {input_name: batch} if input_name else batch

    return nncf.Dataset(list(_batches(pack, batch_size)), feed)


def torch_loader(pack: Pack, *, batch_size: int = 32) -> DataLoader:
    """A `DataLoader` of (images (N, C, H, W) float32 normalised, labels (N,)), in the pack's order."""
    images = torch.from_numpy(pack.inputs(0, len(pack)))
    return DataLoader(TensorDataset(images, torch.from_numpy(pack.labels)), batch_size=batch_size)


def write_numpy(pack: Pack, path: Path, *, channels_last: bool = True, normalised: bool = True) -> None:
    """Write the images as one `.npy` array, float32 normalised (or uint8 pixels), channels last as TensorFlow has them.

    A representative data set for ai-edge or TFLite is then `lambda: ([image[None]] for image in numpy.load(path))`.
    """
    if normalised:
        array = pack.inputs(0, len(pack), channels_last=channels_last)
    else:
        array = np.asarray(pack.pixels) if channels_last else pack.pixels.transpose(0, 3, 1, 2)
    try:
        with replacing(path) as written, written.open("wb") as file:
            np.save(file, array)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error


def write_folder(pack: Pack, folder: Path) -> None:
    """Write `folder`/CLASS/NUMBER.png, classes with leading zeros so that their order by name is their order."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError("Writing images needs pillow: pip install 'mirageq[data]'.") from error
    width = len(str(int(pack.labels.max())))
    try:
        for index, (image, label) in enumerate(zip(pack.pixels, pack.labels, strict=True)):
            place = folder / f"{label:0{width}d}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(image).squeeze()).save(place / f"{index:06d}.png")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}.") from error


def check_copies(pack: Path, folder: Path | None, numpy: Path | None, *, channels: int) -> None:
    """Raise a `UserError` unless these copies of images of so many channels can be written beside a new pack."""
    if folder:
        if channels not in (1, 3):
            raise UserError(f"Images of {channels} channels cannot be PNG files; use --numpy in the place of --folder.")
        check_folder(folder)
        if pack.absolute() in (folder.absolute(), *folder.absolute().parents):
            raise UserError(f"--folder {folder} lies in the pack {pack}; give a folder beside it.")
    if numpy:
        if not numpy.absolute().parent.is_dir():
            raise UserError(f"There is no folder {numpy.parent} to write {numpy.name} in.")
        if numpy.suffix != ".npy":
            raise UserError(f"--numpy writes a .npy file; got {numpy}.")
        if numpy.exists():
            raise UserError(f"{numpy} exists already; give another name.")


def _batches(pack: Pack, batch_size: int) -> Iterator[np.ndarray]:
    """Network inputs; a last batch that is not full is left out, as some models take one size only."""
    if batch_size > len(pack):
        raise UserError(f"The pack holds {len(pack)} images, fewer than the batch size {batch_size}.")
    for start in range(0, len(pack) - batch_size + 1, batch_size):
        yield pack.inputs(start, start + batch_size)
