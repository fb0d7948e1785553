from __future__ import annotations

import pytest

from mirageq import recipe
from mirageq.errors import UserError
from mirageq.methods.noise import Noise
from mirageq.methods.union import Union
from mirageq.methods.zeroq import ZeroQ
from mirageq.teacher import Teacher
from mirageq.testing import SHAPE, TinyResNet

ZEROQ = ZeroQ(iterations=2, batch_size=4)


def rows(images):
    return {tuple(image.flatten().tolist()) for image in images.half()}


def test_it_holds_what_each_method_makes_alone_and_mixes_them():
    teacher = Teacher.wrap(TinyResNet(), SHAPE)
    both = Union(first=Noise(), second=ZEROQ, share=0.75).synthesize(teacher, 16, seed=3)
    noise = rows(Noise().synthesize(teacher, 12, seed=3).sample(12).images)
    painted = rows(ZEROQ.synthesize(teacher, 4, seed=3).sample(4).images)
    assert rows(both.sample(16).images) == noise | painted
    assert len(noise & rows(both.sample(8).images)) < 8  # not one after the other


def test_each_method_has_a_part_however_small_its_share():
    teacher = Teacher.wrap(TinyResNet(), SHAPE)
    both = Union(first=Noise(), second=ZEROQ, share=0.01).synthesize(teacher, 4)
    assert len(rows(both.sample(4).images) & rows(ZEROQ.synthesize(teacher, 3).sample(3).images)) == 3


def test_a_recipe_holds_both_methods():
    table = {"method": {"name": "union", "second": {"name": "zeroq", "iterations": 2, "batch_size": 4}}}
    built = recipe.build(table)
    assert built.method == Union(second=ZEROQ)
    assert recipe.build(recipe.describe(built)) == built


def test_what_cannot_be_joined_is_refused():
    teacher = Teacher.wrap(TinyResNet(), SHAPE)
    with pytest.raises(UserError, match=r"share is the first method's part.*got 1\.5"):
        Union(share=1.5)
    with pytest.raises(UserError, match="at least 2 images"):
        Union().synthesize(teacher, 1)
    small = ZeroQ(iterations=1, batch_size=4, image_size=8)
    with pytest.raises(UserError, match=r"one shape.*\(3, 8, 8\) and \(3, 16, 16\)"):
        Union(first=small, second=ZEROQ).synthesize(teacher, 4)
