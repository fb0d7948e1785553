"""Where results may be written, and how a file is replaced at once."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mirageq.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RECORD = "run.json"
"""The file that makes a folder a run's."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file first, so that an interruption leaves the old one or the new one, never a part.

    Several processes may do so at once; the last one's file stays.
    """
    written = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        yield written
        written.chmod(0o666 & ~_umask())  # as any new file; safetensors would let its owner alone read it
        os.replace(written, path)
    finally:
        written.unlink(missing_ok=True)


def _umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


@contextmanager
def alone(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Work in the folder of this file, as the only process that does.

    With `waiting` the file need not exist, and where another process is at work, this is called, and it is waited for.

    Raises:
        UserError: another process is at work there.
    """
    if not fcntl:
        yield
        return
    with path.open("a" if waiting else "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if not waiting:
                raise UserError(f"Another process is at work in {path.parent}; wait for it, or stop it.") from error
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield


def write_text(path: Path, text: str) -> None:
    """Write a file, wholly or not at all."""
    with replacing(path) as written:
        written.write_text(text, "utf-8")


def file_name(label: str) -> str:
    """A label as the name of a file or folder.

    >>> file_name("zeroq, short w4a4 seed0")
    'zeroq,_short_w4a4_seed0'
    """
    return re.sub(r'[ /\\:*?"<>|]', "_", label)


def resuming(run: Path) -> str:
    """The command that goes on with a run, as a shell takes it."""
    return f"mirageq quantize --resume {shlex.quote(str(run))}"


def check_folder(folder: Path) -> None:
    """Raise a `UserError` unless `folder` is a place where a new run can be written; creates nothing."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"The output {folder} is a file; give a folder.")
    if (folder / RECORD).exists():
        raise UserError(
            f"{folder} already holds a run. Give another folder, or continue that run, if it is unfinished, with: "
            f"{resuming(folder)}"
        )
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"The output folder {folder} is not empty; give a new or empty one.")
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"The output folder {folder} cannot be written: {error.strerror}.") from error
