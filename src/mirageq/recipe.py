"""Recipes: synthesizer + scheme + tuner, as a table of plain values that a TOML file can hold."""

from __future__ import annotations

import copy
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser

from mirageq import methods
from mirageq.errors import UserError, check_positive, did_you_mean, first_line
from mirageq.methods import Method
from mirageq.modules import source_of
from mirageq.quant import Scheme, parse_bits
from mirageq.tuning import TUNERS, Distill, Tuner

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Table = dict[str, Any]

SECTIONS = ("method", "scheme", "tuner")
UNNAMED = {"method": "intraq", "tuner": "distill"}
"""What a section without a `name` is; one within a method or tuner is what that has there by itself, if anything."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a quantized model besides the network and the seed: `quantize(model, **vars(recipe))`."""

    method: Method
    scheme: Scheme = field(default_factory=Scheme)
    tuner: Tuner = field(default_factory=Distill)
    images: int = 1024
    calibration_images: int = 256

    def __post_init__(self) -> None:
        check_positive(self, "images", "calibration_images")


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(files("mirageq") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read(name: str, above: tuple[str, ...] = ()) -> Table:
    """The table of a recipe file, or of a shipped recipe, laid over that of the recipe it names as its `base`, if any.

    A base is a shipped recipe, or a file: its path begins at the folder of the file that names it.

    Raises:
        UserError: no such recipe, not TOML, or bases that lead in a circle.
    """
    if name in above:
        raise UserError(f"The recipe '{name}' is its own base: {' -> '.join((*above, name))}.")
    known = shipped()
    path = known.get(name) or Path(name)
    if not path.is_file():
        raise UserError(
            f"There is no recipe '{name}': neither a file nor a shipped recipe; {did_you_mean(name, known)}."
        )
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a TOML file: {error}.") from error
    base = table.pop("base", None)
    if base is None:
        return table
    if not isinstance(base, str):
        raise UserError(f"base names another recipe, as text; got {base!r} in {path}.")
    beside = path.parent / base
    return laid_over(read(str(beside) if base not in known and beside.is_file() else base, (*above, name)), table)


def laid_over(base: Table, own: Table, default: str | None = None) -> Table:
    """What `own` says, and what `base` says where `own` does not; a method or tuner of another name takes nothing over.

    A section that `own` sets to `false` is left out; `default` is the name of a table that has none.

    >>> laid_over({"images": 8, "method": {"name": "zeroq", "lr": 0.1}}, {"method": {"lr": 0.2}})
    {'images': 8, 'method': {'name': 'zeroq', 'lr': 0.2}}
    >>> laid_over({"method": {"name": "zeroq", "lr": 0.1}}, {"method": {"name": "noise"}})
    {'method': {'name': 'noise'}}
    >>> laid_over({"name": "union", "third": {"name": "genie"}}, {"third": False})
    {'name': 'union'}
    """
    if own.get("name", base.get("name", default)) != base.get("name", default):
        return own
    result = {**base, **own}
    for name, part in base.items():
        given = own.get(name)
        if isinstance(part, dict) and isinstance(given, dict):
            result[name] = laid_over(part, given, UNNAMED.get(name))
        elif isinstance(part, dict) and given is False:
            del result[name]
    return result


def assign(table: Table, assignments: Sequence[str]) -> Table:
    """A copy of the table with `section.key=value` texts put in; values are typed when the recipe is built.

    >>> assign({"images": 64}, ["images=128", "method.lr=0.1"])
    {'images': '128', 'method': {'lr': '0.1'}}
    """
    result = copy.deepcopy(table)
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UserError(f"A setting is given as key=value; got '{assignment}'.")
        *sections, name = key.strip().split(".")
        if sections and sections[0] not in SECTIONS:
            raise UserError(f"There is no section '{sections[0]}' in a recipe; {did_you_mean(sections[0], SECTIONS)}.")
        place = result
        for inner in sections:
            place = place.setdefault(inner, {})
            if not isinstance(place, dict):
                raise UserError(f"'{inner}' is a single value and has no '{name}'; got '{assignment}'.")
        place[name] = value.strip()
    return result


def set_bits(table: Table, bits: str) -> Table:
    """A copy of the table with the scheme's bits set from a text such as 'w4a4'."""
    weight_bits, activation_bits = parse_bits(bits)
    scheme = {**section(table, "scheme"), "weight_bits": weight_bits, "activation_bits": activation_bits}
    return {**table, "scheme": scheme}


def build(table: Table) -> Recipe:
    """The recipe that a table describes.

    Raises:
        UserError: an unknown section, method, tuner or setting (with the nearest known one), or a wrong type.
    """
    rest = dict(table)
    parts = {
        "method": _assemble(section(rest, "method"), "method", methods.find, methods.find(UNNAMED["method"])),
        "scheme": settings(Scheme, section(rest, "scheme"), "scheme"),
        "tuner": _assemble(section(rest, "tuner"), "tuner", find_tuner, find_tuner(UNNAMED["tuner"])),
    }
    for name in SECTIONS:
        rest.pop(name, None)
    check_names(_Counts, rest, "the recipe", besides=SECTIONS)
    plain = settings(_Counts, rest, "the recipe")
    return Recipe(**parts, images=plain.images, calibration_images=plain.calibration_images)


def describe(recipe: Recipe) -> Table:
    """The full table of a recipe, every default written out; `build(describe(recipe)) == recipe`."""
    return {
        "images": recipe.images,
        "calibration_images": recipe.calibration_images,
        "method": describe_part(recipe.method),
        "scheme": _values(recipe.scheme),
        "tuner": describe_part(recipe.tuner),
    }


def describe_part(part: Method | Tuner) -> Table:
    """The full table of a method or tuner, and of those it is made of."""
    registry = TUNERS if isinstance(part, Tuner) else methods.METHODS
    values = {each.name: getattr(part, each.name) for each in fields(part)}  # type: ignore[arg-type]
    inner = {name: describe_part(value) for name, value in values.items() if isinstance(value, (Method, Tuner))}
    return {"name": _name(registry, part), **_values(part), **inner}


def _assemble(table: Table, where: str, find: Callable[[str], type], unnamed: type) -> Any:
    """The method or tuner that a table describes: `name`, settings, and sections for those it is made of, if any.

    Without a name it is an `unnamed`, or what the method that it is a part of has there by itself.
    """
    plain = {key: value for key, value in table.items() if not isinstance(value, dict)}
    name = plain.pop("name", None)
    if not isinstance(name, str | None):
        raise UserError(f"{where}: 'name' is a text; got {name!r}.")
    kind = unnamed if name is None else find(name)
    parts = {key: value for key, value in table.items() if isinstance(value, dict)}
    check_names(kind, parts, where)
    defaults = {each.name: own for each in fields(kind) if inspect.isclass(own := each.default_factory)}
    inner = {
        each: _assemble(part, f"{where}.{each}", find, defaults.get(each, unnamed)) for each, part in parts.items()
    }
    return replace(settings(kind, plain, where), **inner)


def check_names(kind: type, values: Table, where: str, besides: Sequence[str] = ()) -> Mapping[str, inspect.Parameter]:
    """The settings of `kind` by name; raises a `UserError` for a value that is none of them, nor named `besides`."""
    known = inspect.signature(kind).parameters
    for name in values:
        if name not in known:
            raise UserError(f"{where} has no setting '{name}'; {did_you_mean(name, [*known, *besides])}.")
    return known


def settings(kind: type, values: Table, where: str) -> Any:
    """An instance of `kind` from plain values, converted to the types of its constructor."""
    known = check_names(kind, values, where)
    needed = [name for name, parameter in known.items() if parameter.default is parameter.empty]
    if missing := [name for name in needed if name not in values]:
        raise UserError(f"{where} needs a value for '{missing[0]}'.")
    if not values:
        return kind()
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "settings", skip=set(known) - set(values))
    try:
        parsed = parser.parse_object({"settings": plain}).settings
    except Exception as error:
        for name, value in plain.items():  # which of them was it?
            try:
                parser.parse_object({"settings": {name: value, **{other: plain[other] for other in needed}}})
            except Exception:
                hint = get_type_hints(kind).get(name, known[name].annotation)
                raise UserError(f"{where}: '{name}' expects {in_words(hint)}; got {value!r}.") from error
        raise UserError(f"{where}: {first_line(error)}") from error
    return kind(**{name: parsed[name] for name in values})


