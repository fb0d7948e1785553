from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mirageq.errors import UserError
from mirageq.methods.clusterq import Centroids, ClusterQ, deep_layers
from mirageq.moments import sample_statistics
from mirageq.observe import Observation
from mirageq.teacher import Teacher
from mirageq.testing import CLASSES, SHAPE, TinyResNet


@pytest.fixture(scope="module")
def teacher():
    return Teacher.wrap(TinyResNet(), SHAPE)


def observation(count, layers, logits=None):
    generator = torch.Generator().manual_seed(1)
    inputs = {name: torch.randn(count, 4, 3, 3, generator=generator) for name in layers}
    return Observation(torch.zeros(count, CLASSES) if logits is None else logits, torch.zeros(count, 2), inputs)


def test_statistics_are_each_images_own():
    x = torch.randn(3, 2, 4, 5)
    mean, var = sample_statistics(x)
    for n in range(3):
        for c in range(2):
            values = x[n, c].flatten()
            assert mean[n, c] == pytest.approx(float(values.mean()), abs=1e-6)
            assert var[n, c] == pytest.approx(float(((values - values.mean()) ** 2).mean()), abs=1e-6)


def test_terms_equal_a_slow_loop(teacher):
    settings = ClusterQ(mean_noise=0.0, var_noise=0.0)
    centroids = Centroids(teacher, settings)
    centroids.tables = {name: (torch.rand(CLASSES, 4), torch.rand(CLASSES, 4)) for name in centroids.layers}
    labels = torch.tensor([0, 3, 3, 1])
    seen = observation(4, centroids.layers)
    slow = 0.0
    for layer in centroids.layers:
        for n, label in enumerate(labels.tolist()):
            for c in range(4):
                values = seen.bn_inputs[layer][n, c]
                mean_table, var_table = centroids.tables[layer]
                slow += float((values.mean() - mean_table[label, c]) ** 2) / 4
                slow += float((values.var(correction=0) - var_table[label, c]) ** 2) / 4
    slow /= len(centroids.layers) * len(labels)
    terms = centroids.terms(seen, labels, torch.Generator())
    assert float(terms["cluster"]) == pytest.approx(0.9 * slow, rel=1e-4)
    assert float(terms["diversity"]) == pytest.approx(0.09 * slow, rel=1e-4)


def test_the_diversity_term_has_a_gradient_and_changes_its_target(teacher):
    centroids = Centroids(teacher, ClusterQ())
    centroids.tables = {name: (torch.zeros(CLASSES, 4), torch.ones(CLASSES, 4)) for name in centroids.layers}
    x = torch.randn(4, 4, 3, 3, requires_grad=True)
    seen = Observation(torch.zeros(4, CLASSES), torch.zeros(4, 2), dict.fromkeys(centroids.layers, x))
    generator = torch.Generator().manual_seed(0)
    first = centroids.terms(seen, torch.zeros(4, dtype=torch.long), generator)
    second = centroids.terms(seen, torch.zeros(4, dtype=torch.long), generator)
    assert torch.autograd.grad(first["diversity"], x)[0].abs().sum() > 0
    assert first["cluster"] == second["cluster"]
    assert first["diversity"] != second["diversity"]


def test_nothing_is_aligned_before_the_warm_up_ends(teacher):
    centroids = Centroids(teacher, ClusterQ(warmup=3))
    draws = []

    def draw(labels, purpose):
        draws.append(purpose)
        return torch.randn(len(labels), *SHAPE)

    for step in (1, 2):
        centroids.after_update(step, draw)
    assert centroids.terms(observation(2, centroids.layers), torch.zeros(2, dtype=torch.long), torch.Generator()) == {}
    centroids.after_update(3, draw)
    assert len(draws) == 1
    assert set(centroids.tables) == set(centroids.layers)


