"""Descent on pixels, or on what draws them: the one loop behind every method that paints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mirageq.errors import UserError, check_choices, check_image_size, check_not_negative, check_positive
from mirageq.journal import Journal
from mirageq.precision import Precision, autocast

Loss = Callable[[Tensor, torch.Generator], dict[str, Tensor]]
"""`loss(images, generator)`: named, already weighted scalar terms; randomness comes from the generator alone."""

PAINTING = "paint"
"""Where a descent keeps how far it is."""


@dataclass(frozen=True, kw_only=True)
class Descent:
    """Settings of the descent on pixels with Adam; see `paint`.

    Attributes:
        batch_size: images painted together; they share the batch statistics that are aligned.
        iterations: steps of each batch.
        lr: Adam's learning rate, in units of normalised pixels.
        start: "noise" is Gaussian and the papers'; "leaves" are dead leaves (`mirageq.leaves`), which look like
            photographs from afar. A tenth of the papers' rate keeps what they bring.
        schedule: "plateau" multiplies the rate by `lr_factor` after `patience` steps without improvement of the total
            loss, as the papers do with 1,000 iterations; "cosine" lets it fall to `min_lr` over the iterations, which
            serves shorter runs better.
        patience, lr_factor: of "plateau".
        min_lr: where the lowering stops.
        clamp: keep pixels in the range that real ones have; the teacher's normalisation must be known. Not in the
            papers; it matters where the image itself is quantized, because its range then fits real images.
        precision: "bfloat16" runs the teacher under autocast: 1.2 to 1.7 times faster, slightly noisier gradients. A
            processor without such instructions computes in float32 all the same, and the journal says so.
        image_size: height and width of the images, in pixels; None takes the network's own. A convolutional network
            that averages over space before it classifies remembers the same statistics at any size, and half the size
            makes painting and tuning three to four times cheaper. Such images cannot become a calibration pack.
        swing: strided convolutions see their input moved at random (GENIE's swing convolution): the grid that they read
            leaves no chequers in the images.
        compile: compile the teacher's pass: another 1.2 to 1.4 times faster, after half a minute or so. On a CPU it
            needs a C++ compiler. Not with `swing`.
    """

    batch_size: int = 256
    iterations: int = 1000
    lr: float = 0.5
    start: Literal["noise", "leaves"] = "noise"
    schedule: Literal["plateau", "cosine"] = "plateau"
    patience: int = 50
    lr_factor: float = 0.1
    min_lr: float = 1e-4
    clamp: bool = False
    precision: Precision = "float32"
    image_size: int | None = None
    swing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "iterations", "lr", "patience")
        check_not_negative(self, "min_lr")
        if self.min_lr > self.lr:
            raise UserError(f"The rate falls to min_lr, which is at most lr; got {self.min_lr} and {self.lr}.")
        if not 0 < self.lr_factor < 1:
            raise UserError(f"lr_factor is what the rate is multiplied by to fall, in (0, 1); got {self.lr_factor}.")
        check_choices(self)
        check_image_size(self.image_size)
        if self.swing and self.compile:
            raise UserError("Convolutions that swing cannot be compiled: set compile or swing to false.")


@dataclass(frozen=True)
class Parameters:
    """Tensors that learn at `rate` times the descent's learning rate."""

    tensors: list[Tensor]
    rate: float = 1.0


def cosine(high: float, low: float, done: float) -> float:
    """The rate after a share `done` of the run, falling from `high` to `low` along half a cosine."""
    return low + (high - low) * (1 + math.cos(math.pi * done)) / 2


def paint(
    start: Tensor,
    loss: Loss,
    settings: Descent,
    generator: torch.Generator,
    *,
    pixel_range: tuple[Tensor, Tensor] | None = None,
    journal: Journal,
    name: str,
) -> Tensor:
    """Minimise `loss` over the pixels of `start` (N, C, H, W); see `descend`.

    No selection: the last images are returned. Pixels are projected into `pixel_range` after each step, if given.
    """
    images = start.clone(memory_format=torch.channels_last).requires_grad_()

    def project() -> None:
        if pixel_range:
            images.data.clamp_(*pixel_range)

    descend(
        [Parameters([images])], lambda: images, loss, settings, generator, project=project, journal=journal, name=name
    )
    return images.detach()


def descend(
    parameters: Sequence[Parameters],
    render: Callable[[], Tensor],
    loss: Loss,
    settings: Descent,
    generator: torch.Generator,
    *,
    project: Callable[[], None] | None = None,
    journal: Journal,
    name: str,
) -> None:
    """Minimise `loss(render(), generator)` over `parameters` with Adam and a falling rate, in place.

    `project` is called after each step. With a journal that has a folder the loop saves its state now and then, and
    continues from it to the same bits; whoever has put the result away clears the checkpoint `PAINTING`.

    Raises:
        UserError: the loss became NaN or infinite.
    """
    tensors = [tensor for group in parameters for tensor in group.tensors]
    groups = [{"params": group.tensors, "lr": settings.lr * group.rate, "rate": group.rate} for group in parameters]
    optimizer = torch.optim.Adam(groups)
    least = [settings.min_lr * group.rate for group in parameters]
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=settings.lr_factor, patience=settings.patience, min_lr=least
    )
    falling = settings.schedule == "cosine"
    checkpoint = journal.checkpoint(PAINTING)
    begun = 0
    if (state := checkpoint.load()) and state["name"] == name:
        begun = state["step"]
        with torch.no_grad():
            for tensor, value in zip(tensors, state["values"], strict=True):
                tensor.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        plateau.load_state_dict(state["plateau"])
        generator.set_state(state["generator"])
    with journal.stage(name, settings.iterations, start=begun) as advance:
        for step in range(begun, settings.iterations):
            with autocast(settings.precision, tensors[0].device):
                terms = loss(render(), generator)
            total = torch.stack([term.float() for term in terms.values()]).sum()
            if not total.isfinite():
                raise UserError(
                    f"The synthesis loss became {float(total.detach())} at iteration {step} of {name}. Lower lr."
                )
            if falling:
                for group in optimizer.param_groups:
                    group["lr"] = group["rate"] * cosine(settings.lr, settings.min_lr, step / settings.iterations)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            if project:
                project()
            if not falling:
                plateau.step(total.detach())
            advance(
                step, **{key: float(term.detach()) for key, term in terms.items()}, lr=optimizer.param_groups[0]["lr"]
            )
            checkpoint.offer(
                lambda: {
                    "name": name,
                    "step": step + 1,  # noqa: B023 - called at once
                    "values": [tensor.detach() for tensor in tensors],
                    "optimizer": optimizer.state_dict(),
                    "plateau": plateau.state_dict(),
                    "generator": generator.get_state(),
                }
            )
