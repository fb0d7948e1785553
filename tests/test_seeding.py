from __future__ import annotations

import torch

from mirageq.seeding import stream


def draw(*path):
    return torch.rand(3, generator=stream(*path)).tolist()


def test_streams_repeat_and_differ():
    assert draw(0, "noise", 1) == draw(0, "noise", 1)
    drawn = [draw(0, "noise", 1), draw(0, "noise", 2), draw(0, "loss", 1), draw(1, "noise", 1)]
    assert len({tuple(values) for values in drawn}) == 4
