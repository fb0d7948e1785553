"""The protocol of a measurement: everything that must be equal before two numbers may be compared."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mirageq.data import LabelledImages
from mirageq.errors import UserError
from mirageq.folders import write_text
from mirageq.recipe import Recipe, Table, build, describe
from mirageq.storage import network_hash
from mirageq.teacher import Teacher

SELECTION = "the last step's; no label chooses anything"
PLACES = {
    "paper": "weights of every convolution and linear layer (per channel) and the output of every activation function "
    "(per tensor)",
    "deploy": "every tensor an integer runtime touches, BatchNorm folded, the image at 8 bits, biases at 32",
}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What a comparison holds fixed.

    Attributes:
        network, data: how they were named; names may differ between comparisons, the hashes may not.
        weights_sha256, data_sha256: of the network's tensors, and of pixels and labels as the network sees them.
        count: labelled images.
        full_precision: top-1 of the network as it is, percent.
        normalisation: mean and standard deviation per channel.
        recipe: images, scheme without bits, and tuner.
    """

    network: str
    weights_sha256: str
    data: str
    data_sha256: str
    count: int
    full_precision: float
    normalisation: list[list[float]]
    recipe: Table
    selection: str = SELECTION

    @staticmethod
    def of(network: str, teacher: Teacher, name: str, data: LabelledImages, recipe: Recipe, full: float) -> Protocol:
        """The protocol of measuring `teacher`, whose top-1 is `full` percent, on `data` under `recipe`."""
        return Protocol(
            network=network,
            weights_sha256=network_hash(teacher),
            data=name,
            data_sha256=data.digest(),
            count=data.count,
            full_precision=full,
            normalisation=[list(teacher.mean or ()), list(teacher.std or ())],
            recipe=_shared(recipe),
        )

    @staticmethod
    def load(path: Path) -> Protocol:
        """Read what `save` wrote.

        Raises:
            UserError: missing, damaged, or another format.
        """
        try:
            table = json.loads(path.read_text())
            with_defaults = build(
                {**table["recipe"], "method": {"name": "noise"}}
            )  # settings added since it was written
            return Protocol(**{**table, "recipe": _shared(with_defaults)})
        except OSError as error:
            raise UserError(f"{path.parent} holds no comparison: it has no readable {path.name}.") from error
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise UserError(f"{path} is damaged or of another version ({error}).") from error

    def save(self, path: Path) -> None:
        write_text(path, json.dumps(asdict(self), indent=2) + "\n")

    def require_same(self, other: Protocol, here: Path, there: Path) -> None:
        """Raise a `UserError` that names the first difference, unless numbers of both may be compared."""
        if difference := first_difference(_compared(self), _compared(other)):
            name, ours, theirs = difference
            raise UserError(
                f"{here} and {there} were not measured under one protocol: {name} is {ours} in the first and "
                f"{theirs} in the second. Numbers of both cannot stand in one table."
            )

    def sentences(self) -> str:
        """The protocol in words, for people."""
        scheme, tuner = self.recipe["scheme"], self.recipe["tuner"]
        placement, ends = scheme["placement"], scheme.get("first_last_bits")
        first, residual = scheme.get("first_output_bits"), scheme.get("residual_bits")
        shown = f"on {self.recipe['calibration_images']} of the method's {self.recipe['images']} images"
        if scheme["ranges_from"] == "batch_norms":
            shown = "of what the BatchNorms were trained to give"
        return (
            f"Network {self.network} (weights {self.weights_sha256[:12]}), full precision {self.full_precision:.2f} % "
            f"top-1 on {self.count:,} images of {self.data} ({self.data_sha256[:12]}).\n"
            f"Quantized (`{placement}`): {PLACES[placement]}; "
            f"first and last layer at {f'{ends} bits' if ends else 'the same bits'}"
            f"{f', what the first layer gives at {first} bits' if first else ''}"
            f"{f', what sums and pooling read at {residual} bits' if residual else ''}.\n"
            f"Static ranges: weights {scheme['weight_range']}, activations {scheme['activation_range']} {shown}"
            f"{', neighbouring layers equalized' if scheme['equalize'] else ''}"
            f"{', steps learned' if scheme['learned_steps'] else ''}.\n"
            f"Tuning: {_in_words(tuner)}.\nEvery figure is {self.selection}."
        )


def _in_words(tuner: Table) -> str:
    """A tuner with the settings that are not zero or off, and the one that follows it."""
    plain = {name: value for name, value in tuner.items() if name != "name" and value and not isinstance(value, dict)}
    told = f"{tuner['name']} ({', '.join(f'{name} {value}' for name, value in plain.items())})"
    then = tuner.get("then", {"steps": 0})
    return f"{told}, then {_in_words(then)}" if then.get("steps", 1) else told


def _shared(recipe: Recipe) -> Table:
    """A recipe without what a comparison varies: the method and the bits."""
    table = describe(recipe)
    scheme = {key: value for key, value in table["scheme"].items() if key not in ("weight_bits", "activation_bits")}
    return {**{key: value for key, value in table.items() if key != "method"}, "scheme": scheme}


def first_difference(ours: Table, theirs: Table) -> tuple[str, Any, Any] | None:
    """The first value, by its dotted name, in which two tables differ."""
    flat, other = _flat(ours), _flat(theirs)
    return next(
        ((name, flat.get(name), other.get(name)) for name in flat | other if flat.get(name) != other.get(name)), None
    )


def _compared(protocol: Protocol) -> Table:
    """Everything that must be equal."""
    return {key: value for key, value in asdict(protocol).items() if key not in ("network", "data", "full_precision")}


def _flat(table: Table, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
