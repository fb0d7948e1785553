from __future__ import annotations

import pytest
import torch

from mirageq import recipe
from mirageq.errors import UserError
from mirageq.images import SyntheticSet
from mirageq.methods.intraq import IntraQ
from mirageq.methods.noise import Noise
from mirageq.methods.selectq import SelectQ, distances_to_centroids, layer_statistics
from mirageq.teacher import Teacher
from mirageq.testing import SHAPE, TinyResNet


def test_distances_are_small_in_the_clusters_and_large_between_them():
    generator = torch.Generator().manual_seed(0)
    blobs = [centre + 0.1 * torch.randn(20, 5, generator=generator) for centre in (-4.0, 0.0, 4.0)]
    stray = torch.full((1, 5), 2.0)
    distance = distances_to_centroids(torch.cat([*blobs, stray]), 3)
    assert distance[:60].max() < 1
    assert distance[60] > 3


def test_one_cluster_is_the_mean():
    points = torch.randn(30, 4)
    assert distances_to_centroids(points, 1) == pytest.approx((points - points.mean(0)).norm(dim=1), abs=1e-4)


class Outliers:
    """Images of which the last two are wildly unlike the others."""

    def synthesize(self, teacher, count, *, seed=0, journal=None):
        images = 0.1 * torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))
        images[-2:] = 20 * torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
        return SyntheticSet(images, torch.arange(count) % 5)


@pytest.mark.parametrize(("clusters", "count"), [(1, 8), (3, 38), (10, 38)])
def test_outliers_are_left_out_and_order_is_kept(clusters, count):
    teacher = Teacher.wrap(TinyResNet(), SHAPE)
    settings = {"candidates": Outliers(), "candidates_per_image": (count + 2) / count, "clusters": clusters}
    kept = SelectQ(**settings).synthesize(teacher, count)
    candidates = Outliers().synthesize(teacher, count + 2)
    assert torch.equal(kept.images, candidates.images[:count])


def test_every_layer_and_the_features_are_looked_at():
    teacher = Teacher.wrap(TinyResNet(), SHAPE)
    layers = layer_statistics(teacher, torch.randn(70, *SHAPE))
    assert [layer.shape for layer in layers] == [(70, 16), (70, 16), (70, 24), (70, 12)]
    for layer in layers:
        assert layer.mean(0).abs().max() < 1e-4


def test_a_recipe_holds_the_method_that_makes_the_candidates():
    table = {"method": {"name": "selectq", "clusters": 4, "candidates": {"name": "intraq", "iterations": 7}}}
    built = recipe.build(table)
    assert built.method == SelectQ(clusters=4, candidates=IntraQ(iterations=7))
    assert recipe.build(recipe.describe(built)) == built
    assigned = recipe.assign(table, ["method.candidates.name=noise", "method.clusters=3"])
    del assigned["method"]["candidates"]["iterations"]
    assert recipe.build(assigned).method == SelectQ(clusters=3, candidates=Noise())


def test_mistakes_in_the_inner_method_are_named():
    with pytest.raises(UserError, match=r"method\.candidates has no setting 'iteration'.*iterations"):
        recipe.build({"method": {"name": "selectq", "candidates": {"name": "zeroq", "iteration": 7}}})
    with pytest.raises(UserError, match="method has no setting 'candidate'"):
        recipe.build({"method": {"name": "selectq", "candidate": {"name": "zeroq"}}})
    with pytest.raises(UserError, match="at least 1"):
        SelectQ(candidates_per_image=0.5)


def test_norms_of_vectors_are_looked_at_and_those_of_all_tokens_together_are_not(tokens):
    layers = layer_statistics(Teacher.wrap(tokens, SHAPE), torch.randn(70, *SHAPE))
    assert [layer.shape for layer in layers] == [(70, 16), (70, 16), (70, 8)]
    assert all(layer.isfinite().all() for layer in layers)


@pytest.mark.parametrize("settings", [{"candidates_per_image": float("inf")}, {"clusters": 0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(UserError, match="candidates_per_image and clusters are at least 1"):
        SelectQ(**settings)
