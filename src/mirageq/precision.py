"""In which numbers a teacher computes while images are made: float32, or bfloat16 on a device that has such numbers."""

from __future__ import annotations

from typing import Literal

import torch

from mirageq.journal import Journal

Precision = Literal["float32", "bfloat16"]

NOTE = "This device has no instructions for bfloat16, which would take ten times as long; images are made in float32."


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 itself; one without such instructions converts number by number."""
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The context in which a teacher computes in `precision`; always float32 where there is no bfloat16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16" and has_bfloat16(device))


def note_precision(precision: Precision, device: torch.device, journal: Journal) -> None:
    """Say, once a run, that float32 takes the place of bfloat16, if it does."""
    told = any(row.get("text") == NOTE for row in journal.history)
    if precision == "bfloat16" and not has_bfloat16(device) and not told:
        journal.say(NOTE)
