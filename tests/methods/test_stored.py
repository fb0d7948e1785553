from __future__ import annotations

import pytest
import torch

from mirageq.errors import UserError
from mirageq.images import SyntheticSet
from mirageq.methods.stored import Stored
from mirageq.teacher import Teacher
from mirageq.testing import SHAPE, TinyResNet


@pytest.fixture
def teacher():
    return Teacher.wrap(TinyResNet(), SHAPE)


def stored(folder, *shape: int) -> Stored:
    path = folder / "images.safetensors"
    SyntheticSet(torch.randn(4, *shape), torch.arange(4)).save(path)
    return Stored(path=str(path))


@pytest.mark.parametrize("shape", [SHAPE, (3, 8, 8)])
def test_images_of_any_size_that_the_network_takes_are_read(shape, teacher, tmp_path):
    sample = stored(tmp_path, *shape).synthesize(teacher, 3).sample(3)
    assert sample.images.shape == (3, *shape)
    assert sample.labels.tolist() == [0, 1, 2]


def test_images_of_another_network_or_too_few_are_refused(teacher, tmp_path):
    path = tmp_path / "classes.safetensors"
    SyntheticSet(torch.randn(2, *SHAPE), torch.tensor([0, 7])).save(path)
    with pytest.raises(UserError, match="holds images of class 7, and the network has 5 classes. Give images made for"):
        Stored(path=str(path)).synthesize(teacher, 2)
    with pytest.raises(UserError, match=r"holds images of shape \(1, 16, 16\), and the network takes \(3, 16, 16\)"):
        stored(tmp_path, 1, *SHAPE[1:]).synthesize(teacher, 4)
    with pytest.raises(UserError, match="holds 4 images, and 5 were asked for"):
        stored(tmp_path, *SHAPE).synthesize(teacher, 5)
