from __future__ import annotations

import numpy as np
import pytest
import torch

from mirageq.data import LabelledImages
from mirageq.errors import UserError
from mirageq.methods.real import Real
from mirageq.seeding import stream
from mirageq.teacher import Teacher
from mirageq.testing import SHAPE, TinyResNet


@pytest.fixture
def file(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, *SHAPE[1:], 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(20) % 5)
    return tmp_path / "images.npz"


def test_images_are_normalised_and_keep_their_labels(file):
    teacher = Teacher.wrap(TinyResNet(), SHAPE, mean=(0.5,) * 3, std=(0.25,) * 3)
    sample = Real(path=str(file)).synthesize(teacher, 20, seed=3).sample(20)
    stored = np.load(file)
    for image, label in zip(sample.images[:5], sample.labels[:5], strict=True):
        pixels = ((image * 0.25 + 0.5) * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
        place = [index for index in range(20) if (stored["images"][index] == pixels).all()]
        assert stored["labels"][place[0]] == int(label)
    other = Real(path=str(file)).synthesize(teacher, 20, seed=4).sample(20)
    assert not torch.equal(sample.images, other.images)


def test_only_the_chosen_images_are_read(file, monkeypatch):
    fit, fitted = LabelledImages._fit, []
    monkeypatch.setattr(LabelledImages, "_fit", lambda self, image: fitted.append(image) or fit(self, image))
    teacher = Teacher.wrap(TinyResNet(), SHAPE, mean=(0.0,) * 3, std=(1.0,) * 3)
    sample = Real(path=str(file)).synthesize(teacher, 6, seed=3).sample(6)
    assert len(fitted) == 6
    stored, chosen = np.load(file), torch.randperm(20, generator=stream(3, "real"))[:6]
    assert torch.equal(sample.images, torch.from_numpy(stored["images"])[chosen].permute(0, 3, 1, 2) / 255)
    assert sample.labels.tolist() == stored["labels"][chosen].tolist()


def test_images_may_be_cropped_to_less_than_the_networks_size(file):
    teacher = Teacher.wrap(TinyResNet(), SHAPE, mean=(0.5,) * 3, std=(0.25,) * 3)
    whole, crop = (
        Real(path=str(file), image_size=size).synthesize(teacher, 20).sample(20).images for size in (None, 8)
    )
    assert torch.equal(crop, whole[..., 4:12, 4:12])


def test_too_few_images_or_no_normalisation_is_said(file):
    teacher = Teacher.wrap(TinyResNet(), SHAPE, mean=(0.5,) * 3, std=(0.25,) * 3)
    with pytest.raises(UserError, match="holds 20 images, and 21 were asked for"):
        Real(path=str(file)).synthesize(teacher, 21)
    with pytest.raises(UserError, match="give its mean and std"):
        Real(path=str(file)).synthesize(Teacher.wrap(TinyResNet(), SHAPE), 4)


def test_labels_of_other_classes_are_refused(tmp_path):
    teacher = Teacher.wrap(TinyResNet(), SHAPE, mean=(0.5,) * 3, std=(0.25,) * 3)
    np.savez(tmp_path / "images.npz", images=np.zeros((2, *SHAPE[1:], 3), np.uint8), labels=np.array([0, 5]))
    with pytest.raises(UserError, match="have the label 5, and the network knows 5 classes"):
        Real(path=str(tmp_path / "images.npz")).synthesize(teacher, 2)
