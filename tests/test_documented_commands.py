"""Every `mirageq` command that the documents and the benchmarks' plans show is one that the command line takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from mirageq import recipe
from mirageq.cli import COMMANDS
from mirageq.cli.arguments import parser
from mirageq.cli.options import recipe_table
from mirageq.plan import Plan

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/RESULTS.in.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.toml")),
]


def commands(document: Path) -> list[str]:
    """Lines that begin with `mirageq`, in a code block or a comment, with those that a backslash continues."""
    text = document.read_text()
    if document.suffix == ".toml":
        text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [line.strip() for line in lines if re.match(r"(  +)?mirageq [a-z]+ ", line)]


SHOWN = [pytest.param(line, id=f"{path.name}: {line[:60]}") for path in DOCUMENTS for line in commands(path)]


def test_commands_are_found():
    assert len(SHOWN) > 20


@pytest.mark.parametrize("line", SHOWN)
def test_a_command_is_taken(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)[1:]
    options = parser(COMMANDS).parse_args(words)
    if options.what == "compare" and (options.plan is None or options.plan.parts[0] == "benchmarks"):
        given = {"recipe": options.recipe, "bits": options.bits, "seeds": options.seeds}
        Plan.asked(options.plan, options.methods, given).check(options.only)
    elif options.what in ("quantize", "synthesize") and not options.resume and not getattr(options, "images", None):
        recipe.build(recipe_table(options))
