from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mirageq.augment import mixed, random_boxes, random_resized_crop, shifted


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(6, 3, 32, 32), (5, 1, 24, 40), (4, 3, 17, 9)])
def test_crop_equals_cutting_out_and_resizing_each_image(shape):
    images = torch.randn(shape, generator=stream(1), dtype=torch.float64)
    top, left, rows, columns = random_boxes(shape[0], *shape[2:], stream(), (0.5, 1.0), (3 / 4, 4 / 3))
    cropped = random_resized_crop(images, stream(), flip=0.0)
    for i, image in enumerate(images):
        piece = image[None, :, top[i] : top[i] + rows[i], left[i] : left[i] + columns[i]]
        expected = F.interpolate(piece, size=shape[2:], mode="bilinear", align_corners=False)
        torch.testing.assert_close(cropped[i : i + 1], expected, atol=1e-4, rtol=1e-4)


def test_flip_mirrors_columns():
    images = torch.randn(8, 3, 16, 16, generator=stream(1))
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    torch.testing.assert_close(random_resized_crop(images, stream(), flip=0.0, **whole), images)
    torch.testing.assert_close(random_resized_crop(images, stream(), flip=1.0, **whole), images.flip(3))


def test_boxes_fill_the_asked_area_and_stay_inside():
    top, left, rows, columns = random_boxes(4000, 64, 64, stream(), (0.5, 1.0), (3 / 4, 4 / 3))
    area = rows * columns / 64**2
    assert 0.47 < area.min() < 0.53
    assert area.max() <= 1
    assert (top >= 0).all()
    assert (top + rows <= 64).all()
    assert (left >= 0).all()
    assert (left + columns <= 64).all()
    # Areas whose shape does not fit are drawn again, which favours small ones: torchvision's mean is below 0.75 too.
    assert 0.68 < area.mean() < 0.76
    assert (columns / rows).min() > 0.70
    assert (columns / rows).max() < 1.42


def test_boxes_have_the_shape_of_the_image_or_nearly():
    *_, rows, columns = random_boxes(4000, 32, 64, stream(), (0.8, 1.0), (3 / 4, 4 / 3))
    assert ((rows < 32) | (columns < 64)).float().mean() > 0.9
    assert (columns / rows).mean() == pytest.approx(2, abs=0.05)


def test_gradient_reaches_only_the_pixels_of_the_crop():
    images = torch.randn(1, 1, 20, 20, generator=stream(1), requires_grad=True)
    top, left, rows, columns = (int(v) for v in random_boxes(1, 20, 20, stream(3), (0.2, 0.3), (3 / 4, 4 / 3)))
    random_resized_crop(images, stream(3), scale=(0.2, 0.3)).sum().backward()
    seen = torch.zeros(20, 20, dtype=torch.bool)
    seen[top : top + rows, left : left + columns] = True
    assert (images.grad[0, 0][~seen].abs() < 1e-4).all()
    assert (images.grad[0, 0][seen] > 0).all()


def test_images_are_cropped_independently():
    images = torch.randn(1, 3, 32, 32, generator=stream(1)).expand(16, -1, -1, -1)
    views = random_resized_crop(images, stream())
    assert len({view.sum().item() for view in views}) == 16


def test_mixed_images_lie_between_two_of_the_batch():
    images = torch.eye(6)[:, :, None, None].expand(-1, -1, 2, 2)  # image n is channel n
    blends = mixed(images, torch.Generator().manual_seed(0))[:, :, 0, 0]
    assert blends.sum(1) == pytest.approx(torch.ones(6))
    assert (blends > 1e-6).sum(1).max() == 2
    assert blends.diagonal().min() > 0
    assert len(blends.amax(1).unique()) > 3


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_a_shift_is_that_of_padding_and_cutting_out(layout):
    images = torch.randn(2, 3, 7, 5, generator=stream(1)).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(2, 3, 7, 5, generator=stream(2))
    generator, places = stream(), set()
    for _ in range(40):
        moved = shifted(images, generator, 2)
        assert moved.is_contiguous(memory_format=layout)
        padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
        cuts = {(i, j): padded[..., i : i + 7, j : j + 5] for i in range(5) for j in range(5)}
        (place,) = (place for place, cut in cuts.items() if torch.equal(moved, cut))
        places.add(place)
        (gradient,), (expected,) = (torch.autograd.grad((x * weight).sum(), images) for x in (moved, cuts[place]))
        torch.testing.assert_close(gradient, expected)
    assert len(places) > 15


def test_a_shift_moves_whole_pixels_mirrors_the_border_and_flips_single_images():
    images = torch.arange(5 * 6 * 6, dtype=torch.float32).view(5, 1, 6, 6)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(40):
        moved = shifted(images, generator, 2)
        padded = torch.nn.functional.pad(images, (2, 2, 2, 2), mode="reflect")
        places = [(i, j) for i in range(5) for j in range(5) if torch.equal(moved, padded[..., i : i + 6, j : j + 6])]
        assert len(places) == 1
        seen.update(places)
    assert len(seen) > 10
    assert torch.equal(shifted(images, generator, 0), images)
    flipped = shifted(images, generator, 0, flip=0.5)
    kinds = [torch.equal(new, old) for new, old in zip(flipped, images, strict=True)]
    assert all(kind or torch.equal(new, old.flip(2)) for kind, new, old in zip(kinds, flipped, images, strict=True))
    assert sum(torch.equal(shifted(images, generator, 0, flip=0.5), images) for _ in range(8)) < 8
