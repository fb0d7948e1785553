from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

import pytest
import torch

from mirageq import Journal

torch.set_num_threads(1)  # small tensors: threads only fight over the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start


@pytest.fixture(autouse=True)
def repeatable(monkeypatch):
    """The same random numbers in whatever order tests run; no time spent on the latency of files."""
    torch.manual_seed(0)
    monkeypatch.setattr(import_module("mirageq.export.verify"), "LATENCY_SECONDS", 0.0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real networks and images that some tests measure on; it is not part of the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "zoo.py").is_file():
        pytest.skip(f"needs the measurement data, which are not at {folder}")
    return folder


class Tokens(torch.nn.Module):
    """Norms of one dimension: of all tokens of all images together, and of one vector an image."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.BatchNorm2d(8)
        self.mix, self.bn_tokens = torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)
        self.bn_last, self.fc = torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 5)
        self.eval()

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x))).flatten(2).transpose(1, 2)
        tokens = torch.relu(self.bn_tokens(self.mix(x).flatten(0, 1)).reshape(x.shape))
        return self.fc(self.bn_last(tokens.mean(1)))


@pytest.fixture
def tokens():
    """A network whose norms see tokens and vectors besides maps."""
    return Tokens()


class SequenceFirst(torch.nn.Module):
    """Tokens in front of images in the middle, and a table of positions that goes through a layer of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = torch.nn.Conv2d(3, 4, 4, stride=4), torch.nn.Linear(4, 5)
        self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.table, self.positions = torch.nn.Parameter(torch.randn(16, 2)), torch.nn.Linear(2, 4)
        self.eval()

    def forward(self, x):
        tokens = torch.relu(self.conv(x)).flatten(2).permute(2, 0, 1)  # (T, N, C)
        tokens = torch.relu(self.a(tokens)) + torch.relu(self.positions(self.table))[:, None]
        return self.fc(torch.relu(self.b(tokens)).mean(0))


@pytest.fixture
def sequence_first():
    return SequenceFirst()


class Stumbling(Journal):
    """Interrupts the computation at so many rows; a checkpoint is saved whenever one is offered."""

    def __init__(self, folder, rows):
        super().__init__(folder, checkpoint_seconds=0)
        self.rows = rows

    def _append(self, row):
        super()._append(row)
        if len(self.history) == self.rows:
            raise KeyboardInterrupt


@pytest.fixture
def stumbling():
    """The journal class that interrupts: stumbling(folder, rows)."""
    return Stumbling


@pytest.fixture
def half_written():
    """A `save_file` that is interrupted in the middle of the file."""

    def save_file(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    return save_file
