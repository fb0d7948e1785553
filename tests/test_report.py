from __future__ import annotations

import json

import matplotlib.image
import pytest
import torch

from mirageq.images import Batch
from mirageq.report import contact_sheet, loss_curves, to_pixels, write_comparison


def test_pixels_undo_the_normalisation_and_stay_in_range():
    pixels = torch.rand(4, 3, 5, 5)
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    images = (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    torch.testing.assert_close(to_pixels(images, mean, std), pixels)
    assert to_pixels(images * 100, mean, std).aminmax() == (0, 1)
    assert to_pixels(images, None, None).aminmax() == (0, 1)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_a_contact_sheet_has_as_many_lines_as_it_needs(tmp_path, channels):
    heights = []
    for classes in (1, 4):
        batch = Batch(torch.randn(32, channels, 8, 8), torch.arange(32) % classes)
        contact_sheet(batch, tmp_path / "sheet.png", mean=None, std=None)
        heights.append(matplotlib.image.imread(tmp_path / "sheet.png").shape[0])
    assert heights[1] == pytest.approx(4 * heights[0], rel=0.02), "8 images of each class, 8 in a line"


def test_curves_are_drawn_from_a_history_with_zeros_and_notes(tmp_path):
    rows = [{"stage": "images 0-3", "step": step, "bn": 1 / (step + 1), "margin": 0.0, "lr": 0.1} for step in range(5)]
    rows += [{"stage": "note", "step": 5, "text": "hello"}, {"stage": "tune", "step": 0, "kd": 2.0, "lr": 1.0}]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loss_curves(tmp_path, tmp_path / "curves.png")
    assert matplotlib.image.imread(tmp_path / "curves.png").shape[1] > 1000, "two panels"
    (tmp_path / "history.jsonl").write_text("")
    loss_curves(tmp_path, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").exists()


def test_generators_and_reconstruction_have_curves_of_their_own(tmp_path, monkeypatch):
    from mirageq import report

    rows = [
        {"stage": stage, "step": step, "loss": 1.0 + step}
        for stage in ("generator", "reconstruct", "tune")
        for step in (0, 1)
    ]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told, drawn = [], report._draw
    monkeypatch.setattr(report, "_draw", lambda axis, *what: told.append((drawn(axis, *what), axis)[1]))
    loss_curves(tmp_path, tmp_path / "curves.png")
    assert [axis.get_xlabel() for axis in told] == ["step", "block", "step"]
    assert [axis.get_title() for axis in told] == ["the generator's warm-up", "reconstruction", "tuning"]


@pytest.mark.parametrize(("images", "drawn"), [(3, False), (30, True)])
def test_features_of_few_images_of_many_classes(tmp_path, images, drawn):
    labels = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:images]
    features = {"first": Batch(torch.randn(images, 6), labels), "second": Batch(torch.randn(images, 6), labels + 1000)}
    written = write_comparison(None, [], tmp_path, features)
    assert written == ([tmp_path / "features.png"] if drawn else [])
    assert (tmp_path / "features.png").exists() == drawn
