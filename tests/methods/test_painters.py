"""What HAST, SynQ's filter and DGH add, each against a slow loop or the plain case."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mirageq import Journal, Teacher, UserError
from mirageq.augment import low_passed
from mirageq.canvas import Canvas
from mirageq.methods.clusterq import ClusterQ
from mirageq.methods.dgh import DGH, joined, smoothed
from mirageq.methods.genie import Genie
from mirageq.methods.hast import HAST, focal_cross_entropy
from mirageq.methods.intraq import IntraQ
from mirageq.methods.synq import SynQ
from mirageq.methods.texq import TexQ
from mirageq.methods.zeroq import ZeroQ
from mirageq.moments import channel_statistics
from mirageq.testing import TinyResNet

SHAPE = (3, 8, 8)


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return Teacher.wrap(TinyResNet(), SHAPE)


def test_the_focal_loss_is_the_slow_loop_and_cross_entropy_without_focus():
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 5), torch.randint(5, (9,))
    slow = 0.0
    for row, label in zip(logits.double(), labels.tolist(), strict=True):
        p = math.exp(row[label]) / sum(math.exp(value) for value in row)
        slow += (1 - p) ** 1.7 * -math.log(p) / 9
    assert float(focal_cross_entropy(logits, labels, 1.7)) == pytest.approx(slow, rel=1e-5)
    assert torch.allclose(focal_cross_entropy(logits, labels, 0.0), F.cross_entropy(logits, labels))
    certain = torch.tensor([[200.0, 0.0], [20.0, 0.0]], requires_grad=True)
    focal_cross_entropy(certain, torch.tensor([0, 0]), 0.5).backward()  # 0.5 is the paper's for ImageNet
    assert certain.grad.isfinite().all()


def test_hast_paints_the_classes_it_labels(teacher):
    source = HAST(iterations=150, batch_size=20, lr=0.2, bn_weight=0.1).synthesize(teacher, 20)
    images, labels = source.sample(20)
    assert (teacher.pseudo_labels(images) == labels).float().mean() > 0.7


def test_hast_may_see_its_images_through_crops(teacher):
    quick = {"iterations": 3, "batch_size": 4}
    whole, cropped = (HAST(**quick, crop_probability=p).synthesize(teacher, 4).sample(4).images for p in (0.0, 1.0))
    assert not torch.equal(whole, cropped)


def test_the_filter_keeps_means_and_takes_high_frequencies():
    torch.manual_seed(0)
    images = torch.randn(4, 3, 16, 12)
    filtered = low_passed(images, 0.4)
    assert torch.allclose(filtered.mean((2, 3)), images.mean((2, 3)), atol=1e-5)
    spectrum, before = torch.fft.fft2(filtered), torch.fft.fft2(images)
    ratio = (spectrum.abs() / before.abs()).mean((0, 1))
    for i in range(16):
        for j in range(12):
            down, across = min(i, 16 - i) / 8, min(j, 12 - j) / 6
            expected = math.exp(-(down**2 + across**2) / (2 * 0.4**2))
            assert float(ratio[i, j]) == pytest.approx(expected, rel=1e-2, abs=1e-3)
    assert torch.allclose(low_passed(images, math.inf), images, atol=1e-5)
    each = low_passed(images[:2], torch.tensor([0.4, math.inf]))
    assert torch.allclose(each, torch.cat([filtered[:1], images[1:2]]), atol=1e-5)
    steps = (images > 0).float()
    assert 0 <= low_passed(steps, 1.0).min() <= low_passed(steps, 1.0).max() <= 1  # it does not ring


def test_synq_filters_what_its_candidates_made(teacher):
    candidates = ZeroQ(iterations=3, batch_size=4)
    plain = candidates.synthesize(teacher, 6, seed=3).sample(6)
    filtered = SynQ(candidates=candidates, cutoff=0.5).synthesize(teacher, 6, seed=3).sample(6)
    assert torch.equal(filtered.labels, plain.labels)
    assert torch.allclose(filtered.images, low_passed(plain.images, 0.5), atol=2e-3)  # stored in float16


def test_the_sums_of_parts_are_the_statistics_of_the_whole_set(teacher):
    torch.manual_seed(0)
    images = torch.randn(30, *SHAPE)
    sums = {}
    for part in images.split([10, 20]):
        sums = joined(sums, teacher.observe(part), len(part))
    whole = teacher.observe(images)
    for name, x in whole.bn_inputs.items():
        mean, var = channel_statistics(x)
        assert torch.allclose(sums[name][0] / 30, mean, atol=1e-5)
        assert torch.allclose(sums[name][1] / 30 - (sums[name][0] / 30).square(), var, atol=1e-4)


def test_a_batch_of_dgh_counts_the_set_before_it(teacher, monkeypatch):
    monkeypatch.setattr("mirageq.methods.dgh.shifted", lambda images, *_, **__: images)
    torch.manual_seed(0)
    images = torch.randn(30, *SHAPE) * 2 + 1
    before, now = images.split([10, 20])
    loss = DGH(smooth=False, stretch_weight=0.0)._loss
    sums = joined({}, teacher.observe(before), 10)
    together = loss(teacher, teacher.observe, sums, 10, now, torch.Generator())
    whole = loss(teacher, teacher.observe, {}, 0, images, torch.Generator())
    assert float(together["bn"]) == pytest.approx(float(whole["bn"]), rel=1e-4)
    seen = teacher.observe(images)
    slow = 0.0
    for norm in teacher.batch_norms:
        x = seen.bn_inputs[norm.name].transpose(0, 1).flatten(1).double()
        for channel, values in enumerate(x):
            off = values.var(correction=0).add(1e-5).sqrt() - norm.var[channel].double().add(1e-5).sqrt()
            slow += ((values.mean() - norm.mean[channel]) ** 2 + off**2) / len(x) / len(teacher.batch_norms)
    assert float(whole["bn"]) == pytest.approx(float(slow), rel=1e-3)


def test_each_batch_of_genie_has_a_generator_of_its_own_that_learns_with_its_latents(teacher, monkeypatch):
    draw, begun, moved, journal = Canvas.draw, [], [], Journal()

    def watched(canvas, part, learning, *rest):
        before = [[value.detach().clone() for value in group.tensors] for group in learning]
        finished = draw(canvas, part, learning, *rest)
        begun.append([before[0][0], before[1][0]])
        firsts = zip([group.tensors[0].detach() for group in learning], begun[-1], strict=True)
        moved.append([float((now - old).abs().max()) for now, old in firsts])
        return finished

    monkeypatch.setattr(Canvas, "draw", watched)
    quick = {"iterations": 40, "batch_size": 16, "latent": 16, "width": 8, "schedule": "cosine"}
    Genie(**quick, swing=False).synthesize(teacher, 32, journal=journal)
    assert len(begun) == 2
    assert not any(torch.equal(first, second) for first, second in zip(*begun, strict=True))
    assert all(latents > 1e-2 and weights > 1e-4 for latents, weights in moved)
    for stage in ("images 0-15", "images 16-31"):
        losses = [row["bn"] for row in journal.history if row["stage"] == stage]
        assert losses[-1] < 0.75 * losses[0]


def test_stretching_sets_logits_apart_and_images_are_smooth(teacher):
    def spread(weight):
        images = (
            DGH(iterations=40, batch_size=16, lr=0.1, stretch_weight=weight).synthesize(teacher, 16).sample(16).images
        )
        logits = teacher(images)
        return float((logits.amax(1) - logits.amin(1)).mean())

    assert spread(1.0) > 1.2 * spread(0.0)
    checkers = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    assert smoothed(checkers.expand(1, 3, 8, 8)).abs().max() < 1e-6
    assert torch.allclose(smoothed(torch.ones(1, 3, 8, 8)), torch.ones(1, 3, 8, 8))


def test_bad_settings_are_said():
    with pytest.raises(UserError, match="focus is an exponent"):
        HAST(focus=-1)
    with pytest.raises(UserError, match="class_weight must not be negative"):
        HAST(class_weight=-1.0)
    with pytest.raises(UserError, match="stretch_weight must not be negative"):
        DGH(stretch_weight=-0.1)
    with pytest.raises(UserError, match="margin_weight must not be negative"):
        IntraQ(margin_weight=-1.0)
    with pytest.raises(UserError, match=r"target_low lies in \[0, 1\]; got 2"):
        IntraQ(target_low=2)
    with pytest.raises(UserError, match="mean_noise must not be negative"):
        ClusterQ(mean_noise=-0.1)
    with pytest.raises(UserError, match="tolerance must not be negative"):
        TexQ(tolerance=-0.1)
    with pytest.raises(UserError, match="cutoff is a positive part"):
        SynQ(cutoff=0)
    with pytest.raises(UserError, match="shift is a part of the image's side"):
        DGH(shift=0.5)


def test_a_class_term_makes_zeroqs_images_ones_of_their_class(teacher):
    quick = {"iterations": 60, "batch_size": 20, "lr": 0.2, "schedule": "cosine"}
    plain, classed = (
        ZeroQ(**quick, class_weight=weight).synthesize(teacher, 20, seed=1).sample(20) for weight in (0.0, 10.0)
    )
    assert torch.equal(plain.labels, teacher.pseudo_labels(plain.images))
    before, after = (F.cross_entropy(teacher.observe(x.images).logits, classed.labels) for x in (plain, classed))
    assert after < 0.5 * before
    with pytest.raises(UserError, match="class_weight must not be negative"):
        ZeroQ(class_weight=-1.0)


def test_any_painter_may_let_convolutions_swing_and_goes_on_to_the_same_bits(teacher, stumbling, tmp_path):
    quick = {"iterations": 6, "batch_size": 4}
    plain, swung = (ZeroQ(**quick, swing=on).synthesize(teacher, 4).sample(4).images for on in (False, True))
    assert not torch.equal(plain, swung)
    with pytest.raises(KeyboardInterrupt):
        ZeroQ(**quick, swing=True).synthesize(teacher, 4, journal=stumbling(tmp_path, 4))
    again = ZeroQ(**quick, swing=True).synthesize(teacher, 4, journal=Journal(tmp_path))
    assert torch.equal(again.sample(4).images, swung)
    with pytest.raises(UserError, match="that swing cannot be compiled"):
        ZeroQ(swing=True, compile=True)