def test_centroids_move_only_by_images_the_teacher_recognises(teacher):
    centroids = Centroids(teacher, ClusterQ(warmup=0, centroid_rate=0.25))
    layer = centroids.layers[0]
    labels = torch.arange(CLASSES)
    right = torch.nn.functional.one_hot(labels, CLASSES).float()
    right[2] = right[2].roll(1)
    seen = observation(CLASSES, centroids.layers, right)
    centroids._move(labels, observation(CLASSES, centroids.layers), first=True)
    before = centroids.tables[layer][0].clone()
    shifted = Observation(seen.logits, seen.features, {name: x + 1 for name, x in seen.bn_inputs.items()})
    centroids._move(labels, shifted, first=False)
    moved = centroids.tables[layer][0] - before
    assert moved[2] == pytest.approx(torch.zeros(4))
    assert moved[[0, 1, 3, 4]] == pytest.approx(torch.full((4, 4), 0.25), abs=1e-5)


def test_updates_come_at_their_interval_in_few_large_batches(teacher):
    centroids = Centroids(teacher, ClusterQ(warmup=10, centroid_every=5))
    steps = []

    def draw(labels, purpose):
        steps.append((purpose, len(labels)))
        return torch.randn(len(labels), *SHAPE)

    for step in range(1, 22):
        centroids.after_update(step, draw)
    assert steps == [(f"centroids {step} 0", CLASSES) for step in (10, 15, 20)]


def test_a_rate_of_zero_leaves_the_first_centroids(teacher):
    centroids = Centroids(teacher, ClusterQ(warmup=1, centroid_every=1, centroid_rate=0.0))
    centroids.after_update(1, lambda labels, purpose: torch.randn(len(labels), *SHAPE))
    before = centroids.state_dict()
    centroids.after_update(2, lambda labels, purpose: torch.randn(len(labels), *SHAPE))
    for layer, tables in centroids.state_dict().items():
        assert all(torch.equal(a, b) for a, b in zip(tables, before[layer], strict=True))


class Deep(nn.Module):
    """`norms` of its `depth` convolutions, from the front, are followed by a BatchNorm."""

    def __init__(self, depth, norms):
        super().__init__()
        layers = []
        for index in range(depth):
            layers += [nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3) if index < norms else nn.Identity(), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(3, 4)
        self.eval()

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def test_the_deeper_half_begins_where_the_paper_says():
    assert len(deep_layers(Teacher.wrap(Deep(21, 21), (3, 8, 8)))) == 21 - 9
    assert len(deep_layers(Teacher.wrap(Deep(20, 20), (3, 8, 8)))) == 20 - 8
    assert len(deep_layers(Teacher.wrap(Deep(2, 2), (3, 8, 8)))) == 2


def test_a_network_without_batch_norm_in_its_deeper_half_is_refused():
    with pytest.raises(UserError, match="deeper half, and this network has none there"):
        ClusterQ(warmup=1).synthesize(Teacher.wrap(Deep(8, 3), (3, 8, 8)), 2)


def test_settings_out_of_range_are_refused():
    with pytest.raises(UserError, match="centroid_rate lies in"):
        ClusterQ(centroid_rate=1.5)


def test_only_norms_that_see_image_by_image_have_centroids(tokens):
    source = ClusterQ(warmup=2, batch_size=4, width=8, latent=4).synthesize(Teacher.wrap(tokens, SHAPE), 4)
    assert set(source.guide.tables) == {"bn", "bn_last"}
    assert next(source.batches(4)).images.isfinite().all()


def test_no_image_of_a_class_is_drawn_alone(teacher, monkeypatch):
    centroids, drawn = Centroids(teacher, ClusterQ(warmup=1)), []
    monkeypatch.setattr(centroids, "_move", lambda *_, **__: None)
    monkeypatch.setattr(centroids, "teacher", SimpleNamespace(classes=65, device="cpu", observe=lambda images: None))
    centroids.after_update(1, lambda labels, purpose: drawn.append(len(labels)))
    assert drawn == [33, 32]


class OnlyTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.mix = nn.Conv2d(3, 4, 4, stride=4), nn.Linear(4, 4)
        self.norms, self.fc = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(2)), nn.Linear(4, 5)
        self.eval()

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        for norm in self.norms:
            x = norm(self.mix(x).flatten(0, 1)).relu().reshape(x.shape)
        return self.fc(x.mean(1))


def test_norms_of_tokens_alone_are_refused():
    with pytest.raises(UserError, match="those there see tokens, not images"):
        ClusterQ(warmup=1).synthesize(Teacher.wrap(OnlyTokens(), SHAPE), 2)
