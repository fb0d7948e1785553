from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mirageq import evaluate
from mirageq.data import open_images
from mirageq.errors import UserError
from mirageq.evaluate import Accuracy, accuracy, agreement, intra_class_distance, silhouette


def write(path, images, labels):
    np.savez(path, images=np.asarray(images, np.uint8), labels=np.asarray(labels))
    return open_images(path, (images.shape[3], *images.shape[1:3]))


def logits_from_first_pixel(images):
    """Class = the first pixel's value times 255; the others follow by distance."""
    value = images[:, 0, 0, 0] * 255
    return -(torch.arange(10.0)[None] - value[:, None]).abs()


def test_accuracy_counts_first_and_first_five(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "MOST_IMAGES", 4)
    images = np.zeros((6, 2, 2, 3))
    images[:, 0, 0, 0] = [0, 1, 2, 3, 4, 9]
    data = write(tmp_path / "data.npz", images, [0, 1, 3, 3, 9, 2])
    result = accuracy(logits_from_first_pixel, data, (0.0,) * 3, (1.0,) * 3)
    assert [data.fitting(pixels, 4) for pixels in (1, 8, 100)] == [1, 2, 4]
    assert result.count == 6
    assert result.top1 == pytest.approx(100 * 3 / 6)
    assert result.top5 == pytest.approx(100 * 4 / 6)


def test_pixels_are_normalised_channel_by_channel(tmp_path):
    seen = []
    data = write(tmp_path / "data.npz", np.full((1, 1, 1, 3), 255), [0])
    accuracy(lambda x: seen.append(x) or torch.zeros(1, 2), data, (0.0, 0.5, 1.0), (1.0, 0.5, 2.0))
    assert seen[0].flatten().tolist() == [1.0, 1.0, 0.0]


def test_the_divergence_from_a_teacher_is_its_definition(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "MOST_IMAGES", 2)
    images = np.random.default_rng(0).integers(0, 256, (5, 1, 3, 3))
    data = write(tmp_path / "data.npz", images, [0, 1, 2, 0, 1])
    result = accuracy(lambda x: x[:, :, 0, 0], data, (0.0,) * 3, (0.5,) * 3, teacher=lambda x: x[:, :, 0, 1])
    student, teacher = (np.exp(images[:, 0, column] / 255 / 0.5) for column in (0, 1))
    p, q = (each / each.sum(1, keepdims=True) for each in (teacher, student))
    assert result.divergence == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-5)
    assert accuracy(lambda x: x[:, :, 0, 0], data, (0.0,) * 3, (0.5,) * 3).divergence is None


def test_the_error_bar_is_binomial_and_told():
    result = Accuracy(top1=80.0, top5=95.0, count=400)
    assert result.standard_error == pytest.approx(2.0)
    assert str(result) == "80.00 % top-1 ± 2.00 (95.00 % top-5, 400 images)"
    assert "top-5" not in str(Accuracy(top1=80.0, top5=None, count=400))


def test_top_5_of_few_classes_is_left_out(tmp_path):
    data = write(tmp_path / "data.npz", np.zeros((2, 1, 1, 3)), [0, 1])
    assert accuracy(lambda x: torch.zeros(len(x), 3), data, (0,) * 3, (1,) * 3).top5 is None


def test_labels_beyond_the_networks_classes_are_told(tmp_path):
    data = write(tmp_path / "data.npz", np.zeros((2, 1, 1, 3)), [0, 50])
    with pytest.raises(UserError, match="label 50, and the network knows 10 classes"):
        accuracy(lambda x: torch.zeros(len(x), 10), data, (0,) * 3, (1,) * 3)


def test_a_folder_has_a_sub_folder_for_each_class(tmp_path):
    for name in ("ant", "cat"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / name / "1.png")
    data = open_images(tmp_path, (3, 2, 2))
    with pytest.raises(UserError, match="has 2 sub-folders, and the network knows 3 classes"):
        accuracy(lambda images: torch.zeros(len(images), 3), data, (0.5,) * 3, (0.5,) * 3)


def test_an_unknown_normalisation_is_told(tmp_path):
    data = write(tmp_path / "data.npz", np.zeros((2, 1, 1, 3)), [0, 1])
    with pytest.raises(UserError, match="normalisation is unknown; give --mean and --std"):
        accuracy(lambda x: torch.zeros(len(x), 10), data, None, None)


def test_agreement_is_the_share_of_equal_answers():
    images = torch.arange(10.0).view(10, 1, 1, 1) / 255
    always_three = lambda x: torch.nn.functional.one_hot(torch.full((len(x),), 3), 10).float()  # noqa: E731
    assert agreement(logits_from_first_pixel, logits_from_first_pixel, images, batch_size=3) == 100
    assert agreement(logits_from_first_pixel, always_three, images, batch_size=3) == pytest.approx(10)


def cosine_distance(a, b):
    return 1 - float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def test_intra_class_distance_equals_a_loop_over_pairs():
    features, labels = torch.randn(12, 5), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 0, 1])
    pairs = [
        cosine_distance(features[i], features[j])
        for i in range(12)
        for j in range(12)
        if i != j and labels[i] == labels[j]
    ]
    assert intra_class_distance(features, labels) == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)
    assert intra_class_distance(features[:3], torch.tensor([0, 1, 2])) is None


def test_silhouette_equals_its_definition():
    features, labels = torch.randn(10, 4), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 5])
    values = []
    for i in range(9):  # the last image is alone in its class

        def mean_to(label, i=i):
            others = [j for j in range(9) if labels[j] == label and j != i]
            return sum(cosine_distance(features[i], features[j]) for j in others) / len(others)

        own = mean_to(int(labels[i]))
        nearest = min(mean_to(label) for label in (0, 1, 2) if label != int(labels[i]))
        values.append((nearest - own) / max(nearest, own))
    assert silhouette(features, labels) == pytest.approx(sum(values) / 9, abs=1e-5)
    assert silhouette(features, torch.zeros(10, dtype=torch.long)) is None
