"""Cells of a comparison in parallel, each in a process of its own: one alone keeps no GPU busy, nor many cores."""

from __future__ import annotations

import json
import multiprocessing
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mirageq.compare import Comparison, require_none
from mirageq.data import open_images
from mirageq.errors import UserError
from mirageq.folders import file_name, write_text
from mirageq.hashing import short_hash
from mirageq.models import NetworkChoice, load_teacher
from mirageq.pipeline import untuned
from mirageq.plan import Cell, Plan
from mirageq.process import ask_for_huge_pages, compute_in_float32, end_with_parent, keep_freed_memory
from mirageq.recipe import Recipe
from mirageq.teacher import Teacher


@dataclass(frozen=True)
class Setting:
    """What a process needs to know: a comparison that was begun, its plan, its network, and its labelled images."""

    comparison: Comparison
    plan: Plan
    choice: NetworkChoice
    device: str
    data: str
    resize: int | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Task:
    """A cell, or the images that several cells share; `images` is the folder where they lie."""

    cells: tuple[Cell, ...]
    images: Path

    @property
    def only_images(self) -> bool:
        return len(self.cells) > 1

    @property
    def label(self) -> str:
        return f"images of {self.images.name}" if self.only_images else self.cells[0].label


def fill_in_parallel(setting: Setting, jobs: int, console: Console, only: Sequence[str] = ()) -> None:
    """As `Comparison.fill`, with up to `jobs` processes at a time, which share the threads; each writes a log.

    Images that several cells share are made first, once. What fails does not keep the rest from being computed.

    Raises:
        UserError: something failed; told when all else is done.
    """
    to_do, running, errors = _tasks(setting, only), dict[Task, BaseProcess](), []
    threads = max(torch.get_num_threads() // jobs, 1)
    ask_for_huge_pages()
    try:
        while to_do or running:
            awaited = {task.images for task in (*to_do, *running) if task.only_images}
            ready = [task for task in to_do if task.only_images or task.images not in awaited]
            for task in ready[: jobs - len(running)]:
                to_do.remove(task)
                running[task] = _begin(setting, task, threads)
                console.print(
                    f"{task.label}: begun; its log is {_paper(setting, task, 'log')}", highlight=False, markup=False
                )
            wait([process.sentinel for process in running.values()])
            for task in [task for task, process in running.items() if not process.is_alive()]:
                running.pop(task).join()
                result = json.loads(_paper(setting, task, "json").read_text())
                if "row" in result:
                    setting.comparison.add(result["row"], console)
                if "error" in result:
                    errors.append(f"{task.label}: {result['error']}")
                    to_do = [other for other in to_do if not task.only_images or other.images != task.images]
    finally:
        for process in running.values():
            process.terminate()
    require_none(errors)


def _tasks(setting: Setting, only: Sequence[str]) -> list[Task]:
    """The images that two or more cells share, then the cells."""
    comparison, plan = setting.comparison, setting.plan
    cells = comparison.unfinished(plan, only)
    tasks = [Task((cell,), comparison.images_folder(plan.recipe_of(cell), cell)) for cell in cells]
    sharing: dict[Path, tuple[Cell, ...]] = {}
    for task in tasks:
        sharing[task.images] = sharing.get(task.images, ()) + task.cells
    return [*(Task(cells, folder) for folder, cells in sharing.items() if len(cells) > 1), *tasks]


def _begin(setting: Setting, task: Task, threads: int) -> BaseProcess:
    paper = _paper(setting, task, "json")
    paper.parent.mkdir(parents=True, exist_ok=True)
    write_text(paper, json.dumps({"error": f"its process ended; see {_paper(setting, task, 'log')}"}))
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(setting, task, threads), daemon=True)
    process.start()
    return process


def _paper(setting: Setting, task: Task, ending: str) -> Path:
    """Where a task writes its log, or its result: a place of this comparison's own, if others share its work."""
    folder = setting.comparison.folder
    own = f"{folder.name}-{short_hash(str(folder.resolve()))}"
    return setting.comparison.work / "tasks" / own / f"{file_name(task.label)}.{ending}"


def _work(setting: Setting, task: Task, threads: int) -> None:
    """A process: do the task and write down what came of it, `{"row": ...}`, `{"error": ...}`, or nothing."""
    end_with_parent()
    keep_freed_memory()
    compute_in_float32()
    torch.set_num_threads(threads)
    with _paper(setting, task, "log").open("w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            result = _result(setting, task, Console(file=log))
        except UserError as error:
            result = {"error": str(error)}
        except KeyboardInterrupt:
            return
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}; see {log.name}"}
    write_text(_paper(setting, task, "json"), json.dumps(result))


def _result(setting: Setting, task: Task, console: Console) -> dict[str, Any]:
    comparison, teacher = setting.comparison, load_teacher(setting.choice, setting.device)
    wanted = {cell: setting.plan.recipe_of(cell) for cell in task.cells}
    if task.only_images:
        if fitting := next((cell for cell, recipe in wanted.items() if _fits(teacher, recipe)), None):
            comparison.synthesize(wanted[fitting], fitting, teacher, console)
        return {}  # those that do not fit will say why themselves
    data = open_images(setting.data, teacher.image_shape, resize=setting.resize, limit=setting.limit)
    (cell,) = task.cells
    return {"row": comparison.compute(wanted[cell], cell, teacher, data, console)}


def _fits(teacher: Teacher, recipe: Recipe) -> bool:
    try:
        untuned(teacher, recipe)
    except Exception:
        return False
    return True
