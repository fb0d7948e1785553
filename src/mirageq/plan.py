"""What a comparison compares: its cells, and the recipe of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mirageq import recipe as recipes
from mirageq.errors import UserError
from mirageq.methods import METHODS
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
        for name in ("methods", "bits", "seeds", "variants"):
            if not getattr(self, name):
                raise UserError(f"A comparison needs at least one of its {name}.")

    @staticmethod
    def read(path: str) -> Plan:
        """The plan in a TOML file.

        Raises:
            UserError: not TOML, or an unknown setting.
        """
        return Plan.of(recipes.read(path), path)

    @staticmethod
    def asked(path: Path | None, labels: Sequence[str] | None, given: Table) -> Plan:
        """The plan in a file, or one of every method; `given` replaces what it says, `labels` picks its methods."""
        table = recipes.read(str(path)) if path else {}
        if labels or not table:
            described = table.get("methods", {})
            given = given | {"methods": {label: described.get(label, {}) for label in labels or METHODS}}
        return Plan.of({**table, **{key: value for key, value in given.items() if value}}, str(path or "the plan"))

    @staticmethod
    def of(table: Table, where: str) -> Plan:
        plain = {key: value for key, value in table.items() if key not in ("methods", "variants")}
        tables = {key: table[key] for key in ("methods", "variants") if key in table}
        recipes.check_names(Plan, table, where)
        typed = recipes.settings(_PlainPlan, plain, where)
        return Plan(**{name: getattr(typed, name) for name in plain}, **{"methods": {}, **tables})

    def cells(self) -> list[Cell]:
        return [
            Cell(method, bits, seed, variant)
            for seed in self.seeds
            for method in self.methods
            for bits in self.bits
            for variant in self.variants
        ]

    def recipe_of(self, cell: Cell) -> Recipe:
        base = recipes.read(self.recipe) if self.recipe else {}
        method = {"name": cell.method, **self.methods[cell.method]}
        table = {**base, "method": recipes.laid_over(base.get("method", {}), method)}
        return recipes.build(recipes.assign(recipes.set_bits(table, cell.bits), self.variants[cell.variant]))

    def check(self) -> Recipe:
        """Build every cell's recipe, so that a mistake shows before anything is computed; returns the first."""
        return [self.recipe_of(cell) for cell in self.cells()][0]


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

    @property
    def folder(self) -> str:
        return self.label.replace(" ", "_").replace("/", "_")
