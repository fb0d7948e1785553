"""The main job on a real ImageNet network: quantize EfficientNet-Lite0 without data, from the package registry alone.

Models are compared on images that none of them was made from, painted with another seed: the recipe as it is, before
its tuning, fed with noise, and without any image. The figure is agreement with the full-precision network. Then the
model is written as a file of integers and proved in ONNX Runtime.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from mirageq import Journal, Noise, Recipe, Student, Teacher, agreement, quantize, recipe
from mirageq.export import deliver
from mirageq.models import NetworkChoice, load_teacher
from mirageq.pipeline import calibrate
from mirageq.process import keep_freed_memory
from mirageq.quant import convert
from mirageq.report import contact_sheet, loss_curves
from mirageq.run import Run
from mirageq.tables import describe

HELD_OUT, HELD_OUT_SEED = 64, 1


def free_folder(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, ... that does not exist yet."""
    names = itertools.chain([wanted.name], (f"{wanted.name}-{number}" for number in itertools.count(2)))
    return next(path for name in names if not (path := wanted.with_name(name)).exists())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    out = free_folder(parser.parse_args().out)
    keep_freed_memory()
    compare(NetworkChoice(name="demo:efficientnet-lite0"), recipe.build(recipe.read("demo")), out, Console())


def compare(choice: NetworkChoice, wanted: Recipe, out: Path, console: Console) -> dict[str, float]:
    """Run the recipe and what it is compared with; print the table and return its agreements in percent."""
    teacher = load_teacher(choice)
    bits = wanted.scheme.bits
    console.print(f"\n[bold]1. The recipe[/] on {choice.name}: {wanted.images} images, {bits}, into {out}")
    run = Run.create(out, choice, wanted, seed=0, teacher=teacher)
    result = run.execute(teacher, console)
    assert result is not None

    console.print(f"\n[bold]2. {HELD_OUT} held-out images[/], painted with another seed")
    journal = Journal(console=console)
    held_out = wanted.method.synthesize(teacher, HELD_OUT, seed=HELD_OUT_SEED, journal=journal).sample(HELD_OUT).images

    console.print("\n[bold]3. The same before tuning, with noise in place of images, and without any image[/]")
    untuned = convert(teacher.network, wanted.scheme)
    calibrate(untuned, run.images(), wanted.calibration_images)
    noise = quantize(
        teacher, **vars(replace(wanted, method=Noise(image_size=held_out.shape[-1]))), journal=journal
    ).student
    students = {
        "painted images, tuned": (bits, result.student),
        "painted images, not tuned": (bits, untuned),
        "noise, tuned": (bits, noise),
        "no images": (bits, without_images(teacher, bits)),
        "8 bits, no images": ("w8a8", without_images(teacher, "w8a8")),
    }
    table = Table(title=f"agreement with full precision on {HELD_OUT} held-out synthetic images", title_justify="left")
    for column in ("model", "bits", "parameters", "agreement"):
        table.add_column(column, justify="left" if column == "model" else "right")
    table.add_row("full precision", "w32a32", f"{result.student.size().fp32_bytes / 1e6:.1f} MB", "100.0 %")
    shares = {name: agreement(student, teacher, held_out) for name, (_, student) in students.items()}
    for name, (width, student) in students.items():
        table.add_row(name, width, f"{student.size().total_bytes / 1e6:.1f} MB", f"{shares[name]:.1f} %")
    console.print()
    console.print(table)
    console.print(
        "Painted images are harder than photographs, and a demo has few of them and few updates: README.md says what "
        "the recipes reach on real images, and how long they take."
    )

    console.print("\n[bold]4. The file[/], run in ONNX Runtime on the held-out images")
    images = F.interpolate(held_out, teacher.image_shape[1:])
    for line in describe(deliver(result.student, teacher, images, out / "model.onnx", runtimes=[])):
        console.print(line, highlight=False, markup=False)

    contact_sheet(run.images().sample(1000), out / "images.png", mean=teacher.mean, std=teacher.std)
    loss_curves(out, out / "curves.png")
    console.print(
        f"\nThe run is in {out}: images.png shows the images, curves.png the losses, run.json tells everything."
    )
    return shares


def without_images(teacher: Teacher, bits: str) -> Student:
    """The recipe squant: ranges from what the norms remember, weights rounded without training."""
    return quantize(teacher, **vars(recipe.build(recipe.set_bits(recipe.read("squant"), bits)))).student


if __name__ == "__main__":
    main()
