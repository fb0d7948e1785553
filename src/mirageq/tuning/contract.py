"""What a tuner must offer."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from mirageq.images import ImageSource
from mirageq.journal import Journal
from mirageq.quant import Student
from mirageq.teacher import Teacher


@runtime_checkable
class Tuner(Protocol):
    """A frozen dataclass of settings that can make a calibrated student better."""

    def tune(
        self, teacher: Teacher, student: Student, source: ImageSource, *, seed: int = 0, journal: Journal | None = None
    ) -> None:
        """Change `student` in place, with randomness from `seed` alone."""
        ...
