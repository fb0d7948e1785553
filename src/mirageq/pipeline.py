"""The main job in reading order: synthesise, convert, calibrate, tune."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.export import ExportedProgram

from mirageq.errors import UserError
from mirageq.graph import device_of
from mirageq.images import ImageSource
from mirageq.journal import Journal
from mirageq.methods import Method
from mirageq.methods.contract import check_method, parts_of, set_size
from mirageq.quant import Scheme, Student, convert
from mirageq.recipe import Recipe
from mirageq.teacher import Teacher
from mirageq.tuning import Distill, Tuner
from mirageq.tuning.contract import check, forget

CALIBRATION_BATCH = 64


@dataclass(frozen=True)
class Result:
    """What `quantize` hands back.

    Attributes:
        teacher: the full-precision network.
        student: the quantized network, calibrated and tuned.
        source: the synthetic images.
        seconds: wall-clock seconds of each stage.
    """

    teacher: Teacher
    student: Student
    source: ImageSource
    seconds: dict[str, float] = field(default_factory=dict)


@torch.inference_mode(False)  # whatever the caller computes in: tuning needs gradients
def quantize(
    model: nn.Module | ExportedProgram | Teacher,
    method: Method,
    *,
    image_shape: tuple[int, int, int] | None = None,
    scheme: Scheme | None = None,
    tuner: Tuner | None = None,
    images: int = 1024,
    calibration_images: int = 256,
    seed: int = 0,
    device: str | None = None,
    journal: Journal | None = None,
) -> Result:
    """Quantize a classifier without its data.

    Args:
        model: maps normalised images (N, C, H, W) to logits; never modified.
        method: makes the images, e.g. `IntraQ()`.
        image_shape: (C, H, W); not needed when `model` is a `Teacher`.
        scheme: bits, placement and ranges; `Scheme()` is W4A4 as in the papers.
        tuner: how the student learns; `Distill()` by default, `Distill(steps=0)` only calibrates.
        images: how many images to make.
        calibration_images: how many of them set the activation ranges.
        seed: of everything random.
        device: where to compute, the CPU by default; a `Teacher` has its own.
        journal: history, progress bars and checkpoints; silent and in memory by default. A folder belongs to one call:
            images that are finished in it are read, whatever they were made by.

    Raises:
        UserError: anything wrong with the arguments, in one sentence.

    Example:
        >>> from mirageq import Distill, IntraQ, Scheme, quantize
        >>> result = quantize(model, IntraQ(iterations=200), image_shape=(3, 32, 32),
        ...                   scheme=Scheme(weight_bits=4, activation_bits=4), tuner=Distill(steps=500))
        >>> logits = result.student(batch)
    """
    journal = journal or Journal()
    if isinstance(model, Teacher):
        teacher = model
        if device is not None and not _same(torch.device(device), teacher.device):
            raise UserError(f"The teacher is on {teacher.device}; wrap it with device={device} instead.")
    elif image_shape is None:
        raise UserError("Give image_shape=(channels, height, width), the shape the network was trained with.")
    else:
        teacher = Teacher.wrap(model, image_shape, device=device or "cpu")
    recipe = Recipe(
        method=method,
        scheme=scheme or Scheme(),
        tuner=tuner or Distill(),
        images=images,
        calibration_images=calibration_images,
    )
    result = carry_out(teacher, recipe, seed=seed, journal=journal)
    forget(journal)
    return result


def carry_out(teacher: Teacher, recipe: Recipe, *, seed: int, journal: Journal) -> Result:
    """As `quantize`, but the journal keeps the finished student as well, until `tuning.contract.forget` is called."""
    with journal.timed("convert"):  # first, so that a scheme that does not fit is refused before any image is made
        student = untuned(teacher, recipe)
    with journal.timed("synthesize"):
        source = recipe.method.synthesize(teacher, recipe.images, seed=seed, journal=journal)
    teach(teacher, student, source, recipe, seed=seed, journal=journal)
    return Result(teacher, student, source, journal.seconds)


def untuned(teacher: Teacher, recipe: Recipe) -> Student:
    """The student before calibration; raises a `UserError` if a part of the recipe does not fit the network."""
    check_method(recipe.method, repr(recipe.method))
    check_pixel_range(teacher, recipe.method)
    student = convert(teacher.network, recipe.scheme).to(teacher.device)
    check(recipe.tuner, student, set_size(recipe.method, recipe.images))
    return student


def _same(wanted: torch.device, own: torch.device) -> bool:
    return wanted.type == own.type and wanted.index in (None, own.index)


def check_pixel_range(teacher: Teacher, method: Method) -> None:
    """Raise a `UserError` if the method, or a part of it, keeps images in the pixels' range and that is unknown."""
    if getattr(method, "clamp", False):
        teacher.pixel_range()
    for part in parts_of(method):
        check_pixel_range(teacher, part)


def teach(
    teacher: Teacher, student: Student, source: ImageSource, recipe: Recipe, *, seed: int, journal: Journal
) -> None:
    """Calibrate and tune a converted student in place on images that exist; the journal keeps the seconds of each.

    It also keeps the finished student, until `tuning.contract.forget` is called.
    """
    with journal.timed("calibrate"):
        calibrate(student, source, recipe.calibration_images)
    with journal.timed("tune"):
        recipe.tuner.tune(teacher, student, source, seed=seed, journal=journal)


def calibrate(student: Student, source: ImageSource, images: int) -> None:
    """Set the student's activation ranges on `images` images of the source."""
    device = device_of(student)
    student.calibrate(chunk.to(device) for chunk in source.sample(images).images.split(CALIBRATION_BATCH))
