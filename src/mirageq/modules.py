"""Python modules of the user's own: by name, also from the working folder, or by file."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

FILE = "file "
"""What the name of a module begins with that was read from a file by its path."""


def module_of(source: str) -> ModuleType:
    """The module called `source`, or that of a file `source` ending in .py; raises what importing it raises."""
    with importable(source):
        if not source.endswith(".py"):
            return importlib.import_module(source)
        path = str(Path(source).absolute())
        name = FILE + path.replace(".", "_")  # no other module's, and without the dots of a package
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)  # dataclasses look for their module there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module


def source_of(kind: type) -> str:
    """What `module_of` finds the module by that a class was defined in."""
    if not kind.__module__.startswith(FILE):
        return kind.__module__
    path = sys.modules[kind.__module__].__file__
    assert path is not None
    return path


@contextlib.contextmanager
def importable(source: str) -> Iterator[None]:
    """While this lasts, what lies beside a file can be imported; beside a module by name, the working folder counts."""
    folder = str(Path(source).resolve().parent if source.endswith(".py") else Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
