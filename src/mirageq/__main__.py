"""Run the command line: `mirageq` or `python -m mirageq`."""

from __future__ import annotations

import os
import sys

from mirageq.cli import main
from mirageq.process import compute_in_float32, keep_freed_memory


def run() -> None:
    keep_freed_memory()
    compute_in_float32()
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough: `mirageq methods intraq | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        code = 0
    sys.exit(code)


if __name__ == "__main__":
    run()
