"""What a synthesis method must offer."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from mirageq.images import ImageSource
from mirageq.journal import Journal
from mirageq.teacher import Teacher


@runtime_checkable
class Method(Protocol):
    """A frozen dataclass of settings that can make images."""

    def synthesize(self, teacher: Teacher, count: int, *, seed: int = 0, journal: Journal | None = None) -> ImageSource:
        """Make a source of `count` images from what the teacher remembers; randomness from `seed` alone."""
        ...
