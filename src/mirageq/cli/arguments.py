"""The arguments of each command."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import mirageq
from mirageq import methods, recipe

MODEL = "timm:NAME, torchvision:NAME, py:MODULE:CALLABLE, demo:efficientnet-lite0, or a .pt2 file"

Command = Callable[[argparse.Namespace], None]


def parser(run: Mapping[str, Command]) -> argparse.ArgumentParser:
    """A parser whose result has the chosen command's function as `command`; `run` maps names to functions."""
    whole = argparse.ArgumentParser(prog="mirageq", description="Quantize a vision network without its data.")
    whole.add_argument("--version", action="version", version=f"mirageq {mirageq.__version__}")
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    normalised = _normalised()
    network, making, labelled, measuring = _network(normalised), _making(), _labelled(), _measuring()
    for name, summary, parents, describe in (
        ("quantize", "synthesise, quantize, calibrate, tune", [network, making], _quantize),
        ("synthesize", "only make images", [network, making], _synthesize),
        ("evaluate", "top-1 and top-5 on labelled images", [network, labelled, measuring], _evaluate),
        ("compare", "methods x bits x seeds on one network, cell by cell", [network, labelled, measuring], _compare),
        (
            "export",
            "a run's student as an ONNX file of integers, proved in real runtimes",
            [normalised, labelled],
            _export,
        ),
        ("pack", "a run's images as a calibration pack for other tools", [normalised], _pack),
        ("methods", "the synthesis methods, their cards and settings", [], _name),
        ("tuners", "the tuners, their cards and settings", [], _name),
        ("scheme", "the settings of quantization", [], _nothing),
        ("recipes", "the shipped recipes, and every setting of one", [], _name),
        ("show", "a run's summary, contact sheet and loss curves; or the table of comparisons", [], _show),
    ):
        command = commands.add_parser(name, parents=parents, help=summary)
        describe(command)
        command.set_defaults(command=run[name], what=name)
    return whole


def _normalised() -> argparse.ArgumentParser:
    group = argparse.ArgumentParser(add_help=False)
    group.add_argument("--mean", type=_numbers(float), metavar="R,G,B", help="mean of pixels in [0, 1]")
    group.add_argument("--std", type=_numbers(float), metavar="R,G,B", help="standard deviation of pixels in [0, 1]")
    return group


def _network(normalised: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = argparse.ArgumentParser(add_help=False, parents=[normalised])
    group.add_argument("--checkpoint", type=Path, help="weights: safetensors, or a torch file of tensors")
    group.add_argument("--image-shape", type=_numbers(int), metavar="C,H,W", help="shape of one image")
    group.add_argument("--device", default="auto", help="cpu, cuda, or auto (default)")
    return group


def _making() -> argparse.ArgumentParser:
    group = argparse.ArgumentParser(add_help=False)
    group.add_argument("--recipe", help="a recipe file, or a shipped one: " + ", ".join(recipe.shipped()))
    group.add_argument("--method", help="one of " + ", ".join(methods.METHODS) + ", or package.module:Name")
    group.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, such as method.lr=0.1; repeatable"
    )
    group.add_argument("--seed", type=int, help="of everything random (default: 0)")
    group.add_argument("--out", type=Path, help="new folder of the run")
    group.add_argument("--resume", type=Path, metavar="RUN", help="continue an interrupted run")
    return group


def _labelled() -> argparse.ArgumentParser:
    group = argparse.ArgumentParser(add_help=False)
    group.add_argument(
        "--data", type=Path, help="labelled images: folder, CIFAR .npz or .bin, parquet of JPEG, or a calibration pack"
    )
    group.add_argument("--resize", type=_at_least(1), help="first scale the short side to this many pixels")
    return group


def _measuring() -> argparse.ArgumentParser:
    group = argparse.ArgumentParser(add_help=False)
    group.add_argument("--limit", type=_at_least(1), help="only the first so many images")
    return group


def _quantize(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", nargs="?", help=MODEL)
    command.add_argument("--bits", help="weights and activations, such as w4a4")
    command.add_argument(
        "--images", type=Path, metavar="RUN", help="use the images of another run (or a safetensors file)"
    )


def _synthesize(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", nargs="?", help=MODEL)
    command.add_argument("--count", type=_at_least(1), help="how many images")


def _evaluate(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help=f"a run's folder, or {MODEL}")


def _compare(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", nargs="?", help=MODEL)
    command.add_argument("--plan", type=Path, help="a TOML file: recipe, bits, seeds, [methods.LABEL] with settings")
    command.add_argument(
        "--methods",
        type=_words,
        metavar="A,B",
        help="some of the plan's, or any with their papers' settings (the recipe's own method keeps the recipe's)",
    )
    command.add_argument("--bits", type=_words, metavar="w4a4,...")
    command.add_argument("--seeds", type=_numbers(int), metavar="0,1,...")
    command.add_argument("--recipe", help="what the methods share: images, scheme and tuner")
    command.add_argument("--out", type=Path, help="folder of the comparison; finished cells in it are kept")
    command.add_argument(
        "--work", type=Path, help="where images, students and unfinished cells are kept (default: OUT/work)"
    )
    command.add_argument("--only", nargs="*", default=[], metavar="TEXT", help="cells whose label has all of these")
    command.add_argument("--jobs", type=_at_least(1), default=1, help="cells computed at a time, each in a process")


def _export(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", type=Path, help="a finished run")
    command.add_argument("--out", type=Path, required=True, help="the file to write, something.onnx")
    command.add_argument("--profile", default="ort", help="runtime it is for: ort (default), openvino, tensorrt")
    command.add_argument("--pack-weights", action="store_true", help="weights of 4 bits and below as INT4, for storage")
    command.add_argument(
        "--runtimes", type=_words, metavar="A,B", help="to run it in besides the profile's own: onnxruntime, openvino"
    )
    command.add_argument(
        "--images", type=_at_least(1), default=500, help="how many images prove it, at most (default: 500)"
    )
    command.add_argument("--threads", type=_at_least(0), default=0, help="of the runtime; 0 leaves the choice to it")


def _pack(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", type=Path, help="a finished run, of quantize or synthesize")
    command.add_argument("--out", type=Path, required=True, help="new folder of the pack")
    command.add_argument("--count", type=_at_least(1), help="only the first so many images")
    command.add_argument("--numpy", type=Path, metavar="FILE", help="also as one array, normalised, channels last")
    command.add_argument("--folder", type=Path, help="also as PNG images by class")


def _name(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", nargs="?", help="all that is known about this one; without it, a list")


def _nothing(command: argparse.ArgumentParser) -> None:
    pass


def _show(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", type=Path, nargs="+", help="a run, or comparisons under one protocol")


def _numbers(kind: type) -> Callable[[str], tuple]:
    def parse(text: str) -> tuple:
        try:
            return tuple(kind(part) for part in text.replace("x", ",").split(","))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"expected numbers separated by commas, got '{text}'") from error

    return parse


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number, {least} at least, got '{text}'")
        return int(text)

    return parse


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))
