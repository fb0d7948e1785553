"""Where a long computation tells how it goes, and keeps what it needs to go on after an interruption."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from mirageq.errors import UserError
from mirageq.folders import replacing, write_text

HISTORY, SECONDS = "history.jsonl", "seconds.json"

Advance = Callable[..., None]
"""`advance(step, **values)`: step `step` (0-based) is done, with these numbers to remember."""


class Journal:
    """History, progress bars and checkpoints of one run.

    Without a folder the history stays in memory and nothing can be resumed; without a console nothing is shown.

    Args:
        folder: an existing directory; `history.jsonl` and `checkpoints/` are kept in it.
        console: where progress bars are drawn.
        checkpoint_seconds: the least time between two checkpoints of one computation.
    """

    def __init__(
        self, folder: Path | None = None, console: Console | None = None, *, checkpoint_seconds: float = 30.0
    ) -> None:
        self.folder, self.console, self.checkpoint_seconds = folder, console, checkpoint_seconds
        self._file = folder / HISTORY if folder else None
        self.history = read_history(self._file) if self._file else []
        if self._file and self._file.exists() and not self._file.read_text().endswith("\n"):
            self._rewrite()  # without the line that was cut short
        self.seconds: dict[str, float] = {}
        self._finished: list[str] = []
        self._clock: tuple[str, float] | None = None
        self._above: Journal | None = None
        if folder and (folder / SECONDS).exists():
            noted = json.loads((folder / SECONDS).read_text())
            self.seconds, self._finished = noted["seconds"], noted["finished"]
        self._known = set(self._finished)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the wall-clock seconds spent inside to `seconds[name]`, with those of calls that were interrupted.

        A call that is killed counts up to its last checkpoint; one after the first that ended, in a later journal of
        this folder, not at all: it only reads what was made.
        """
        if name in self._known:
            yield
            return
        self._clock = name, time.perf_counter()
        try:
            yield
            self._finished.append(name)
        finally:
            self._note_time()
            self._clock = None

    @contextmanager
    def stage(self, name: str, total: int, *, start: int = 0) -> Iterator[Advance]:
        """Show and record a stage of `total` steps, of which `start` are already done.

        Rows of this stage from step `start` on, left by an interrupted run that got further than its last
        checkpoint, are dropped: they will be computed again.
        """
        kept = [row for row in self.history if row["stage"] != name or row["step"] < start]
        if len(kept) < len(self.history):
            self.history = kept
            self._rewrite()
        with self._progress() as progress:
            bar = progress.add_task(name, total=total, completed=start, note="")

            def advance(step: int, **values: float) -> None:
                self._append({"stage": name, "step": step, **values})
                progress.update(bar, completed=step + 1, note=_brief(values))

            yield advance

    def say(self, text: str) -> None:
        """Print a line above the progress bars and keep it in the history."""
        self._append({"stage": "note", "step": len(self.history), "text": text})
        if self.console:
            self.console.print(text, highlight=False, markup=False)

    def within(self, name: str) -> Journal:
        """The journal of a part of this run, in a subfolder of its own."""
        folder = self.folder / name if self.folder else None
        if folder:
            folder.mkdir(exist_ok=True)
        part = self._alike(folder)
        part._above = self
        return part

    def checkpoint(self, name: str) -> Checkpoint:
        """The checkpoint slot `name` of this run."""
        path = self.folder / "checkpoints" / f"{name}.pt" if self.folder else None
        return Checkpoint(path, self.checkpoint_seconds, self._note_time)

    def _alike(self, folder: Path | None) -> Journal:
        """A journal of this kind for a part."""
        return Journal(folder, self.console, checkpoint_seconds=self.checkpoint_seconds)

    def _note_time(self) -> None:
        if self._above:
            self._above._note_time()
        if self._clock:
            (name, since), now = self._clock, time.perf_counter()
            self.seconds[name] = self.seconds.get(name, 0.0) + now - since
            self._clock = name, now
            if self.folder:
                noted = {"seconds": self.seconds, "finished": self._finished}
                write_text(self.folder / SECONDS, json.dumps(noted) + "\n")

    def _append(self, row: dict[str, Any]) -> None:
        self.history.append(row)
        if self._file:
            with self._file.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def _rewrite(self) -> None:
        if self._file:
            write_text(self._file, "".join(json.dumps(row) + "\n" for row in self.history))

    def _progress(self) -> Progress:
        whole, rest = Column(no_wrap=True), Column(no_wrap=True, overflow="ellipsis", ratio=1)
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=16, table_column=whole),
            MofNCompleteColumn(table_column=whole),
            TimeElapsedColumn(table_column=whole),
            TextColumn("left"),
            TimeRemainingColumn(table_column=whole),
            TextColumn("{task.fields[note]}", table_column=rest),
        )
        return Progress(*columns, console=self.console, disable=self.console is None, expand=True)


class Checkpoint:
    """One resumable state on disk, replaced atomically; does nothing without a path."""

    def __init__(self, path: Path | None, seconds: float, saved: Callable[[], None]) -> None:
        self.path, self.seconds, self._saved, self._saved_at = path, seconds, saved, time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The saved state, its tensors on the CPU, or None."""
        if self.path is None or not self.path.exists():
            return None
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged file makes of it
            raise UserError(f"{self.path} is damaged; without it, its part is computed anew.") from error

    def offer(self, state: Callable[[], dict[str, Any]]) -> None:
        """Save `state()` if the last time is long enough ago."""
        if self.path and time.monotonic() - self._saved_at >= self.seconds:
            self.save(state())

    def save(self, state: dict[str, Any]) -> None:
        """Save now."""
        if self.path:
            self.path.parent.mkdir(exist_ok=True)
            with replacing(self.path) as written, written.open("wb") as file:  # a path would hide what the system says
                torch.save(state, file)
            self._saved()
            self._saved_at = time.monotonic()

    def clear(self) -> None:
        """Delete it, and its folder if it was the last one there."""
        if self.path:
            self.path.unlink(missing_ok=True)
            with suppress(OSError):
                self.path.parent.rmdir()


def read_history(path: Path) -> list[dict[str, Any]]:
    """The rows of a `history.jsonl`, if there is one; a last line cut short by an interruption is left out."""
    return read_lines(path)[0]


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a file of JSON lines, if there is one, up to the first damaged line; and how many lines are left."""
    rows: list[dict[str, Any]] = []
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows, len(lines) - len(rows)


def _brief(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3g}" for name, value in values.items())
