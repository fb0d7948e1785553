"""mirageq: quantize a vision network without its data."""

from __future__ import annotations

__version__ = "0.1.0"

from mirageq.errors import UserError
from mirageq.evaluate import Accuracy, accuracy, agreement
from mirageq.images import Batch, ImageSource, SyntheticSet
from mirageq.journal import Journal
from mirageq.methods import METHODS, Method
from mirageq.methods.clusterq import ClusterQ
from mirageq.methods.gdfq import GDFQ
from mirageq.methods.intraq import IntraQ
from mirageq.methods.noise import Noise
from mirageq.methods.zeroq import ZeroQ
from mirageq.pipeline import Result, quantize
from mirageq.quant import Scheme, Student
from mirageq.recipe import Recipe
from mirageq.run import load
from mirageq.storage import save_student
from mirageq.teacher import Teacher
from mirageq.tuning import Distill, TuningDiverged

__all__ = [
    "GDFQ",
    "METHODS",
    "Accuracy",
    "Batch",
    "ClusterQ",
    "Distill",
    "ImageSource",
    "IntraQ",
    "Journal",
    "Method",
    "Noise",
    "Recipe",
    "Result",
    "Scheme",
    "Student",
    "SyntheticSet",
    "Teacher",
    "TuningDiverged",
    "UserError",
    "ZeroQ",
    "accuracy",
    "agreement",
    "load",
    "quantize",
    "save_student",
]
