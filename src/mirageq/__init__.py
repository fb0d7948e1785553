"""mirageq: quantize a vision network without its data."""

from __future__ import annotations

__version__ = "0.1.0"

from mirageq.errors import UserError
from mirageq.evaluate import Accuracy, accuracy, agreement
from mirageq.images import Batch, ImageSource, SyntheticSet
from mirageq.journal import Journal
from mirageq.methods import (
    DGH,
    GDFQ,
    HAST,
    METHODS,
    ClusterQ,
    Genie,
    IntraQ,
    Method,
    Noise,
    SelectQ,
    SynQ,
    TexQ,
    Union,
    ZeroQ,
)
from mirageq.pipeline import Result, quantize
from mirageq.quant import Scheme, Student
from mirageq.recipe import Recipe
from mirageq.run import load
from mirageq.storage import save_student
from mirageq.teacher import Teacher
from mirageq.tuning import Correct, Distill, Reconstruct, SQuant, Tuner, TuningDiverged

__all__ = [
    "Accuracy",
    "Batch",
    "ClusterQ",
    "Correct",
    "DGH",
    "Distill",
    "GDFQ",
    "Genie",
    "HAST",
    "ImageSource",
    "IntraQ",
    "Journal",
    "METHODS",
    "Method",
    "Noise",
    "Recipe",
    "Reconstruct",
    "Result",
    "SQuant",
    "Scheme",
    "SelectQ",
    "Student",
    "SynQ",
    "SyntheticSet",
    "Teacher",
    "TexQ",
    "Tuner",
    "TuningDiverged",
    "Union",
    "UserError",
    "ZeroQ",
    "accuracy",
    "agreement",
    "load",
    "quantize",
    "save_student",
]
