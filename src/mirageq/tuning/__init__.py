"""Tuners: what makes a calibrated student better on a source of synthetic images.

A tuner is a frozen dataclass of settings with `tune(teacher, student, source, *, seed, journal)`, changing the student
in place.
"""

from __future__ import annotations

from typing import Protocol

from mirageq.images import ImageSource
from mirageq.journal import Journal
from mirageq.quant import Student
from mirageq.teacher import Teacher
from mirageq.tuning.distill import Distill
from mirageq.tuning.guard import TuningDiverged
from mirageq.tuning.reconstruct import Reconstruct

__all__ = ["TUNERS", "Distill", "Reconstruct", "Tuner", "TuningDiverged"]

TUNERS: dict[str, type] = {"distill": Distill, "reconstruct": Reconstruct}


class Tuner(Protocol):
    """What a tuner must offer."""

    def tune(
        self, teacher: Teacher, student: Student, source: ImageSource, *, seed: int = 0, journal: Journal | None = None
    ) -> None: ...
