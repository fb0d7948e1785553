"""The one exception a user is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
