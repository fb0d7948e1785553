"""What is quantized, to how many bits, and how the ranges are found."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_type_hints

from mirageq.errors import UserError, check_choices

FEWEST_BITS, MOST_BITS = 2, 8

WeightRange = Literal["minmax", "percentile", "mse"]
ActivationRange = Literal["minmax", "ema", "percentile", "mse"]
RangesFrom = Literal["images", "batch_norms"]
Placement = Literal["paper", "deploy"]


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """The settings of a quantized network.

    Attributes:
        weight_bits: 2..8, per output channel.
        activation_bits: 2..8, per tensor.
        first_last_bits: bits of the first and last layers' weights and of the last layer's input; None: as the rest.
        first_output_bits: bits of what the first layer gives, its activation function included; None: as the rest. With
            8, what BRECQ (Li et al., ICLR 2021) means by first and last layer in 8 bits.
        residual_bits: bits of activations that sums, products or pooling read; None: as the rest. Where a layer reads
            the same activation, it is requantized for it to `activation_bits`. A runtime keeps such a stream in 8 bits
            whatever it holds; published results leave it in float.
        placement: "paper" quantizes weights and the outputs of activation functions, as IntraQ, GDFQ and their family
            report it; "deploy" quantizes every tensor that an integer runtime touches, with BatchNorm folded away,
            the image in 8 bits and biases in int32.
        weight_symmetric: None: as the placement does it (paper: False, deploy: True).
        activation_symmetric: whether activations have symmetric grids.
        weight_range: "minmax" follows the weights as they are trained; "percentile" and "mse" are set once.
        activation_range: found by `Student.calibrate`.
        ranges_from: what calibration shows the activations: the images as they are, or (needing none, so noise will do)
            the sizes that the BatchNorms were trained to give, see `mirageq.quant.remembered`.
        percentile: of values kept inside a "percentile" range, cut on each side; 50 < percentile <= 100.
        equalize: share ranges between neighbouring layers first (`mirageq.quant.equalize`); only in "deploy", where
            norms are folded.
        clip_gradient: False: gradients pass everywhere (the papers' straight-through); True: not where a value was
            clipped.
        learned_steps: tuning also learns the scales of weights and activations (LSQ); zero points stay as calibrated.
            Implies `clip_gradient`.

    Raises:
        UserError: a setting out of range or misspelt.

    >>> Scheme(weight_bits=3, activation_bits=5).bits
    'w3a5'
    """

    weight_bits: int = 4
    activation_bits: int = 4
    first_last_bits: int | None = None
    first_output_bits: int | None = None
    residual_bits: int | None = None
    placement: Placement = "paper"
    weight_symmetric: bool | None = None
    activation_symmetric: bool = False
    weight_range: WeightRange = "minmax"
    activation_range: ActivationRange = "ema"
    ranges_from: RangesFrom = "images"
    percentile: float = 99.99
    equalize: bool = False
    clip_gradient: bool = False
    learned_steps: bool = False

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "first_last_bits", "first_output_bits", "residual_bits"):
            bits = getattr(self, name)
            if name in ("weight_bits", "activation_bits") or bits is not None:
                _check_bits(name, bits)
        check_choices(self)
        for name, hint in get_type_hints(Scheme).items():
            value = getattr(self, name)
            if hint in (bool, bool | None) and not isinstance(value, hint):
                raise UserError(f"{name} must be one of true or false; got {value!r}.")
        number = isinstance(self.percentile, (int, float)) and not isinstance(self.percentile, bool)
        if not number or not 50 < self.percentile <= 100:
            raise UserError(f"percentile must be above 50 and at most 100; got {self.percentile!r}.")
        if self.equalize and self.placement != "deploy":
            raise UserError("equalize scales layers whose norms are folded; it needs the placement 'deploy'.")

    @property
    def bits(self) -> str:
        """The short name, such as "w4a4"."""
        return f"w{self.weight_bits}a{self.activation_bits}"

    @property
    def symmetric_weights(self) -> bool:
        """Whether weights use a symmetric grid, the placement's habit included."""
        return self.placement == "deploy" if self.weight_symmetric is None else self.weight_symmetric


def parse_bits(text: str) -> tuple[int, int]:
    """The bits of weights and activations from a short name.

    Raises:
        UserError: not of the form "w4a4", or outside 2..8 bits.

    >>> parse_bits("w4a8")
    (4, 8)
    """
    found = re.fullmatch(r"[wW](\d+)[aA](\d+)", text.strip())
    if not found:
        raise UserError(f"Bits are written like w4a4 (weights 4, activations 4); got '{text}'.")
    weight_bits, activation_bits = int(found[1]), int(found[2])
    _check_bits("weight bits", weight_bits)
    _check_bits("activation bits", activation_bits)
    return weight_bits, activation_bits


def _check_bits(name: str, bits: object) -> None:
    if not isinstance(bits, int) or isinstance(bits, bool) or not FEWEST_BITS <= bits <= MOST_BITS:
        raise UserError(f"{name} must be a whole number from {FEWEST_BITS} to {MOST_BITS}; got {bits!r}.")
