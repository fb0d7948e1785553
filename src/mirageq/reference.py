"""What a user can look up: methods, tuners and recipes by name, and what each setting means, from the docstrings."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from docstring_parser import DocstringStyle, parse
from rich.console import Console
from rich.table import Table as Grid

from mirageq import methods
from mirageq.quant import Scheme
from mirageq.recipe import Table, build, describe, find_tuner, in_words, read, shipped
from mirageq.tuning import TUNERS

INDENT, WIDTH = "    ", 110


def show(what: str, name: str | None, console: Console) -> None:
    """Print a list of all "methods", "tuners" or "recipes", or all about the one called `name`; or the "scheme".

    Raises:
        UserError: there is none of that name.
    """
    if what == "scheme":
        _show_settings(Scheme, "scheme", "What is quantized, to how many bits, and how the ranges are found.")
    elif what == "recipes" and name:
        _show_recipe(name)
    elif what == "recipes":
        _list(what, {each: opening(path) for each, path in shipped().items()}, console)
    elif name:
        kind = methods.find(name) if what == "methods" else find_tuner(name)
        _show_settings(kind, what.removesuffix("s"), card(kind))
    else:
        _list(what, ideas(methods.METHODS if what == "methods" else TUNERS), console)


def _show_recipe(name: str) -> None:
    table = describe(build(read(name)))
    print(opening(shipped().get(name, Path(name))))
    print("\nEvery setting (--set KEY=VALUE changes one):")
    for line in value_lines(table):
        print(f"  {line}")


def _show_settings(kind: type, section: str, text: str) -> None:
    print(text)
    print(f"\nSettings ({section}.NAME=VALUE):")
    for line in setting_lines(kind):
        print(f"  {line}")


def _list(what: str, ideas: Mapping[str, str], console: Console) -> None:
    grid = Grid(what.removesuffix("s"), "idea", box=None, pad_edge=False)
    for name, idea in ideas.items():
        grid.add_row(name, idea)
    console.print(grid)
    console.print(f"\nEvery setting of one: mirageq {what} NAME", highlight=False)


def card(kind: type) -> str:
    """The card of a method or tuner: the opening text of its file."""
    return (sys.modules[kind.__module__].__doc__ or "").strip()


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
        yield f"{name}: {in_words(types[name])}{default}"
        yield from textwrap.wrap(meanings(kind)[name], WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)


def opening(recipe: Path) -> str:
    """The comment that a recipe file begins with."""
    lines = []
    for line in recipe.read_text("utf-8").splitlines():
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


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
