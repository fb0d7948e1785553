"""Methods side by side: a matrix of methods x bits x seeds on one network under one protocol, cell by cell.

A comparison is a folder: `protocol.json`, one line of `cells.jsonl` for each finished cell, and what is read off them
(`table.md`, `table.json`, `accuracy.png`, `features.png`). Images, students and unfinished work lie beside
it; what is unfinished is continued.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mirageq import recipe as recipes
from mirageq.data import LabelledImages
from mirageq.errors import UserError, first_line
from mirageq.evaluate import accuracy, intra_class_distance, silhouette
from mirageq.folders import alone, check_folder, file_name, replacing, write_text
from mirageq.hashing import hash_tensors, short_hash
from mirageq.images import Batch, ImageSource
from mirageq.journal import Journal, read_lines
from mirageq.pipeline import teach, untuned
from mirageq.plan import Cell, Plan
from mirageq.protocol import Protocol, first_difference
from mirageq.recipe import Recipe, Table
from mirageq.run import STUDENT, machine, peak_memory, versions
from mirageq.storage import save_student
from mirageq.teacher import Teacher
from mirageq.tuning.contract import forget

PROTOCOL, CELLS = "protocol.json", "cells.jsonl"
MEASURED_IMAGES = 1000  # images whose features are looked at

Row = dict[str, Any]


class Comparison:
    """The folder of a comparison.

    Args:
        folder: where figures are written.
        protocol: what they share.
        work: where images, students and unfinished cells are kept; `folder`/work by default.
    """

    def __init__(self, folder: Path, protocol: Protocol, work: Path | None = None) -> None:
        self.folder, self.protocol, self.work = folder, protocol, work or folder / "work"

    @staticmethod
    def open(folder: Path) -> Comparison:
        """The comparison in `folder`.

        Raises:
            UserError: there is none.
        """
        return Comparison(folder, Protocol.load(folder / PROTOCOL))

    @staticmethod
    def begin(
        folder: Path, network: str, teacher: Teacher, data: LabelledImages, wanted: Recipe, work: Path | None = None
    ) -> Comparison:
        """A new comparison, or the one in `folder` if its protocol is the same.

        Raises:
            UserError: the folder holds something else, or a comparison under another protocol.
        """
        path = folder / PROTOCOL
        before = Protocol.load(path) if path.exists() else None
        if before is None:
            check_folder(folder)
        full = (
            before.full_precision
            if before
            else accuracy(teacher, data, teacher.mean, teacher.std, device=str(teacher.device)).top1
        )
        protocol = Protocol.of(network, teacher, data.name, data, wanted, full)
        if before is None and path.exists():  # begun by another process meanwhile
            before = Protocol.load(path)
        if before:
            protocol.require_same(before, Path("This call"), folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            protocol.save(path)
        return Comparison(folder, protocol, work)

    def rows(self) -> list[Row]:
        """The finished cells; a last line cut short is left out.

        Raises:
            UserError: another line is damaged.
        """
        path = self.folder / CELLS
        rows, left_out = read_lines(path)
        if left_out > 1:
            raise UserError(f"{path} is damaged in line {len(rows) + 1}; mend that line or take it out.")
        return rows

    def fill(
        self, plan: Plan, teacher: Teacher, data: LabelledImages, console: Console, only: Sequence[str] = ()
    ) -> None:
        """Compute the plan's cells that are not finished, of those whose label contains all texts of `only`.

        Raises:
            UserError: something failed; told when all else is done.
        """
        wanted, errors = self.unfinished(plan, only), []
        for index, cell in enumerate(wanted):
            console.rule(f"{escape(cell.label)} ({index + 1} of {len(wanted)})")
            try:
                self.add(self.compute(plan.recipe_of(cell), cell, teacher, data, console), console)
            except UserError as error:
                errors.append(f"{cell.label}: {error}")
            except Exception as error:
                traceback.print_exc()
                errors.append(f"{cell.label}: {type(error).__name__}: {first_line(error)}")
        require_none(errors)

    def unfinished(self, plan: Plan, only: Sequence[str] = ()) -> list[Cell]:
        """The plan's cells that have no row yet, of those whose label contains all texts of `only`.

        Raises:
            UserError: a finished one was computed with other settings.
        """
        wanted = plan.cells(only)
        done = {row["label"]: row["recipe"] for row in self.rows()}
        for cell in wanted:
            if cell.label in done:
                before = recipes.describe(recipes.build(done[cell.label]))  # with settings added since
                _require_same_settings(before, recipes.describe(plan.recipe_of(cell)), cell.label)
        return [cell for cell in wanted if cell.label not in done]

    def add(self, row: Row, console: Console) -> None:
        """Keep the row of a finished cell, and tell its accuracy."""
        write_text(self.folder / CELLS, "".join(json.dumps(each) + "\n" for each in [*self.rows(), row]))
        forget(Journal(self._workplace(row["label"], row["recipe"])))
        told = f"{row['label']}: {row['top1']:.2f} (full precision {self.protocol.full_precision:.2f})"
        console.print(told, highlight=False, markup=False)

    def features(self) -> dict[str, Batch]:
        """Method -> penultimate features and labels of its images, for the methods whose work lies here."""
        found = {}
        for row in self.rows():
            path = self._images_of(row["method"], row["recipe"]["images"], row["seed"]) / "features.safetensors"
            if path.exists() and row["method"] not in found:
                try:
                    found[row["method"]] = Batch(**load_file(path))
                except SafetensorError as error:
                    raise UserError(f"{path} is damaged ({first_line(error)}); delete it.") from error
        return found

    def synthesize(self, wanted: Recipe, cell: Cell, teacher: Teacher, console: Console) -> tuple[ImageSource, Journal]:
        """The images of a cell, which all cells of its `images_folder` share, and the journal of making them.

        Raises:
            UserError: that folder has images of other settings.
        """
        folder = self.images_folder(wanted, cell)
        folder.mkdir(parents=True, exist_ok=True)
        made_by: Table = {
            "network": self.protocol.weights_sha256,
            "mean": teacher.mean and list(teacher.mean),  # with the deviation, the range of pixels
            "std": teacher.std and list(teacher.std),
            "method": recipes.describe_part(wanted.method),
        }
        with alone(
            folder / "lock", lambda: console.print(f"Another process is making {escape(folder.name)}; waiting.")
        ):
            _require_same_settings(_remembered(folder / "made_by.json", made_by), made_by, str(folder))
            painting = Journal(folder, console)
            with painting.timed("synthesize"):
                source = wanted.method.synthesize(teacher, wanted.images, seed=cell.seed, journal=painting)
        return source, painting

    def compute(self, wanted: Recipe, cell: Cell, teacher: Teacher, data: LabelledImages, console: Console) -> Row:
        """Make, calibrate, tune, measure and keep the student of a cell; what is finished of its images is read."""
        student = untuned(teacher, wanted)
        source, painting = self.synthesize(wanted, cell, teacher, console)
        workplace = self._workplace(cell.label, recipes.describe(wanted))
        workplace.mkdir(parents=True, exist_ok=True)
        learning = Journal(workplace, console)
        teach(teacher, student, source, wanted, seed=cell.seed, journal=learning)
        measured = accuracy(student, data, teacher.mean, teacher.std, teacher=teacher, device=str(teacher.device))
        looked_at = self._look_at(source, wanted.images, teacher, self.images_folder(wanted, cell))
        kept = save_student(student, teacher, workplace / STUDENT)
        return {
            "label": cell.label,
            "method": cell.method,
            "bits": cell.bits,
            "seed": cell.seed,
            "variant": cell.variant,
            "top1": measured.top1,
            "top5": measured.top5,
            "count": measured.count,
            "standard_error": measured.standard_error,
            "divergence": measured.divergence,
            "full_precision": self.protocol.full_precision,
            "images": looked_at,
            "recipe": recipes.describe(wanted),
            "seconds": {name: round(value, 1) for name, value in (painting.seconds | learning.seconds).items()},
            "peak_memory_bytes": peak_memory(),
            "bytes": student.size().total_bytes,
            "student_sha256": hash_tensors(kept),
            "machine": machine(teacher.device),
            "versions": versions(),
        }

    def _look_at(self, source: ImageSource, count: int, teacher: Teacher, folder: Path) -> Row:
        """What the images are like to the teacher, after the student has learnt from them."""
        sample = source.sample(min(count, MEASURED_IMAGES))
        shown, answers = [], []
        with torch.no_grad():
            for chunk in sample.images.split(64):
                seen = teacher.observe(chunk.to(teacher.device))  # with every norm's input: not to be kept
                shown.append(seen.features.float().cpu())
                answers.append(seen.logits.argmax(1).cpu())
        features, guessed = torch.cat(shown), torch.cat(answers)
        with replacing(folder / "features.safetensors") as written:
            save_file({"images": features, "labels": sample.labels.contiguous()}, written)
        return {
            "sha256": hash_tensors(sample._asdict()),
            "recognised": 100 * (guessed == sample.labels).float().mean().item(),
            "intra_class_distance": intra_class_distance(features, sample.labels),
            "silhouette": silhouette(features, sample.labels),
        }

    def images_folder(self, wanted: Recipe, cell: Cell) -> Path:
        """Where the images of a cell lie."""
        return self._images_of(cell.method, wanted.images, cell.seed)

    def _workplace(self, label: str, recipe: Table) -> Path:
        """Where a cell is computed: nothing of another recipe or network lies there."""
        told = json.dumps([self.protocol.weights_sha256, recipe], sort_keys=True)
        return self.work / "cells" / file_name(f"{label}-{short_hash(told)}")

    def _images_of(self, method: str, count: int, seed: int) -> Path:
        return self.work / "images" / file_name(f"{method}-{count}-seed{seed}")


def require_none(errors: Sequence[str]) -> None:
    """Raise a `UserError` that tells what failed, if anything did."""
    if errors:
        raise UserError("All else is finished, but not:\n" + "\n".join(errors))


def joined(comparisons: Sequence[Comparison]) -> list[Row]:
    """The rows of several comparisons; of two with one label the last.

    Raises:
        UserError: two of them were not made under one protocol.
    """
    first = comparisons[0]
    for other in comparisons[1:]:
        first.protocol.require_same(other.protocol, first.folder, other.folder)
    rows = [row for comparison in comparisons for row in comparison.rows()]
    return list({row["label"]: row for row in rows}.values())


def _remembered(path: Path, made_by: Table) -> Table:
    """What is noted in `path`, with the method's settings added since; `made_by`, if this is the first time."""
    if not path.exists():
        write_text(path, json.dumps(made_by))
    noted = json.loads(path.read_text())
    return noted | {"method": recipes.describe_part(recipes.build({"method": noted["method"]}).method)}


def _require_same_settings(before: Table, now: Table, what: str) -> None:
    if difference := first_difference(before, now):
        name, then, wanted = difference
        raise UserError(
            f"{what} was made with {name} = {then}, and the plan says {wanted}. "
            "Use another --out and --work, or give the method another label."
        )
