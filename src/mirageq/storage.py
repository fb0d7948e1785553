"""A student in one file: tensors as safetensors, and a header that says what they belong to."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mirageq.canonical import COMPUTED_FROM
from mirageq.errors import UserError, first_line
from mirageq.folders import replacing
from mirageq.hashing import hash_tensors
from mirageq.quant import Scheme, Student, convert
from mirageq.recipe import settings
from mirageq.teacher import Teacher

FORMAT = 1
HEADER = "mirageq"


def network_hash(teacher: Teacher) -> str:
    """SHA-256 of the full-precision network's tensors.

    Where some are computed from others, of those: processors differ in the last bits of what they compute.
    """
    return teacher.network.meta.get(COMPUTED_FROM) or hash_tensors(dict(teacher.network.state_dict()))


def save_student(student: Student, teacher: Teacher, path: Path) -> dict[str, Tensor]:
    """Write a student to `path` (safetensors); returns the tensors written.

    Raises:
        UserError: the path cannot be written.
    """
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in student.state_dict().items()}
    scheme = {key: value for key, value in asdict(student.scheme).items() if value is not None}
    header = {"format": FORMAT, "scheme": scheme, "network_sha256": network_hash(teacher)}
    try:
        with replacing(path) as written:
            save_file(state, written, {HEADER: json.dumps(header)})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {error}.") from error
    return state


def load_student(path: Path, teacher: Teacher) -> Student:
    """The student in a file that `save_student` wrote, for the network it was made from.

    Raises:
        UserError: missing or damaged, of another format, or of another network.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "null"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path} does not hold a student: it is missing or damaged ({first_line(error)}).") from error
    if not isinstance(header, dict):
        raise UserError(f"{path} does not hold a student: no mirageq header. Give a file that mirageq wrote.")
    if header.get("format") != FORMAT:
        raise UserError(
            f"{path} was written in format {header.get('format')}, this version reads format {FORMAT}. "
            "Use the version of mirageq that wrote it."
        )
    if header["network_sha256"] != (own := network_hash(teacher)):
        raise UserError(
            f"{path} belongs to another network (weights {header['network_sha256'][:12]}, yours {own[:12]}). "
            "Give the checkpoint it was made from."
        )
    student = convert(teacher.network, settings(Scheme, header["scheme"], "the student's scheme"))
    try:
        student.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit its own scheme ({first_line(error)}); it is damaged.") from error
    return student.to(teacher.device)
