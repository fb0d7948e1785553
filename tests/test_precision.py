"""Where bfloat16 is missing images are made in float32, and the journal says so once."""

from __future__ import annotations

import pytest
import torch

from mirageq import GDFQ, Journal, Teacher, ZeroQ, precision
from mirageq.testing import SHAPE, TinyResNet, quick


@pytest.fixture(scope="module")
def teacher():
    return Teacher.wrap(TinyResNet(), SHAPE)


def painted(teacher, journal=None, **settings):
    return ZeroQ(iterations=4, batch_size=4, **settings).synthesize(teacher, 4, journal=journal).sample(4).images


@pytest.mark.parametrize("has", [True, False])
def test_the_context_computes_in_bfloat16_where_there_is_such(has, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: has)
    with precision.autocast("bfloat16", torch.device("cpu")):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == (torch.bfloat16 if has else torch.float32)
    with precision.autocast("float32", torch.device("cpu")):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32


def test_without_bfloat16_images_are_those_of_float32_and_the_journal_says_so_once(teacher, monkeypatch, tmp_path):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    for _ in range(2):
        images = painted(teacher, Journal(tmp_path), precision="bfloat16")
    assert torch.equal(images, painted(teacher))
    assert [row["text"] for row in Journal(tmp_path).history if row["stage"] == "note"] == [precision.NOTE]


def test_generators_say_so_too(teacher, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    journal = Journal()
    GDFQ(**{**vars(quick(GDFQ)), "precision": "bfloat16"}).synthesize(teacher, 4, journal=journal)
    assert precision.NOTE in [row.get("text") for row in journal.history]


def test_nothing_is_said_where_there_is_bfloat16(teacher, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    journal = Journal()
    images = painted(teacher, journal, precision="bfloat16")
    assert not torch.equal(images, painted(teacher))
    assert all(row["stage"] != "note" for row in journal.history)
