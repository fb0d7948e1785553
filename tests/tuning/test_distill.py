from __future__ import annotations

from itertools import islice

import pytest
import torch

from mirageq import Distill, IntraQ, Journal, Noise, Scheme, Teacher, TuningDiverged, UserError
from mirageq.pipeline import calibrate
from mirageq.quant import convert
from mirageq.testing import SHAPE, TinyResNet
from mirageq.tuning.distill import _Run, confident_cross_entropy


@pytest.fixture(scope="module")
def teacher():
    return Teacher.wrap(TinyResNet(), SHAPE)


@pytest.fixture(scope="module")
def source(teacher):
    return Noise().synthesize(teacher, 64)


def student_of(teacher, source, bits=3):
    student = convert(teacher.network, Scheme(weight_bits=bits, activation_bits=bits))
    calibrate(student, source, 64)
    return student


def tuned(teacher, source, journal=None, **settings):
    source.load_state_dict({"drawn": 0})
    student = student_of(teacher, source)
    journal = journal or Journal()
    Distill(
        **{"steps": 60, "batch_size": 16, "lr": 1e-2, "kd_weight": 1.0, "ce_weight": 0.0, "crop_scale": 1.0, **settings}
    ).tune(teacher, student, source, journal=journal)
    return student, journal


@pytest.mark.parametrize("settings", [{}, {"optimizer": "adam", "lr": 1e-3}, {"feature_weight": 1.0}, {"mix": True}])
def test_the_loss_falls_and_the_answers_come_closer(teacher, source, settings):
    student, journal = tuned(teacher, source, **settings)
    kd = [row["kd"] for row in journal.history]
    assert sum(kd[-10:]) < 0.7 * sum(kd[:10])
    images = source.sample(64).images

    def error(student):  # a softmax cannot see a shift of all logits
        difference = student(images) - teacher(images)
        return (difference - difference.mean(1, keepdim=True)).square().mean()

    with torch.no_grad():
        assert error(student) < error(student_of(teacher, source))


def test_cross_entropy_pulls_towards_the_labels(teacher, source):
    batch = source.sample(64)
    plain, labelled = (tuned(teacher, source, ce_weight=weight)[0] for weight in (0.0, 10.0))
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(student(batch.images), batch.labels) for student in (plain, labelled)
        ]
    assert losses[1] < losses[0]


def test_zero_steps_change_nothing(teacher, source):
    student, journal = tuned(teacher, source, steps=0)
    assert journal.history == []
    for name, tensor in student_of(teacher, source).state_dict().items():
        assert torch.equal(student.state_dict()[name], tensor)


def test_running_statistics_stay_and_scales_learn(teacher, source):
    student, _ = tuned(teacher, source)
    before, after = student_of(teacher, source).state_dict(), student.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert not [name for name in changed if "running" in name]
    assert any("bn1.weight" in name for name in changed)
    assert any("conv1.weight" in name for name in changed)


def test_an_interrupted_run_ends_with_the_same_bits(teacher, source, tmp_path):
    whole, _ = tuned(teacher, source)

    class Interrupted(Journal):
        def _append(self, row):
            super()._append(row)
            if row["step"] == 37 and not self.resumed:
                raise KeyboardInterrupt

    journal = Interrupted(tmp_path, checkpoint_seconds=0)
    journal.resumed = False
    with pytest.raises(KeyboardInterrupt):
        tuned(teacher, source, journal)
    journal.resumed = True
    resumed, _ = tuned(teacher, source, journal)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    assert [row["step"] for row in journal.history] == list(range(60))


def test_schedules():
    cosine, warm = Distill(steps=100, lr=1.0), Distill(steps=100, lr=1.0, warmup=0.1)
    assert cosine.rate(0) == 1.0
    assert cosine.rate(50) == pytest.approx(0.5)
    assert cosine.rate(99) < 0.001
    assert warm.rate(0) == pytest.approx(0.1)
    step = Distill(steps=100, lr=1.0, schedule="step", milestones=(0.2, 0.6))
    assert [step.rate(s) for s in (0, 19, 20, 59, 60)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert Distill(steps=100, lr=1.0, schedule="constant").rate(99) == 1.0


def test_a_diverging_run_is_taken_back_and_saved_by_a_lower_rate(teacher, source):
    student, journal = tuned(teacher, source, steps=150, lr=30.0, weight_decay=0.0, schedule="constant")
    notes = [row["text"] for row in journal.history if row["stage"] == "note"]
    assert notes
    assert "back to the last good state, learning rate now" in notes[0]
    assert all(tensor.isfinite().all() for tensor in student.state_dict().values())
    assert [row["step"] for row in journal.history if row["stage"] == "tune"][-1] == 149


def test_a_hopeless_run_is_given_up(teacher, source):
    with pytest.raises(TuningDiverged, match="lowered 3 times"):
        tuned(teacher, source, steps=400, lr=1e12, weight_decay=0.0, schedule="constant")


def test_a_clipped_gradient_moves_less(teacher, source):
    def travelled(**settings):
        start, student = student_of(teacher, source).state_dict(), tuned(teacher, source, steps=1, **settings)[0]
        return sum(float((tensor.detach() - start[name]).norm()) for name, tensor in student.named_parameters())

    assert travelled(clip_norm=1e-4) < 0.1 * travelled()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "steps must not be negative; got -1"),
        ({"lr": 0.0}, "lr must be positive; got 0.0"),
        ({"kd_weight": -1.0}, "kd_weight must not be negative"),
        ({"clip_norm": -1.0}, "clip_norm must not be negative; got -1.0"),
        ({"warmup": 2.0}, r"warmup lies in \[0, 1\]; got 2.0"),
        ({"optimizer": "lamb"}, "Unknown optimizer 'lamb'; Known: adam, sgd"),
        ({"schedule": "linear"}, "Unknown schedule 'linear'"),
        ({"crop_scale": 2.0}, "crop_scale is a fraction"),
        ({"mix": True, "ce_weight": 1.0}, "Mixed images have no label to learn"),
    ],
)
def test_settings_that_make_no_sense_are_told(settings, message):
    with pytest.raises(UserError, match=message):
        Distill(**settings)


