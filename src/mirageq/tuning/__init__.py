"""Tuners: what makes a calibrated student better on a source of synthetic images.

A tuner is a frozen dataclass of settings with `tune(teacher, student, source, *, seed, journal)`, changing the student
in place.
"""

from __future__ import annotations

from mirageq.tuning.contract import Tuner
from mirageq.tuning.correct import Correct
from mirageq.tuning.distill import Distill
from mirageq.tuning.guard import TuningDiverged
from mirageq.tuning.reconstruct import Reconstruct
from mirageq.tuning.squant import SQuant

__all__ = ["TUNERS", "Correct", "Distill", "Reconstruct", "SQuant", "Tuner", "TuningDiverged"]

TUNERS: dict[str, type] = {"distill": Distill, "reconstruct": Reconstruct, "squant": SQuant, "correct": Correct}
