"""The one exception a user is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal, get_args, get_origin, get_type_hints


class UserError(Exception):
    """Something the user can mend: the message says what is wrong, what was got, and what to do.

    The command line prints the message alone and exits with code 2.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint to append to an error about an unknown `word`.

    >>> did_you_mean("itnraq", ["intraq", "zeroq"])
    "did you mean 'intraq'? Known: intraq, zeroq"
    """
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    guess = f"did you mean '{near[0]}'? " if near else ""
    return f"{guess}Known: {', '.join(known)}"


def check_choices(settings: object) -> None:
    """Raise a `UserError` if a field of a settings dataclass typed as a `Literal` holds none of its options."""
    for name, hint in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise UserError(f"Unknown {name} {value!r}; {did_you_mean(str(value), get_args(hint))}.")


def check_positive(settings: object, *names: str) -> None:
    """Raise a `UserError` for the first of these settings that is not above zero."""
    for name in names:
        if getattr(settings, name) <= 0:
            raise UserError(f"{name} must be positive; got {getattr(settings, name)}.")


def check_not_negative(settings: object, *names: str) -> None:
    """Raise a `UserError` for the first of these settings that is below zero."""
    for name in names:
        if getattr(settings, name) < 0:
            raise UserError(f"{name} must not be negative; got {getattr(settings, name)}.")


def check_fraction(settings: object, *names: str) -> None:
    """Raise a `UserError` for the first of these settings that lies outside [0, 1]."""
    for name in names:
        if not 0 <= getattr(settings, name) <= 1:
            raise UserError(f"{name} lies in [0, 1]; got {getattr(settings, name)}.")


def check_crop_scale(scale: float) -> None:
    """Raise a `UserError` unless this can be the smallest area of a crop, as a fraction of the image's."""
    if not 0 < scale <= 1:
        raise UserError(f"crop_scale is a fraction of the image's area in (0, 1]; got {scale}.")


def check_image_size(size: int | None) -> None:
    """Raise a `UserError` unless images can have this many pixels a side; None stands for the network's own size."""
    if size is not None and size < 1:
        raise UserError(f"image_size is a number of pixels; got {size}.")


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without its full stop; its name if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
