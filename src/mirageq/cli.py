"""The command line: parsing and printing, nothing else."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

import mirageq
from mirageq import methods, recipe
from mirageq.errors import UserError
from mirageq.run import IMAGES, RECORD, NetworkChoice, Run, check_folder, load_teacher
from mirageq.teacher import Teacher

INTERRUPTED = 130
SHOWN = 1000  # images looked through for the contact sheet

console = Console()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 2 a user's error, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except UserError as error:
        print(f"mirageq: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        out = getattr(options, "out", None)
        hint = f" Continue with: mirageq quantize --resume {out}" if out and (out / RECORD).exists() else ""
        print(f"\nmirageq: interrupted.{hint}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _quantize(options: argparse.Namespace, only_images: bool = False) -> None:
    if options.resume:
        run, teacher = _resume(options)
    else:
        run, teacher = _begin(options, only_images)
    kind, scheme = run.record["recipe"], run.recipe.scheme
    then = "" if only_images else f", {scheme.bits} ({scheme.placement}), {kind['tuner'].get('steps', 0)} steps"
    console.print(
        f"[bold]{escape(run.choice.name)}[/]: {kind['images']} images by {kind['method']['name']}{then}, "
        f"seed {run.seed}",
        highlight=False,
    )
    run.execute(teacher, console)
    _summary(run)


def _synthesize(options: argparse.Namespace) -> None:
    _quantize(options, only_images=True)


def _begin(options: argparse.Namespace, only_images: bool) -> tuple[Run, Teacher]:
    if not options.model or not options.out:
        raise UserError("A run needs a MODEL and --out FOLDER, or --resume FOLDER.")
    wanted = recipe.build(_recipe_table(options))
    check_folder(options.out)
    choice = _choice(options)
    teacher = load_teacher(choice, _device(options))
    return Run.create(options.out, choice, wanted, options.seed, teacher, only_images=only_images), teacher


def _resume(options: argparse.Namespace) -> tuple[Run, Teacher]:
    run = Run.open(options.resume)
    options.out = run.folder
    if run.finished:
        raise UserError(f"{run.folder} is finished already; see it with: mirageq show {run.folder}")
    return run, load_teacher(run.choice, _device(options))


def _evaluate(options: argparse.Namespace) -> None:
    from mirageq.data import open_images
    from mirageq.evaluate import Classifier, accuracy

    folder = Path(options.model)
    run = Run.open(folder) if folder.is_dir() else None
    choice = run.choice if run else _choice(options)
    teacher = load_teacher(choice, _device(options))
    data = open_images(options.data, teacher.image_shape, resize=options.resize, limit=options.limit)
    networks: dict[str, Classifier] = {"full precision": teacher}
    if run:
        networks[f"{run.recipe.scheme.bits} {run.record['recipe']['method']['name']}"] = run.student(teacher)
    mean, std = options.mean or teacher.mean, options.std or teacher.std
    for name, network in networks.items():
        print(f"{name:>20}: {accuracy(network, data, mean, std, device=str(teacher.device))}")


def _methods(options: argparse.Namespace) -> None:
    if options.name:
        method = methods.find(options.name)
        print(methods.card(method))
        print("\nSettings (method.NAME=VALUE):")
        for line in recipe.setting_lines(method):
            print(f"  {line}")
        return
    grid = Grid("method", "idea", box=None, pad_edge=False)
    for name, method in methods.METHODS.items():
        grid.add_row(name, methods.card(method).splitlines()[0].partition(": ")[2])
    console.print(grid)
    console.print("\nThe whole card and the settings of one: mirageq methods NAME", highlight=False)


def _show(options: argparse.Namespace) -> None:
    from mirageq.report import contact_sheet, loss_curves

    run = Run.open(options.run)
    _summary(run)
    network = run.choice.load()
    sheet, curves = run.folder / "images.png", run.folder / "curves.png"
    contact_sheet(run.images().sample(SHOWN), sheet, mean=network.mean, std=network.std)
    loss_curves(run.folder / "history.jsonl", curves)
    print(f"wrote {sheet}\nwrote {curves}")


def _summary(run: Run) -> None:
    record = run.record
    grid = Grid(box=None, show_header=False, pad_edge=False)
    grid.add_row("network", record["network"]["name"])
    grid.add_row(
        "recipe", f"{record['recipe']['method']['name']} {run.recipe.scheme.bits} {run.recipe.scheme.placement}"
    )
    if run.finished:
        if student := record.get("student"):
            grid.add_row(
                "size", f"{student['total_bytes'] / 1e6:.2f} MB, full precision {student['fp32_bytes'] / 1e6:.2f} MB"
            )
        grid.add_row("time", ", ".join(f"{name} {value:.0f} s" for name, value in record["seconds"].items()))
        grid.add_row("memory", f"{record['peak_memory_bytes'] / 2**30:.2f} GiB at most")
    grid.add_row("status", record["status"])
    grid.add_row("folder", str(run.folder))
    console.print(grid, highlight=False)


def _recipe_table(options: argparse.Namespace) -> recipe.Table:
    table = recipe.read(options.recipe) if options.recipe else {}
    if options.method:
        named = table.get("method", {}).get("name") == options.method
        table["method"] = table["method"] if named else {"name": options.method}
    if isinstance(stored := getattr(options, "images", None), Path):
        file = stored / IMAGES if stored.is_dir() else stored
        table["method"] = {"name": "mirageq.methods.stored:Stored", "path": str(file)}
    if getattr(options, "count", None):
        table["images"] = options.count
    if getattr(options, "bits", None):
        table = recipe.set_bits(table, options.bits)
    return recipe.assign(table, options.set)


def _choice(options: argparse.Namespace) -> NetworkChoice:
    return NetworkChoice(
        name=options.model,
        checkpoint=str(options.checkpoint) if options.checkpoint else None,
        image_shape=options.image_shape,
        mean=options.mean,
        std=options.std,
    )


def _device(options: argparse.Namespace) -> str:
    if options.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("There is no CUDA device for --device cuda; use --device cpu.")
    return options.device


def _numbers(kind: type):
    def parse(text: str) -> tuple:
        try:
            return tuple(kind(part) for part in text.replace("x", ",").split(","))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"expected numbers separated by commas, got '{text}'") from error

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mirageq", description="Quantize a vision network without its data.")
    parser.add_argument("--version", action="version", version=f"mirageq {mirageq.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    network = argparse.ArgumentParser(add_help=False)
    network.add_argument("--checkpoint", type=Path, help="weights: safetensors, or a torch file of tensors")
    network.add_argument("--image-shape", type=_numbers(int), metavar="C,H,W", help="shape of one image")
    network.add_argument("--mean", type=_numbers(float), metavar="R,G,B", help="mean of pixels in [0, 1]")
    network.add_argument("--std", type=_numbers(float), metavar="R,G,B", help="standard deviation of pixels in [0, 1]")
    network.add_argument("--device", default="auto", help="cpu, cuda, or auto (default)")

    making = argparse.ArgumentParser(add_help=False)
    making.add_argument("--recipe", help="a recipe file, or a shipped one: " + ", ".join(recipe.shipped()))
    making.add_argument("--method", help="one of " + ", ".join(methods.METHODS) + ", or package.module:Name")
    making.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, such as method.lr=0.1; repeatable"
    )
    making.add_argument("--seed", type=int, default=0)

    model = "timm:NAME, torchvision:NAME, py:MODULE:CALLABLE, demo:efficientnet-lite0, or a .pt2 file"
    making.add_argument("--out", type=Path, help="new folder of the run")
    making.add_argument("--resume", type=Path, metavar="RUN", help="continue an interrupted run")

    command = commands.add_parser("quantize", parents=[network, making], help="synthesise, quantize, calibrate, tune")
    command.add_argument("model", nargs="?", help=model)
    command.add_argument("--bits", help="weights and activations, such as w4a4")
    command.add_argument(
        "--images", type=Path, metavar="RUN", help="use the images of another run (or a safetensors file)"
    )
    command.set_defaults(command=_quantize)

    command = commands.add_parser("synthesize", parents=[network, making], help="only make images")
    command.add_argument("model", nargs="?", help=model)
    command.add_argument("--count", type=int, help="how many images")
    command.set_defaults(command=_synthesize)

    command = commands.add_parser("evaluate", parents=[network], help="top-1 and top-5 on labelled images")
    command.add_argument("model", help=f"a run's folder, or {model}")
    command.add_argument(
        "--data", type=Path, required=True, help="image folder, CIFAR .npz or .bin, or parquet of JPEG"
    )
    command.add_argument("--resize", type=int, help="first scale the short side to this many pixels")
    command.add_argument("--limit", type=int, help="only the first so many images")
    command.set_defaults(command=_evaluate)

    command = commands.add_parser("methods", help="the synthesis methods and their cards")
    command.add_argument("name", nargs="?")
    command.set_defaults(command=_methods)

    command = commands.add_parser("show", help="a run's summary, contact sheet and loss curves")
    command.add_argument("run", type=Path)
    command.set_defaults(command=_show)
    return parser
