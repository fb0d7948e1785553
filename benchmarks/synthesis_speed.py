"""What a synthesis step costs, and what three choices save: python benchmarks/synthesis_speed.py [NETWORK]

Compares, in turn and as ratios within one run: batch statistics by `moments.channel_statistics` against
`torch.var_mean`, a generator's convolution by `convolve_doubled` against doubling the image first, and the whole step
in float32 against bfloat16 autocast. NETWORK: a name in `benchmarks/networks.py`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from mirageq.generator import convolve_doubled
from mirageq.losses import bn_alignment
from mirageq.models import NetworkChoice, load_teacher
from mirageq.moments import channel_statistics

ROUNDS = 7


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "cifar10_akamaster"
    teacher = load_teacher(NetworkChoice(name=f"py:{Path(__file__).resolve().parent / 'networks.py'}:{name}"))
    count = 64 if teacher.image_shape[-1] < 100 else 8
    images = torch.randn(count, *teacher.image_shape, requires_grad=True)
    x = torch.randn(64, 64, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()  # as when painting

    def step(precision: torch.dtype) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = bn_alignment(teacher.observe(images), teacher.batch_norms)
        loss.backward()

    def centred() -> None:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        (mean.sum() + var.sum()).backward()

    def fused() -> None:
        mean, var = channel_statistics(x)
        (mean.sum() + var.sum()).backward()

    small, convolution = torch.randn(64, 128, 16, 16, requires_grad=True), torch.nn.Conv2d(128, 64, 3, padding=1)

    compare("batch statistics, var_mean / channel_statistics", centred, fused)
    compare(
        "a generator's convolution, doubled first / convolve_doubled",
        lambda: convolution(F.interpolate(small, scale_factor=2)).sum().backward(),
        lambda: convolve_doubled(small, convolution).sum().backward(),
    )
    compare(
        f"step of {count} images on {name}, float32 / bfloat16",
        lambda: step(torch.float32),
        lambda: step(torch.bfloat16),
    )


def compare(title: str, slow: Callable[[], None], fast: Callable[[], None]) -> None:
    """Print the median ratio of the two, timed in turn."""
    pairs = [(seconds(slow), seconds(fast)) for _ in range(ROUNDS + 1)][1:]
    ratios = sorted(first / second for first, second in pairs)
    times = [statistics.median(column) for column in zip(*pairs, strict=True)]
    print(
        f"{title}: {times[0] * 1e3:.1f} ms / {times[1] * 1e3:.1f} ms = {statistics.median(ratios):.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


def seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
