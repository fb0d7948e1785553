"""Integer models out: files that real runtimes run, proved against the student."""

from mirageq.export.deliver import Delivery, check_structure, deliver
from mirageq.export.emit import PROFILES, Profile
from mirageq.export.onnx import export_student, export_teacher
from mirageq.export.verify import RUNTIMES, Verification, verify

__all__ = [
    "PROFILES",
    "RUNTIMES",
    "Delivery",
    "Profile",
    "Verification",
    "check_structure",
    "deliver",
    "export_student",
    "export_teacher",
    "verify",
]
