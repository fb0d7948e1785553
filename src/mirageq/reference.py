"""What a user can look up: methods, tuners and recipes by name, and what each setting means, from the docstrings."""

from __future__ import annotations

import importlib
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from docstring_parser import DocstringStyle, parse

from mirageq.recipe import Table

INDENT, WIDTH = "    ", 110


def card(kind: type) -> str:
    """The card of a method or tuner: the opening text of its file."""
    return (importlib.import_module(kind.__module__).__doc__ or "").strip()


def ideas(kinds: Mapping[str, type]) -> dict[str, str]:
    """Name -> the first sentence of its card, without its own name."""
    return {name: card(kind).splitlines()[0].partition(": ")[2] for name, kind in kinds.items()}


def meanings(kind: type) -> dict[str, str]:
    """Setting -> what it means: the attributes in the docstrings of the class and of those it inherits from."""
    found: dict[str, str] = {}
    for level in reversed(kind.__mro__):
        for entry in parse(vars(level).get("__doc__") or "", DocstringStyle.GOOGLE).params:
            text = " ".join((entry.description or "").split())
            found |= {name.strip(): text for name in entry.arg_name.split(",")}
    return {name: found.get(name, "") for name in inspect.signature(kind).parameters}


def setting_lines(kind: type) -> Iterator[str]:
    """For each setting of a method, tuner or scheme: name, type and default, and below what it means."""
    types = get_type_hints(kind)
    for name, parameter in inspect.signature(kind).parameters.items():
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        yield f"{name}: {_in_words(types[name])}{default}"
        yield from textwrap.wrap(meanings(kind)[name], WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)


def opening(recipe: Path) -> str:
    """The comment that a recipe file begins with."""
    lines = []
    for line in recipe.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return " ".join(lines)


def value_lines(table: Table, section: str = "") -> Iterator[str]:
    """`section.key=value` for each value of a recipe, as `--set` takes it."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from value_lines(value, f"{section}{key}.")
        else:
            yield f"{section}{key}={_text(value)}"


def _in_words(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind)) if isinstance(kind, type) else str(kind).replace("typing.", "")


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
