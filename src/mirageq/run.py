"""A run: one network, one recipe, one seed, one directory that says everything about it."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from torch.export import ExportedProgram

import mirageq
from mirageq.errors import UserError
from mirageq.folders import RECORD, alone, check_folder, resuming, write_text
from mirageq.hashing import hash_tensors
from mirageq.images import ImageSource, SyntheticSet
from mirageq.journal import HISTORY, SECONDS, Journal, read_history
from mirageq.models import NetworkChoice, load_teacher
from mirageq.pipeline import Result, carry_out, check_pixel_range
from mirageq.precision import has_bfloat16
from mirageq.quant import Scheme, Student
from mirageq.recipe import Recipe, Table, build, describe, settings
from mirageq.storage import load_student, network_hash, save_student
from mirageq.teacher import Teacher
from mirageq.tuning.contract import forget

FORMAT = 1
IMAGES, STUDENT = "synthetic.safetensors", "student.safetensors"


class Run:
    """A run directory. Make one with `create` or find one with `open`; `execute` carries it out, or goes on with it."""

    def __init__(self, folder: Path, record: Table) -> None:
        self.folder, self.record = folder, record
        self._new = False

    @staticmethod
    def create(
        folder: Path, choice: NetworkChoice, recipe: Recipe, seed: int, teacher: Teacher, *, only_images: bool = False
    ) -> Run:
        """Begin a run in a new or empty folder; nothing is written unless everything fits.

        Raises:
            UserError: the folder holds something already, or cannot be written; the method needs a normalisation.
        """
        check_pixel_range(teacher, recipe.method)
        check_folder(folder)
        record = {
            "format": FORMAT,
            "status": "running",
            "only_images": only_images,
            "versions": versions(),
            "machine": machine(teacher.device),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "network": {**asdict(choice.known(teacher)), "sha256": network_hash(teacher), "classes": teacher.classes},
            "seed": seed,
            "recipe": describe(recipe),
        }
        run = Run(folder, record)
        run._new = True
        text = run._text()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = (folder / RECORD).open("x", encoding="utf-8")
        except FileExistsError as error:
            raise UserError(f"{folder} holds a run that was begun at the same time; give another folder.") from error
        try:
            with file:
                file.write(text)
        except BaseException:  # the disk is full, say: no half of a record stays
            (folder / RECORD).unlink()
            raise
        return run

    @staticmethod
    def open(folder: Path) -> Run:
        """Read a run's record.

        Raises:
            UserError: not a run directory, or of another format.
        """
        try:
            record = json.loads((folder / RECORD).read_text())
        except OSError as error:
            raise UserError(f"{folder} is not a run directory: it has no readable {RECORD}.") from error
        except ValueError as error:
            raise UserError(f"{folder / RECORD} is damaged ({error}); the run cannot be read.") from error
        if not isinstance(record, dict) or "format" not in record:
            raise UserError(f"{folder / RECORD} is not the record of a run.")
        if record["format"] != FORMAT:
            raise UserError(
                f"{folder} was written in format {record['format']}, this version reads format {FORMAT}. "
                "Use the version of mirageq named in its run.json."
            )
        missing = {"status", "only_images", "seed", "network", "recipe"} - record.keys()
        if not missing and isinstance(record["network"], dict):
            missing = {"sha256", *NetworkChoice.__annotations__} - record["network"].keys()
        if missing or not all(isinstance(record[name], dict) for name in ("network", "recipe")):
            raise UserError(
                f"{folder / RECORD} is damaged (no {min(missing, default='table')}); the run cannot be read."
            )
        return Run(folder, record)

    @property
    def finished(self) -> bool:
        return self.record["status"] == "finished"

    @property
    def choice(self) -> NetworkChoice:
        network = self.record["network"]
        known = {key: network[key] for key in NetworkChoice.__annotations__ if network[key] is not None}
        return settings(NetworkChoice, known, "the network")

    @property
    def recipe(self) -> Recipe:
        return build(self.record["recipe"])

    @property
    def scheme(self) -> Scheme:
        """The recipe's, which can be read where the method's code cannot be found."""
        return settings(Scheme, self.record["recipe"]["scheme"], "the scheme")

    @property
    def seed(self) -> int:
        return self.record["seed"]

    def execute(
        self, teacher: Teacher, console: Console | None = None, *, checkpoint_seconds: float = 30.0
    ) -> Result | None:
        """Carry the run out, from wherever it was interrupted, and write its results.

        Returns None if the run makes only images.

        Raises:
            UserError: the network is not the one the run began with.
        """
        if network_hash(teacher) != self.record["network"]["sha256"]:
            raise UserError(f"The network has changed since {self.folder} was begun; start a new run for it.")
        with alone(self.folder / RECORD):
            if Run.open(self.folder).finished:
                raise UserError(f"{self.folder} was finished by another process meanwhile.")
            try:
                return self._carry_out(teacher, Journal(self.folder, console, checkpoint_seconds=checkpoint_seconds))
            except UserError:
                if self._new:
                    self._discard_unless_begun()
                raise

    def images(self) -> SyntheticSet:
        """The images of the run.

        Raises:
            UserError: they are not all made.
        """
        return SyntheticSet.load(self.images_file(), seed=self.seed)

    def images_file(self) -> Path:
        """Where the images of the run lie; raises as `images` does."""
        if not self.finished and not (self.folder / IMAGES).exists():
            raise UserError(
                f"{self.folder} holds an unfinished run, whose images are not all made; go on with: "
                f"{resuming(self.folder)}"
            )
        return self.folder / IMAGES

    def student(self, teacher: Teacher) -> Student:
        """The quantized network of a finished run.

        Raises:
            UserError: the run is unfinished or its student file damaged or missing.
        """
        if self.record["only_images"]:
            raise UserError(f"{self.folder} holds only images, made by mirageq synthesize; there is no student in it.")
        if not self.finished:
            raise UserError(f"{self.folder} holds an unfinished run; finish it with: {resuming(self.folder)}")
        return load_student(self.folder / STUDENT, teacher)

    def _carry_out(self, teacher: Teacher, journal: Journal) -> Result | None:
        recipe = self.recipe
        if self.record["only_images"]:
            with journal.timed("synthesize"):
                source = recipe.method.synthesize(teacher, recipe.images, seed=self.seed, journal=journal)
            self._finish(source, journal.seconds, None)
            return None
        result = carry_out(teacher, recipe, seed=self.seed, journal=journal)
        self._finish(result.source, result.seconds, result)
        forget(journal)
        return result

    def _discard_unless_begun(self) -> None:
        """A run that is refused before its first step leaves nothing behind."""
        there = sorted(self.folder.rglob("*"), reverse=True)  # what lies in a folder before the folder
        if all(path.is_dir() or path.name in (RECORD, SECONDS) or _only_notes(path) for path in there):
            for path in there:
                path.rmdir() if path.is_dir() else path.unlink()
            with suppress(OSError):  # the working folder, or a link
                self.folder.rmdir()

    def _finish(self, source: ImageSource, seconds: dict[str, float], result: Result | None) -> None:
        if not (self.folder / IMAGES).exists():
            SyntheticSet(*source.sample(self.recipe.images)).save(self.folder / IMAGES)
        images = self.images()
        self.record["images"] = {"count": len(images), "sha256": images.digest()}
        if result:
            state = save_student(result.student, result.teacher, self.folder / STUDENT)
            self.record["student"] = {"sha256": hash_tensors(state), **asdict(result.student.size())}
        (self.folder / SECONDS).unlink(missing_ok=True)
        self.record["seconds"] = {name: round(value, 2) for name, value in seconds.items()}
        self.record["peak_memory_bytes"] = peak_memory()
        self.record["status"] = "finished"
        self._write()

    def _write(self) -> None:
        write_text(self.folder / RECORD, self._text())

    def _text(self) -> str:
        return json.dumps(self.record, indent=2) + "\n"


def load(
    path: Path | str,
    model: nn.Module | ExportedProgram | None = None,
    *,
    image_shape: tuple[int, int, int] | None = None,
    device: str = "cpu",
) -> Student:
    """The quantized network in a run's folder, or in a file that `save_student` wrote. Nothing is unpickled.

    Args:
        path: a folder of `mirageq quantize`, which knows its network, or a `.safetensors` file.
        model, image_shape: the full-precision network the student was made from; needed for a file, and for a folder
            whose network cannot be found by its name any more.

    Raises:
        UserError: missing, damaged, of another format, or of another network.

    Example:
        >>> student = mirageq.load("runs/first")
        >>> logits = student(images)
    """
    path = Path(path)
    if model is not None:
        if image_shape is None:
            raise UserError("Give image_shape=(channels, height, width) with the model.")
        teacher = Teacher.wrap(model, image_shape, device=device)
        return load_student(path / STUDENT if path.is_dir() else path, teacher)
    if not path.is_dir():
        raise UserError(f"{path} is not the folder of a run; for a file, give the model it was made from as well.")
    run = Run.open(path)
    return run.student(load_teacher(run.choice, device))


def _only_notes(path: Path) -> bool:
    return path.name == HISTORY and all(row["stage"] == "note" for row in read_history(path))


def machine(device: torch.device) -> Table:
    """What was computed on: the processor and its threads, "cpu" or the GPU's name, and whether it has bfloat16."""
    return {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "bfloat16": has_bfloat16(device),
    }


def versions() -> dict[str, str]:
    """Of this package, with its commit where it lies in a repository of its own, of torch, and of Python."""
    ours = {"mirageq": mirageq.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return ours | ({"commit": commit} if (commit := _commit()) else {})


def _commit() -> str | None:
    """The commit this package's code was taken from, "-dirty" behind it if it was changed since."""
    git = ["git", "-C", str(Path(mirageq.__file__).parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], check=True, capture_output=True)
        named = subprocess.run([*git, "describe", "--always", "--dirty"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return named.stdout.strip()


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
