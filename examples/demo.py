"""The main job on a real ImageNet network: quantize EfficientNet-Lite0 without data, from the package registry alone.

Four models are compared on images that none of them was made from, painted with another seed: 8 bits without any image,
the recipe as it is, the same model before tuning, and the same recipe fed with noise. The figure is agreement with the
full-precision network.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mirageq import Journal, Noise, Recipe, agreement, quantize, recipe
from mirageq.models import NetworkChoice, load_teacher
from mirageq.pipeline import calibrate
from mirageq.process import keep_freed_memory
from mirageq.quant import convert
from mirageq.report import contact_sheet, loss_curves
from mirageq.run import Run

HELD_OUT, HELD_OUT_SEED = 32, 1


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

    console.print("\n[bold]3. The same without tuning, with noise instead of images, and 8 bits without any image[/]")
    untuned = convert(teacher.network, wanted.scheme)
    calibrate(untuned, run.images(), wanted.calibration_images)
    noise = quantize(teacher, **vars(replace(wanted, method=Noise())), journal=journal).student
    squant = recipe.build(recipe.set_bits(recipe.read("squant"), "w8a8"))
    imageless = quantize(teacher, **vars(squant)).student

    table = Table(title=f"agreement with full precision on {HELD_OUT} held-out synthetic images", title_justify="left")
    for column in ("model", "bits", "parameters", "agreement"):
        table.add_column(column, justify="left" if column == "model" else "right")
    table.add_row("full precision", "w32a32", f"{result.student.size().fp32_bytes / 1e6:.1f} MB", "100.0 %")
    students = {
        "no images, SQuant": (squant.scheme.bits, imageless),
        "IntraQ, tuned": (bits, result.student),
        "IntraQ, not tuned": (bits, untuned),
        "noise, tuned": (bits, noise),
    }
    shares = {name: agreement(student, teacher, held_out) for name, (_, student) in students.items()}
    for name, (width, student) in students.items():
        table.add_row(name, width, f"{student.size().total_bytes / 1e6:.1f} MB", f"{shares[name]:.1f} %")
    console.print()
    console.print(table)

    contact_sheet(run.images().sample(1000), out / "images.png", mean=teacher.mean, std=teacher.std)
    loss_curves(out, out / "curves.png")
    console.print(
        "\nFour bits take more images and updates than a demo has: README.md says what the other recipes reach on real "
        "images, and how long they take."
    )
    console.print(
        f"\nThe run is in {out}: images.png shows the images, curves.png the losses, run.json tells everything."
    )
    return shares


if __name__ == "__main__":
    main()
