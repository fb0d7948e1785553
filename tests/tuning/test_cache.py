from __future__ import annotations

import gc

import pytest
import torch

from mirageq.tuning.cache import Cache, Spilled


@pytest.mark.parametrize("limit", [0, 2**20])
def test_rows_come_back_from_memory_and_from_a_file_that_vanishes(limit, tmp_path):
    torch.manual_seed(0)
    images = torch.randn(70, 3, 4, 4)  # more than two chunks
    given = Cache(images, tmp_path, limit)
    assert isinstance(given._values, Spilled) == (limit == 0)
    assert torch.equal(given.take(torch.arange(70)), images)
    cache = given.through(torch.nn.Conv2d(3, 5, 3), torch.device("cpu"))
    assert isinstance(cache._values, Spilled) == (limit == 0)
    chosen = torch.tensor([69, 0, 33, 0])
    first = cache.take(chosen)
    assert cache.shape == (70, 5, 2, 2)
    assert first.shape == (4, 5, 2, 2)
    assert torch.equal(first[1], first[3])
    assert first.is_contiguous(memory_format=torch.channels_last)
    again = cache.through(torch.nn.Identity(), torch.device("cpu"))
    assert torch.equal(again.take(chosen), first)
    del given, cache, again
    gc.collect()
    assert list(tmp_path.iterdir()) == []
