from __future__ import annotations

import pytest
import torch

from mirageq import recipe
from mirageq.errors import UserError
from mirageq.images import SyntheticSet
from mirageq.methods.genie import Genie
from mirageq.methods.noise import Noise
from mirageq.methods.selectq import SelectQ
from mirageq.methods.stored import Stored
from mirageq.methods.union import Union
from mirageq.methods.zeroq import ZeroQ
from mirageq.teacher import Teacher
from mirageq.testing import SHAPE, TinyResNet

ZEROQ = ZeroQ(iterations=2, batch_size=4)


def rows(images):
    return {tuple(image.flatten().tolist()) for image in images.half()}


def test_it_holds_what_each_method_makes_alone_and_mixes_them():
    teacher = Teacher.wrap(TinyResNet(), SHAPE)
    both = Union(first=Noise(), second=ZEROQ).synthesize(teacher, 16, seed=3)
    noise = rows(Noise().synthesize(teacher, 8, seed=3).sample(8).images)
    painted = rows(ZEROQ.synthesize(teacher, 8, seed=3).sample(8).images)
    assert rows(both.sample(16).images) == noise | painted
    assert 0 < len(noise & rows(both.sample(8).images)) < 8  # not one after the other


def test_three_methods_share_as_evenly_as_they_can():
    teacher = Teacher.wrap(TinyResNet(), SHAPE)
    genie = Genie(iterations=1, batch_size=4, latent=4, width=4)
    made = rows(Union(first=Noise(), second=ZEROQ, third=genie).synthesize(teacher, 11, seed=3).sample(11).images)
    for method, count in ((Noise(), 4), (ZEROQ, 4), (genie, 3)):
        part = rows(method.synthesize(teacher, count, seed=3).sample(count).images)
        assert len(part) == count
        assert part <= made


def test_a_recipe_holds_both_methods():
    table = {"method": {"name": "union", "second": {"name": "zeroq", "iterations": 2, "batch_size": 4}}}
    built = recipe.build(table)
    assert built.method == Union(second=ZEROQ)
    assert recipe.build(recipe.describe(built)) == built
    built = recipe.build({"method": {**table["method"], "third": {"name": "genie", "width": 32}}})
    assert built.method == Union(second=ZeroQ(iterations=2, batch_size=4), third=Genie(width=32))
    assert recipe.build(recipe.describe(built)) == built


def test_what_cannot_be_joined_is_refused(monkeypatch):
    teacher = Teacher.wrap(TinyResNet(), SHAPE)
    with pytest.raises(UserError, match="union of 3 methods has as many images at least; got 2"):
        Union(third=Noise()).synthesize(teacher, 2)
    small = ZeroQ(iterations=1, batch_size=4, image_size=8)
    painted = []
    monkeypatch.setattr(ZeroQ, "synthesize", lambda *_, **__: painted.append(1))
    for second in (ZEROQ, SelectQ(candidates=ZEROQ)):
        with pytest.raises(UserError, match=r"one shape.*\(3, 8, 8\) and \(3, 16, 16\)"):
            Union(first=small, second=second).synthesize(teacher, 4)
    assert painted == []


def test_images_of_a_file_must_have_the_shape_of_the_others(tmp_path):
    SyntheticSet(torch.randn(4, 3, 8, 8), torch.arange(4)).save(tmp_path / "images.safetensors")
    stored = Stored(path=str(tmp_path / "images.safetensors"))
    with pytest.raises(UserError, match=r"one shape.*\(3, 8, 8\) and \(3, 16, 16\)"):
        Union(first=Noise(), second=stored).synthesize(Teacher.wrap(TinyResNet(), SHAPE), 4)
