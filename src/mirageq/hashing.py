"""What tensors are known by, and folders."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def short_hash(text: str) -> str:
    """Eight digits of a text's SHA-256, for the name of a folder."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())  # NumPy knows no bfloat16
    return digest.hexdigest()
