"""Python modules of the user's own: by name, also from the working folder, or by file."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType


def module_of(source: str) -> ModuleType:
    """The module called `source`, or that of a file `source` ending in .py; raises what importing it raises."""
    if not source.endswith(".py"):
        with _importable(Path.cwd()):
            return importlib.import_module(source)
    spec = importlib.util.spec_from_file_location(Path(source).stem, Path(source).absolute())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _importable(Path(source).resolve().parent):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
