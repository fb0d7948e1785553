from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mirageq import Scheme, Teacher
from mirageq.quant import convert
from mirageq.quant.blocks import between, find_blocks, single_layers
from mirageq.quant.quantizers import ActivationQuantizer
from mirageq.testing import SHAPE, TinyDense, TinyResNet


def blocks_of(network, placement="paper", fewest=1):
    teacher = Teacher.wrap(network, SHAPE)
    student = convert(teacher.network, Scheme(placement=placement))
    student.calibrate([torch.randn(8, *SHAPE)])
    graph = student.logits_network()
    (output,) = graph.graph.find_nodes(op="output")
    return student, graph, find_blocks(graph, output.args[0], fewest)


@pytest.mark.parametrize("placement", ["paper", "deploy"])
def test_a_residual_block_lies_between_two_cuts(placement):
    _, _, blocks = blocks_of(TinyResNet(), placement)
    assert [block.layers for block in blocks] == [("conv1",), ("conv2",), ("conv3",), ("linear",)]


def test_a_block_ends_behind_its_activation_function_and_quantizer():
    network = nn.Sequential(*(part for _ in range(3) for part in (nn.Conv2d(3, 3, 3), nn.ReLU6())), nn.Flatten())
    _, graph, blocks = blocks_of(nn.Sequential(network, nn.Linear(300, 5)).eval(), "deploy")
    assert len(blocks) == 4
    for block in blocks[:-1]:
        assert isinstance(graph.get_submodule(block.end.target), ActivationQuantizer)


def test_what_has_no_cut_is_one_block():
    _, _, blocks = blocks_of(TinyDense())
    assert [block.layers for block in blocks] == [("first",), ("layers.0", "layers.1", "layers.2"), ("last",)]


@pytest.mark.parametrize("placement", ["paper", "deploy"])
def test_single_layers_of_a_block_end_behind_their_activation_function_and_quantizer(placement):
    _, graph, blocks = blocks_of(TinyDense(), placement)
    singles = single_layers(graph, blocks[1])
    assert [single.layers for single in singles] == [("layers.0",), ("layers.1",), ("layers.2",)]
    for single in singles:
        assert isinstance(graph.get_submodule(single.end.target), ActivationQuantizer)


def test_a_single_layer_that_a_sum_reads_ends_before_the_sum():
    _, graph, blocks = blocks_of(TinyResNet(), "paper", fewest=4)
    assert [len(block.layers) for block in blocks] == [3, 1]
    ends = {single.layers[0]: single.end for single in single_layers(graph, blocks[0])}
    assert all("add" not in str(end.target) for end in ends.values())
    assert isinstance(graph.get_submodule(ends["conv1"].target), ActivationQuantizer)


@pytest.mark.parametrize("placement", ["paper", "deploy"])
def test_small_neighbours_are_joined_but_not_across_the_pooling(placement):
    _, _, blocks = blocks_of(TinyResNet(), placement, fewest=2)
    assert [block.layers for block in blocks] == [("conv1", "conv2"), ("conv3",), ("linear",)]
    assert blocks[0].name == "conv1 - conv2"


@pytest.mark.parametrize("network", [TinyResNet, TinyDense])
@pytest.mark.parametrize("placement", ["paper", "deploy"])
@pytest.mark.parametrize("fewest", [1, 2])
def test_blocks_one_after_the_other_are_the_network(network, placement, fewest):
    student, graph, blocks = blocks_of(network(), placement, fewest)
    images = torch.randn(5, *SHAPE)
    x = images
    with torch.no_grad():
        for block in blocks:
            x = between(graph, block.start, block.end)(x)
        assert torch.equal(x, student(images))


def test_a_flattening_by_batch_size_stays_inside_its_block():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 2, 3, padding=1), nn.Linear(2 * 16 * 16, 5)
            self.eval()

        def forward(self, x):
            x = F.relu(self.conv(x))
            return self.linear(x.view(x.shape[0], -1))

    student, graph, blocks = blocks_of(Flat())
    assert len(blocks) == 2
    images = torch.randn(3, *SHAPE)
    with torch.no_grad():
        x = between(graph, blocks[0].start, blocks[0].end)(images)
        assert torch.equal(between(graph, blocks[1].start, blocks[1].end)(x), student(images))


class Inverted(nn.Module):
    """Inverted residual blocks in a row, without an activation function behind their sums."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)
        self.wide = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)) for _ in range(3))
        self.narrow = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)) for _ in range(3))
        self.eval()

    def forward(self, x):
        x = F.relu(self.stem(x))
        for wide, narrow in zip(self.wide, self.narrow, strict=True):
            x = x + narrow(F.relu6(wide(x)))
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("placement", ["paper", "deploy"])
def test_inverted_residual_blocks_in_a_row_stay_blocks(placement):
    _, _, blocks = blocks_of(Inverted(), placement)
    layers = [block.layers for block in blocks]
    assert layers[1:4] == [(f"wide.{index}.0", f"narrow.{index}.0") for index in range(3)]


def test_borders_count_images_and_layers_of_a_table_are_left_alone(sequence_first):
    _, network, blocks = blocks_of(sequence_first, "deploy")
    assert [block.layers for block in blocks] == [("conv",), ("a", "positions", "b"), ("fc",)]
    assert single_layers(network, blocks[1]) == []
