from __future__ import annotations

from itertools import islice

import pytest
import torch

from mirageq.errors import UserError
from mirageq.generator import GeneratorTraining
from mirageq.generator_source import GeneratorSource
from mirageq.journal import Journal
from mirageq.methods import METHODS
from mirageq.teacher import Teacher
from mirageq.testing import CLASSES, SHAPE, TinyResNet

SMALL = {"warmup": 8, "batch_size": 6, "width": 8, "latent": 4}


@pytest.fixture(scope="module")
def teacher():
    return Teacher.wrap(TinyResNet(), SHAPE)


def test_training_lowers_the_loss(teacher):
    journal = Journal()
    source = GeneratorSource(teacher, GeneratorTraining(**{**SMALL, "warmup": 300, "batch_size": 32, "lr": 5e-3}), 0)
    source.warm_up(journal)
    first, last = ([row["class"] for row in part] for part in (journal.history[:10], journal.history[-10:]))
    assert sum(last) < 0.8 * sum(first)


def test_sampling_changes_nothing_and_classes_take_turns(teacher):
    source = GeneratorSource(teacher, GeneratorTraining(**SMALL), 0)
    first, again = source.sample(2 * CLASSES), source.sample(2 * CLASSES)
    assert torch.equal(first.images, again.images)
    assert first.labels.bincount().tolist() == [2] * CLASSES
    seen = {
        frozenset(GeneratorSource(teacher, GeneratorTraining(**SMALL), seed).sample(2).labels.tolist())
        for seed in range(8)
    }
    assert len(seen) > 2  # not the first classes only


def test_no_image_is_drawn_alone_beside_others(teacher, monkeypatch):
    source, sizes = GeneratorSource(teacher, GeneratorTraining(**SMALL), 0), []
    draw = source._draw
    monkeypatch.setattr(source, "_draw", lambda labels, purpose: sizes.append(len(labels)) or draw(labels, purpose))
    assert len(source.sample(65).images) == 65
    assert sizes == [33, 32]


def test_each_batch_comes_after_a_step_of_training(teacher):
    source = GeneratorSource(teacher, GeneratorTraining(**SMALL), 0)
    before = source.sample(4).images
    batches = list(islice(source.batches(6), 3))
    assert source.step == 3
    assert not torch.equal(source.sample(4).images, before)
    assert not torch.equal(batches[0].images, batches[1].images)
    assert not batches[0].images.requires_grad


def test_the_rate_falls_at_its_milestones(teacher):
    source = GeneratorSource(teacher, GeneratorTraining(**SMALL, lr=1.0, milestones=(2, 4)), 0)
    rates = []
    for _ in islice(source.batches(6), 5):
        rates.append(source.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_a_finished_warm_up_is_read_and_not_repeated(teacher, tmp_path, monkeypatch):
    settings = GeneratorTraining(**SMALL)
    first = GeneratorSource(teacher, settings, 0)
    first.warm_up(Journal(tmp_path))
    journal = Journal(tmp_path)
    monkeypatch.setattr("mirageq.journal.Checkpoint.save", None)  # nor written, while others may read it
    second = GeneratorSource(teacher, settings, 0)
    second.warm_up(journal)
    assert len(journal.history) == settings.warmup
    assert torch.equal(first.sample(4).images, second.sample(4).images)


def test_a_saved_generator_of_another_network_is_refused(teacher):
    state = GeneratorSource(teacher, GeneratorTraining(**SMALL), 0).state_dict()
    state["generator"]["embedding.weight"] = torch.zeros(9, 4)
    with pytest.raises(UserError, match="does not fit this network of 5 classes"):
        GeneratorSource(teacher, GeneratorTraining(**SMALL), 0).load_state_dict(state)


def test_a_loss_that_is_not_finite_stops_the_training(teacher):
    source = GeneratorSource(teacher, GeneratorTraining(**SMALL), 0)
    with torch.no_grad():
        source.generator.conv3.weight.fill_(torch.nan)
    with pytest.raises(UserError, match=r"loss became nan at update 0.*Lower method\.lr"):
        next(source.batches(4))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gdfq", "clusterq", "texq"])
def test_generators_train_in_either_precision_through_crops(teacher, name, precision):
    small = {**SMALL, "precision": precision, "crop_probability": 1.0, "last_bn_weight": 0.1}
    extra = {"centre_iterations": 2} if name == "texq" else {}
    source = METHODS[name](**small, **extra).synthesize(teacher, 4)
    batch = next(source.batches(6))
    assert batch.images.dtype == torch.float32
    assert batch.images.isfinite().all()
