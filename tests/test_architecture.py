"""What docs/architecture.md says of the rooms: every file stands in the list, and imports point down it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import mirageq

PACKAGE = Path(mirageq.__file__).parent
DOCUMENT = Path(__file__).parent.parent / "docs" / "architecture.md"
SOURCES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def room(source: Path) -> str:
    return source.parts[0].removesuffix(".py")


def places() -> dict[str, int]:
    """Room -> the line of the list it stands in."""
    lines = re.findall(r"^\| (`\w+(?:\.py|/)`[^|]*)\|", DOCUMENT.read_text(), re.MULTILINE)
    return {name: place for place, line in enumerate(lines) for name in re.findall(r"`(\w+)(?:\.py|/)`", line)}


def test_every_room_stands_in_the_list():
    assert {room(source) for source in SOURCES} - {"__init__"} == set(places()) - {"recipes"}


@pytest.mark.parametrize("source", [source for source in SOURCES if source.parts != ("__init__.py",)], ids=str)
def test_imports_point_down_the_list(source):
    order = places()
    imported = [
        module.split(".")[1:2] or [alias.name for alias in node.names]
        for node in ast.walk(ast.parse((PACKAGE / source).read_text()))
        if isinstance(node, ast.ImportFrom) and (module := node.module or "").split(".")[0] == "mirageq"
    ]
    above = {name for names in imported for name in names if order.get(name, order[room(source)]) < order[room(source)]}
    assert not above
