from __future__ import annotations

import pytest
import torch
from torch import nn

from mirageq.graph import capture
from mirageq.observe import Observer

SHAPE = (3, 9, 9)


class Strided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.other = nn.Conv2d(4, 5, 3, stride=2), nn.BatchNorm2d(5)
        self.last = nn.Linear(5, 6)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.last(torch.relu(self.other(self.second(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return capture(Strided(), SHAPE)


def test_only_what_follows_a_stride_swings_and_the_network_stays(network):
    images = torch.randn(4, *SHAPE)
    plain = Observer(network)(images)
    observe = Observer(network, swing=True)
    generator = torch.Generator().manual_seed(0)
    seen = [observe(images, generator) for _ in range(12)]
    for one in seen:
        assert torch.equal(one.bn_inputs["norm"], plain.bn_inputs["norm"])
    moved = [not torch.equal(one.logits, plain.logits) for one in seen]
    assert any(moved)
    assert not all(moved)  # one shift of nine is none
    assert torch.equal(Observer(network)(images).logits, plain.logits)
    again = observe(images, torch.Generator().manual_seed(0))
    assert torch.equal(again.logits, seen[0].logits)