def test_too_few_images_for_a_batch_are_told(teacher, source):
    with pytest.raises(UserError, match="batch size 65 is larger than the set of 64"):
        tuned(teacher, source, batch_size=65)


def test_a_painted_source_serves_the_tuner(teacher):
    source = IntraQ(iterations=3, batch_size=16).synthesize(teacher, 32)
    assert len(list(islice(source.batches(16), 3))) == 3
    student, journal = tuned(teacher, source, steps=5)
    assert len(journal.history) == 5


@pytest.mark.parametrize("placement", ["paper", "deploy"])
def test_learned_steps_move_and_come_back_from_storage(teacher, source, placement, tmp_path):
    from mirageq.storage import load_student, save_student

    scheme = Scheme(weight_bits=3, activation_bits=3, placement=placement, learned_steps=True)
    student = convert(teacher.network, scheme)
    calibrate(student, source, 64)
    before = {name: value.detach().clone() for name, value in student.named_parameters() if name.endswith("scale")}
    assert len(before) == len(student.activation_quantizers) + len(student.weight_quantizers)
    settings = {"kd_weight": 1.0, "ce_weight": 0.0, "crop_scale": 1.0, "optimizer": "adam", "lr": 1e-3}
    Distill(steps=20, batch_size=16, **settings).tune(teacher, student, source)
    moved = [
        name for name, value in student.named_parameters() if name in before and not torch.equal(value, before[name])
    ]
    assert len(moved) > 0.8 * len(before)
    save_student(student, teacher, tmp_path / "student.safetensors")
    images = source.sample(8).images
    with torch.no_grad():
        assert torch.equal(load_student(tmp_path / "student.safetensors", teacher)(images), student(images))


def test_hard_labels_count_only_where_the_teacher_is_sure():
    torch.manual_seed(0)
    logits, target, labels = torch.randn(12, 5), 3 * torch.randn(12, 5), torch.randint(5, (12,))
    slow = 0.0
    for row, seen, label in zip(logits, target, labels.tolist(), strict=True):
        if float(seen.softmax(0)[label]) >= 0.3:
            slow -= float(row.log_softmax(0)[label]) / 12
    assert slow > 0
    assert float(confident_cross_entropy(logits, target, labels, 0.3)) == pytest.approx(slow, rel=1e-5)
    plain = torch.nn.functional.cross_entropy(logits, labels)
    assert torch.allclose(confident_cross_entropy(logits, target, labels, 0.0), plain)
    with pytest.raises(UserError, match=r"ce_confidence lies in \[0, 1\]; got 1.5"):
        Distill(ce_confidence=1.5)


def test_a_state_is_good_once_its_loss_was_seen(teacher, source):
    student = student_of(teacher, source)
    run = _Run(Distill(steps=9, batch_size=16, lr=1e-4), student, source, 0)
    run.guard.every = 1
    batches = source.batches(16, student)
    step = run.optimizer.step
    for _ in range(2):
        assert run.update(teacher, batches, print)

    def poison():
        step()
        with torch.no_grad():
            next(student.parameters()).fill_(torch.nan)

    run.optimizer.step = poison
    run.update(teacher, batches, print)
    run.optimizer.step = step
    assert run.update(teacher, batches, print) is None
    assert all(value.isfinite().all() for value in student.parameters())
    assert run.update(teacher, batches, print)


def test_learned_steps_stay_positive(teacher, source):
    student = convert(teacher.network, Scheme(placement="deploy", learned_steps=True, weight_range="mse"))
    calibrate(student, source, 64)
    Distill(steps=20, batch_size=16, optimizer="adam", lr=5e-2).tune(teacher, student, source)
    for quantizer in (*student.weight_quantizers.values(), *student.activation_quantizers.values()):
        assert (quantizer.scale > 0).all()
