"""How a process of our own computes: the command line's, not that of a program which imports this package."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
import threading

import torch

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of glibc's <malloc.h>
LARGEST_INT = 2**31 - 1


def compute_in_float32() -> None:
    """Let GPUs convolve in float32, not in TF32, PyTorch's default for convolutions, which keeps 10 bits of a number.

    A student computes with products of codes and float32 steps; cut to 10 bits, values fall on other codes than those
    an integer runtime finds. Processors compute in float32 anyway.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed instead of handing it back; whether it does.

    A freed tensor of some megabytes otherwise goes back to the system, and the next one is faulted in page by page: up
    to a third of the time of tuning 224 x 224 images on a CPU. Costs up to a fifth more memory. For glibc alone, where
    the two settings are known.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(MMAP_MAX, 0) and library.mallopt(TRIM_THRESHOLD, LARGEST_INT))


def ask_for_huge_pages() -> None:
    """Let processes that are begun from now on ask for huge pages, for which Linux often waits to be asked.

    It takes 6 % off tuning on a CPU. glibc reads it when a process begins, so this one is not changed; what the
    environment says of glibc already stands.
    """
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")


def end_with_parent() -> None:
    """End this process, begun by `multiprocessing`, as soon as the one that began it is gone, even if it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
