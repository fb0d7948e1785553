"""Run the command line: `mirageq` or `python -m mirageq`."""

from __future__ import annotations

import sys

from mirageq.cli import main
from mirageq.memory import keep_freed_memory


def run() -> None:
    keep_freed_memory()
    sys.exit(main())


if __name__ == "__main__":
    run()