def in_words(hint: Any) -> str:
    """A type as a person reads it: `int`, `float | None`, `'noise' or 'leaves'`."""
    if get_origin(hint) is Literal:
        return " or ".join(f"'{choice}'" for choice in get_args(hint))
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


@dataclass(frozen=True, kw_only=True)
class _Counts:
    images: int = Recipe.images
    calibration_images: int = Recipe.calibration_images


def section(table: Table, name: str) -> Table:
    """The section called `name`, empty if there is none; raises a `UserError` if it is a single value."""
    found = table.get(name, {})
    if not isinstance(found, dict):
        raise UserError(f"'{name}' is a section of a recipe, [{name}], not a single value; got {found!r}.")
    return found


def find_tuner(name: str) -> type:
    """The tuner class called `name`; raises a `UserError` if there is none."""
    if name not in TUNERS:
        raise UserError(f"There is no tuner '{name}'; {did_you_mean(name, TUNERS)}.")
    return TUNERS[name]


def _name(registry: dict[str, type], value: object) -> str:
    for name, kind in registry.items():
        if type(value) is kind:
            return name
    return f"{source_of(type(value))}:{type(value).__qualname__}"


def _values(value: object) -> Table:
    plain = asdict(value)  # type: ignore[call-overload]
    defaults = {each.name: each.default for each in fields(value)}  # type: ignore[arg-type]
    for key, item in plain.items():
        try:
            json.dumps(item)
        except TypeError as error:
            raise UserError(
                f"The setting '{key}' of {type(value).__qualname__} is {item!r}, which no record can hold; settings "
                "are numbers, texts, truth values and lists of them."
            ) from error
    told = {key: item for key, item in plain.items() if item is not None or defaults[key] is not None}
    return {key: list(item) if isinstance(item, tuple) else item for key, item in told.items()}
