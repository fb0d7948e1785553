"""What the options of a command ask for, as the library's own objects."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from mirageq import recipe
from mirageq.errors import UserError
from mirageq.models import NetworkChoice
from mirageq.run import Run


def recipe_table(options: argparse.Namespace) -> recipe.Table:
    table = recipe.read(options.recipe) if options.recipe else {}
    if options.method:
        named = recipe.section(table, "method").get("name", recipe.UNNAMED["method"]) == options.method
        table["method"] = (recipe.section(table, "method") if named else {}) | {"name": options.method}
    if isinstance(stored := getattr(options, "images", None), Path):
        refuse(options, "--images takes the images of a run", "method")
        file = Run.open(stored).images_file() if stored.is_dir() else stored
        table["method"] = {"name": "mirageq.methods.stored:Stored", "path": str(file.absolute())}
    if getattr(options, "count", None):
        table["images"] = options.count
    if getattr(options, "bits", None) is not None:
        table = recipe.set_bits(table, options.bits)
    return recipe.assign(table, options.set)


def network_choice(options: argparse.Namespace) -> NetworkChoice:
    return NetworkChoice(
        name=options.model,
        checkpoint=str(options.checkpoint) if options.checkpoint else None,
        image_shape=options.image_shape,
        mean=options.mean,
        std=options.std,
    )


def normalised(run: Run, options: argparse.Namespace) -> NetworkChoice:
    """The run's network, with the normalisation of the command line if there is one."""
    return replace(run.choice, mean=options.mean or run.choice.mean, std=options.std or run.choice.std)


def refuse(options: argparse.Namespace, why: str, *names: str) -> None:
    """Raise a `UserError` if one of these options was given, which could not count."""
    given = [name for name in names if getattr(options, name, None) not in (None, [])]
    if given:
        told = ", ".join("MODEL" if name == "model" else f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"{why}; leave out {told}.")


def device_name(options: argparse.Namespace) -> str:
    if options.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, colon, number = options.device.partition(":")
    if kind not in ("cpu", "cuda") or (colon and not number.isdecimal()):
        raise UserError(f"There is no device '{options.device}'; give cpu, cuda, cuda:1 and so on, or auto.")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise UserError(f"There is no CUDA device for --device {options.device}; use --device cpu.")
    return options.device
