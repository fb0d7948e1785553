"""What a synthesis method must offer."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Protocol, runtime_checkable

from mirageq.errors import UserError
from mirageq.images import ImageSource
from mirageq.journal import Journal
from mirageq.teacher import Teacher


@runtime_checkable
class Method(Protocol):
    """A frozen dataclass of settings that can make images.

    One whose source never ends, as a generator's, says so: `endless: ClassVar[bool] = True`.
    """

    def synthesize(self, teacher: Teacher, count: int, *, seed: int = 0, journal: Journal | None = None) -> ImageSource:
        """Make a source of `count` images from what the teacher remembers; randomness from `seed` alone."""
        ...


def check_method(method: object, what: str) -> None:
    """Raise a `UserError` unless this (a method, or the class of one) has the form of a `Method`."""
    if not callable(getattr(method, "synthesize", None)):
        raise UserError(f"{what} is not a method: it has no synthesize(teacher, count, *, seed, journal).")
    if not is_dataclass(method):
        raise UserError(f"{what} is not a method: make it a dataclass of settings, with frozen=True and kw_only=True.")


def set_size(method: Method, images: int) -> int | None:
    """How many images a method's set will have when `images` are asked for; None for a source that never ends."""
    return None if getattr(method, "endless", False) else images


def parts_of(method: Method) -> list[Method]:
    """The methods that a method is made of."""
    values = [getattr(method, each.name) for each in fields(method)]  # type: ignore[arg-type]
    return [value for value in values if isinstance(value, Method)]
