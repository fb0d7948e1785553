"""The command line: parsing and printing, nothing else."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mirageq import reference
from mirageq.cli.arguments import parser
from mirageq.cli.making import compare, quantize, synthesize
from mirageq.cli.printing import console
from mirageq.cli.using import evaluate, export, pack, show
from mirageq.compare import PROTOCOL, Comparison
from mirageq.errors import UserError
from mirageq.folders import RECORD, resuming

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 2 a user's error, 130 interrupted."""
    options = parser(COMMANDS).parse_args(arguments)
    try:
        options.command(options)
    except UserError as error:
        print(f"mirageq: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"mirageq: {error.strerror or error}{where}. {_how_to_continue(options)}".rstrip(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nmirageq: interrupted. {_how_to_continue(options)}".rstrip(), file=sys.stderr)
        return INTERRUPTED
    return 0


def _how_to_continue(options: argparse.Namespace) -> str:
    out = getattr(options, "out", None)
    if out and (out / RECORD).exists():
        return f"Continue with: {resuming(out)}"
    if out and (out / PROTOCOL).exists():
        return f"{len(Comparison.open(out).rows())} cells in {out} are finished; the same command continues."
    return ""


def _look_up(options: argparse.Namespace) -> None:
    reference.show(options.what, getattr(options, "name", None), console)


COMMANDS = {
    "quantize": quantize,
    "synthesize": synthesize,
    "evaluate": evaluate,
    "compare": compare,
    "export": export,
    "pack": pack,
    "methods": _look_up,
    "tuners": _look_up,
    "scheme": _look_up,
    "recipes": _look_up,
    "show": show,
}
