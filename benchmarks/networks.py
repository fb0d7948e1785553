"""The measured networks, as `py:benchmarks/networks.py:NAME`: weights and definitions lie in ../shared/data."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def _load(name: str):
    """A network with its weights; `pretrained_cfg` tells image shape and normalisation, as timm's networks do."""
    spec = importlib.util.spec_from_file_location("zoo", DATA / "zoo.py")
    assert spec is not None
    assert spec.loader is not None
    zoo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)
    model, _, size = zoo.load(name)
    mean, std = zoo.REG[name][1]
    model.pretrained_cfg = {
        "input_size": (3, size, size),
        "mean": tuple(value / 255 for value in mean),
        "std": tuple(value / 255 for value in std),
    }
    return model


NAMES = {
    "cifar10_distiller": "cifar10_resnet20_distiller",
    "cifar10_akamaster": "cifar10_resnet20_akamaster",
    "cifar100_distiller": "cifar100_resnet20_distiller",
    "imagenet_efficientnet_lite0": "imagenet_tf_efficientnet_lite0",
    "imagenet_mobilenet_v1": "imagenet_mobilenet_v1_0.75",
    "imagenette_mobilenet_v2": "imagenette_mobilenet_v2",
}
globals().update({name: partial(_load, file) for name, file in NAMES.items()})
