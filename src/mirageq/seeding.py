"""Randomness: named streams. Nothing in this package touches global random state."""

from __future__ import annotations

import hashlib

import torch


def stream(seed: int, *path: str | int) -> torch.Generator:
    """A CPU random generator of its own for each (seed, path).

    Streams do not depend on how much was drawn elsewhere, so part 7 of a set is the same whether or not parts
    0 to 6 were computed in this process, and on whatever device.
    """
    digest = hashlib.sha256(repr((seed, *path)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
