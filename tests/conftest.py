from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # small tensors: threads only fight over the cores


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real networks and images that some tests measure on; it is not part of the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "zoo.py").is_file():
        pytest.skip(f"needs the measurement data, which are not at {folder}")
    return folder
