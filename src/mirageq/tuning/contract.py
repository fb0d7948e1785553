"""What a tuner must offer."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from mirageq.errors import UserError
from mirageq.images import ImageSource
from mirageq.journal import Journal
from mirageq.quant import Student
from mirageq.teacher import Teacher

CHECKPOINTS = ("tune", "reconstruct")
"""Where tuners keep how far they are. What is finished stays there, until whoever asked for it has put it away."""


def forget(journal: Journal) -> None:
    """Drop the checkpoints of tuning that is finished."""
    for name in CHECKPOINTS:
        journal.checkpoint(name).clear()


@runtime_checkable
class Tuner(Protocol):
    """A frozen dataclass of settings that can make a calibrated student better."""

    def tune(
        self, teacher: Teacher, student: Student, source: ImageSource, *, seed: int = 0, journal: Journal | None = None
    ) -> None:
        """Change `student` in place, with randomness from `seed` alone."""
        ...


def check(tuner: Tuner, student: Student, images: int | None) -> None:
    """Ask a tuner, and what follows it, whether it can tune this student on so many images, before any is made.

    None stands for a source that never ends. A tuner may have `check(student, images)`, which raises a `UserError` that
    says why not.
    """
    if refuse := getattr(tuner, "check", None):
        refuse(student, images)
    if then := getattr(tuner, "then", None):
        check(then, student, images)


def require_fixed_grids(student: Student, what: str) -> None:
    """Raise a `UserError` if a weight's grid follows the weight: `what` chooses codes on a grid that stays."""
    for name, quantizer in student.weight_quantizers.items():
        if not quantizer.fixed:
            raise UserError(
                f"{what} rounds weights on a grid that stays, and that of '{name}' follows its weight. "
                "Set scheme.weight_range to mse or percentile."
            )
