"""What one activation costs while its block learns, at once and in pieces: python benchmarks/reconstruction_speed.py

Forward and backward through `tuning.soft.DroppingActivation`, in turn and as ratios within one run: with all numbers at
once against pieces that fit a core's cache.
"""

from __future__ import annotations

from functools import partial

import torch
from synthesis_speed import compare

from mirageq.process import keep_freed_memory
from mirageq.quant.quantizers import ActivationQuantizer
from mirageq.tuning import soft

SHAPES = (16, 96, 64, 64), (16, 144, 32, 32), (32, 64, 8, 8)


def main() -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    quantizer = ActivationQuantizer("x", 4, False)
    quantizer.set_range(torch.tensor(0.0), torch.tensor(6.0))
    activation = soft.DroppingActivation(quantizer, soft.Dropping(0.5, torch.Generator().manual_seed(0)))
    piece = soft.PIECE

    def update(x: torch.Tensor, pull: torch.Tensor, size: int) -> None:
        soft.PIECE = size
        activation(x).backward(pull)

    for shape in SHAPES:
        x, pull = (torch.randn(shape).contiguous(memory_format=torch.channels_last) for _ in range(2))
        x.requires_grad_()
        compare(f"{shape}, at once / in pieces", partial(update, x, pull, x.numel()), partial(update, x, pull, piece))


if __name__ == "__main__":
    main()
