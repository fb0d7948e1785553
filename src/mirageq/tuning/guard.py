"""The divergence guard: notices a run that explodes, and says when to give up."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from mirageq.errors import UserError


class TuningDiverged(UserError):
    """Tuning kept diverging after the learning rate had been lowered several times."""


@dataclass
class DivergenceGuard:
    """Watches the loss of each step.

    The alarm is raised by a non-finite loss, or when the smoothed loss exceeds `explosion` times the lowest value it
    has had. The caller then restores its last good state, and goes on with the rate multiplied by `lr_scale`.

    Attributes:
        explosion: ratio of smoothed loss to its minimum that counts as an explosion.
        retreat: factor on the rate at each alarm.
        patience: alarms that are borne; one more raises `TuningDiverged`.
        every: steps between two good states worth keeping.
        floor: what the lowest loss counts as at least: a divergence of nothing is rounded to either side of zero.
    """

    explosion: float = 10.0
    retreat: float = 0.1
    patience: int = 3
    every: int = 50
    floor: float = 1e-4
    smoothing: float = 0.9
    smoothed: float = math.nan
    lowest: float = math.inf
    alarms: int = 0
    lr_scale: float = 1.0

    def alarmed_by(self, loss: float) -> bool:
        """Take note of a loss, and tell whether the run has to be taken back."""
        if not math.isfinite(loss):
            return True
        known = not math.isnan(self.smoothed)
        smoothed = self.smoothing * self.smoothed + (1 - self.smoothing) * loss if known else loss
        if smoothed > self.explosion * self.lowest:
            return True
        self.smoothed, self.lowest = smoothed, min(self.lowest, max(smoothed, self.floor))
        return False

    def back_off(self, step: int, loss: float, lr: float) -> str:
        """Lower the rate and return what to tell the user.

        Raises:
            TuningDiverged: it was lowered `patience` times already.
        """
        self.alarms += 1
        if self.alarms > self.patience:
            raise TuningDiverged(
                f"Tuning diverged at step {step} (loss {loss:.3g}) although the learning rate was lowered "
                f"{self.patience} times, to {lr * self.lr_scale:.2g}. Use a smaller lr, or clip_norm."
            )
        self.lr_scale *= self.retreat
        self.smoothed, self.lowest = math.nan, math.inf  # of a run that is taken back
        return (
            f"Step {step}: loss {loss:.3g} is not finite or exploding; back to the last good state, "
            f"learning rate now {lr * self.lr_scale:.2g} ({self.alarms} of {self.patience})."
        )

    def calm(self, step: int) -> bool:
        """Whether the state after `step` steps is a good one to keep: a multiple of `every`, and no rise under way."""
        return step % self.every == 0 and self.smoothed <= 2 * self.lowest

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
