"""What a comparison compares: its cells, and the recipe of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mirageq import recipe as recipes
from mirageq.errors import UserError
from mirageq.methods import METHODS, Method
from mirageq.recipe import Recipe, Table


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is compared.

    Attributes:
        methods: label -> the method's table (`name`, settings); the label is the name where none is given. What it does
            not say about the recipe's own method is as in the recipe.
        bits: such as "w4a4".
        seeds: one cell for each.
        recipe: a recipe file or the name of a shipped one; the cell says the method and the bits.
        variants: label -> settings (`tuner.steps=0`) that a cell has besides.
        network, data: what `mirageq compare` measures unless told otherwise.
    """

    methods: dict[str, Table]
    bits: tuple[str, ...] = ("w4a4",)
    seeds: tuple[int, ...] = (0,)
    recipe: str | None = None
    variants: dict[str, list[str]] = field(default_factory=lambda: {"": []})
    network: str | None = None
    data: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", tuple(dict.fromkeys(bits.strip().lower() for bits in self.bits)))
        object.__setattr__(self, "seeds", tuple(dict.fromkeys(self.seeds)))
        for name in ("methods", "bits", "seeds", "variants"):
            if not getattr(self, name):
                raise UserError(f"A comparison needs at least one of its {name}.")

    @staticmethod
    def asked(path: Path | None, labels: Sequence[str] | None, given: Table) -> Plan:
        """The plan in a file, or one of every method; `given` replaces what it says, `labels` picks its methods.

        Raises:
            UserError: no such file, not TOML, an unknown setting, or a wrong type.
        """
        if path and not path.is_file():
            raise UserError(f"There is no plan {path}.")
        table = recipes.read(str(path)) if path else {}
        if labels or not table:
            described = _table(table.get("methods", {}), f"methods of {path or 'the plan'}")
            given = given | {"methods": {label: described.get(label, {}) for label in labels or METHODS}}
        return Plan.of({**table, **{key: value for key, value in given.items() if value}}, str(path or "the plan"))

    @staticmethod
    def of(table: Table, where: str) -> Plan:
        """The plan that a table describes.

        Raises:
            UserError: an unknown setting, or a wrong type.
        """
        plain = {key: value for key, value in table.items() if key not in ("methods", "variants")}
        recipes.check_names(Plan, table, where)
        tables = {key: table[key] for key in ("methods", "variants") if key in table}
        for label, value in _table(tables.get("methods", {}), f"methods of {where}").items():
            _table(value, f"methods.{label} of {where}")
        for label, value in _table(tables.get("variants", {}), f"variants of {where}").items():
            if not isinstance(value, list) or not all(isinstance(setting, str) for setting in value):
                raise UserError(f'variants.{label} of {where} is a list of texts, "key=value"; got {value!r}.')
        typed = recipes.settings(_PlainPlan, plain, where)
        return Plan(**{name: getattr(typed, name) for name in plain}, **{"methods": {}, **tables})

    def cells(self, only: Sequence[str] = ()) -> list[Cell]:
        """Those whose label has all the texts of `only`.

        Raises:
            UserError: there is none.
        """
        cells = [
            Cell(method, bits, seed, variant)
            for seed in self.seeds
            for method in self.methods
            for bits in self.bits
            for variant in self.variants
        ]
        picked = [cell for cell in cells if all(text in cell.label for text in only)]
        if not picked:
            raise UserError(f"No cell's label has {' and '.join(map(repr, only))}; one of them is '{cells[0].label}'.")
        return picked

    def recipe_of(self, cell: Cell) -> Recipe:
        base = recipes.read(self.recipe) if self.recipe else {}
        method = {"name": cell.method, **self.methods[cell.method]}
        own = recipes.section(base, "method")
        table = {**base, "method": recipes.laid_over(own, method, recipes.UNNAMED["method"])}
        return recipes.build(recipes.assign(recipes.set_bits(table, cell.bits), self.variants[cell.variant]))

    def check(self, only: Sequence[str] = ()) -> Recipe:
        """Build every picked cell's recipe, so that a mistake shows before anything is computed; returns the first one.

        Raises:
            UserError: two cells would share images, and make them differently.
        """
        made: dict[tuple[str, int, int], tuple[Cell, Method]] = {}
        for cell in self.cells(only):
            wanted = self.recipe_of(cell)
            other, method = made.setdefault((cell.method, wanted.images, cell.seed), (cell, wanted.method))
            if method != wanted.method:
                raise UserError(
                    f"'{other.label}' and '{cell.label}' would share their images, and their settings of the method "
                    "differ. Give each a label of its own, [methods.LABEL], in the place of a variant."
                )
        return self.recipe_of(self.cells()[0])


def _table(value: object, where: str) -> Table:
    if not isinstance(value, dict):
        raise UserError(f"{where} is a table, not a value; got {value!r}.")
    return value


@dataclass(frozen=True, kw_only=True)
class _PlainPlan:
    bits: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    recipe: str | None = None
    network: str | None = None
    data: str | None = None


@dataclass(frozen=True)
class Cell:
    """One figure of a comparison."""

    method: str
    bits: str
    seed: int
    variant: str = ""

    @property
    def label(self) -> str:
        return f"{self.method} {self.bits} seed{self.seed} {self.variant}".strip()
