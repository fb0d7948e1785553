"""Run the command line: `mirageq` or `python -m mirageq`."""

from __future__ import annotations

import sys

from mirageq.cli import main


def run() -> None:
    sys.exit(main())


if __name__ == "__main__":
    run()
