from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mirageq.data import open_images
from mirageq.errors import UserError

SHAPE = (3, 8, 8)


def pixels(count, height=8, width=8):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def everything(data, *chosen):
    images, labels = zip(*data.batches(2, *chosen), strict=True)
    return torch.cat(images), torch.cat(labels).tolist()


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def test_an_image_folder_takes_its_labels_from_the_order_of_its_sub_folders(tmp_path):
    images = pixels(3)
    for name, image in zip(("cat/1.png", "ant/7.png", "cat/0.PNG"), images, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(image))
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    read, labels = everything(open_images(tmp_path, SHAPE))
    assert labels == [0, 1, 1]
    assert np.array_equal(read.permute(0, 2, 3, 1).numpy(), images[[1, 2, 0]])
    (tmp_path / "ant" / "8.png").write_bytes(png(images[0]))
    assert everything(open_images(tmp_path, SHAPE, limit=2))[1] == [0, 1]  # of all classes, as far as it goes
    assert open_images(tmp_path, SHAPE).classes == 2


def test_npz_and_limit(tmp_path):
    images = pixels(5)
    np.savez(tmp_path / "test.npz", images=images, labels=np.array([4, 3, 2, 1, 0], np.uint8))
    data = open_images(tmp_path / "test.npz", SHAPE, limit=3)
    read, labels = everything(data)
    assert data.count == 3
    assert labels == [4, 3, 2]
    assert np.array_equal(read.permute(0, 2, 3, 1).numpy(), images[:3])


def test_chosen_images_come_in_the_order_they_were_chosen_in(tmp_path):
    images = pixels(5)
    np.savez(tmp_path / "test.npz", images=images, labels=np.arange(5))
    read, labels = everything(open_images(tmp_path / "test.npz", SHAPE), [4, 0, 3])
    assert labels == [4, 0, 3]
    assert np.array_equal(read.permute(0, 2, 3, 1).numpy(), images[[4, 0, 3]])


@pytest.mark.parametrize("label_bytes", [1, 2])
def test_the_binary_files_of_cifar(tmp_path, label_bytes):
    images, labels = pixels(4, 32, 32), [3, 0, 9, 5]
    with (tmp_path / "test.bin").open("wb") as file:
        for image, label in zip(images, labels, strict=True):
            file.write(bytes([77] * (label_bytes - 1) + [label]) + image.transpose(2, 0, 1).tobytes())
    read, found = everything(open_images(tmp_path / "test.bin", (3, 32, 32)))
    assert found == labels
    assert np.array_equal(read.permute(0, 2, 3, 1).numpy(), images)


def test_parquet_of_encoded_images(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    images = pixels(3)
    table = pyarrow.table({"jpeg": [png(image) for image in images], "label": [7, 8, 9]})
    parquet.write_table(table, tmp_path / "val.parquet")
    read, labels = everything(open_images(tmp_path / "val.parquet", SHAPE))
    assert labels == [7, 8, 9]
    assert np.array_equal(read.permute(0, 2, 3, 1).numpy(), images)


def test_parquet_with_images_as_hugging_face_stores_them_and_as_none_can(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    (image,) = pixels(1)
    column = [{"bytes": png(image), "path": "one.png"}, {"bytes": None, "path": "two.png"}]
    parquet.write_table(pyarrow.table({"image": column, "label": [1, 0]}), tmp_path / "val.parquet")
    read, labels = everything(open_images(tmp_path / "val.parquet", SHAPE, limit=1))
    assert labels == [1]
    assert np.array_equal(read[0].permute(1, 2, 0).numpy(), image)
    with pytest.raises(UserError, match="image 1 is no encoded image: it is stored as NoneType, not as bytes"):
        everything(open_images(tmp_path / "val.parquet", SHAPE))


def test_a_parquet_file_without_images_is_told(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"jpeg": [], "label": []}), tmp_path / "val.parquet")
    with pytest.raises(UserError, match="holds no images"):
        open_images(tmp_path / "val.parquet", SHAPE)


def test_larger_images_are_cropped_around_their_centre(tmp_path):
    images = pixels(1, 11, 12)
    np.savez(tmp_path / "test.npz", images=images, labels=[0])
    read, _ = everything(open_images(tmp_path / "test.npz", SHAPE))
    assert np.array_equal(read[0].permute(1, 2, 0).numpy(), images[0, 1:9, 2:10])


def test_resize_scales_the_short_side_first(tmp_path):
    np.savez(tmp_path / "test.npz", images=np.full((1, 20, 40, 3), 9, np.uint8), labels=[0])
    read, _ = everything(open_images(tmp_path / "test.npz", SHAPE, resize=10))
    assert read.shape == (1, *SHAPE)
    assert (read == 9).all()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.npz", None, "no file or folder"),
        ("data.txt", b"x", "is none of: image folder, .npz, .bin, .parquet"),
        ("data.npz", b"not a zip", "cannot be read as labelled images"),
        ("data.npz", b"", "cannot be read as labelled images"),
        ("data.npz", b"PK\x03\x04 and then nothing", "cannot be read as labelled images"),
        ("data.npz", b"\x93NUMPY\x01\x00", "cannot be read as labelled images"),
        ("data.bin", b"123", "no whole number of CIFAR records"),
        ("data.parquet", b"123", "cannot be read as labelled images"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_images(tmp_path / name, SHAPE)


def test_arrays_of_the_wrong_kind_are_told(tmp_path):
    np.savez(tmp_path / "float.npz", images=np.zeros((2, 8, 8, 3)), labels=[0, 1])
    with pytest.raises(UserError, match=r"expected images \(N, H, W, C\) uint8"):
        open_images(tmp_path / "float.npz", SHAPE)


def test_folders_without_classes_or_images_are_told(tmp_path):
    with pytest.raises(UserError, match="has no sub-folders"):
        open_images(tmp_path, SHAPE)
    (tmp_path / "cat").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        open_images(tmp_path, SHAPE)


def test_a_damaged_image_is_named(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "half.png").write_bytes(png(pixels(1)[0])[:60])
    with pytest.raises(UserError, match=r"half.png is not a whole image"):
        everything(open_images(tmp_path, SHAPE))
    (tmp_path / "cat" / "a.png").write_text("not an image")
    with pytest.raises(UserError, match=r"a.png is not a whole image"):
        everything(open_images(tmp_path, SHAPE))


def test_images_that_are_too_small_or_have_other_channels_are_told(tmp_path):
    np.savez(tmp_path / "small.npz", images=pixels(1, 6, 6), labels=[0])
    with pytest.raises(UserError, match="6x6 pixels is smaller than the network's 8x8.*--resize"):
        everything(open_images(tmp_path / "small.npz", SHAPE))
    np.savez(tmp_path / "rgb.npz", images=pixels(1), labels=[0])
    with pytest.raises(UserError, match="3 channels, and the network takes 1"):
        everything(open_images(tmp_path / "rgb.npz", (1, 8, 8)))


@pytest.mark.parametrize(
    ("options", "message"), [({"resize": 4}, "at least the network's input, 8"), ({"limit": 0}, "positive")]
)
def test_options_that_make_no_sense_are_told(tmp_path, options, message):
    np.savez(tmp_path / "test.npz", images=pixels(1), labels=[0])
    with pytest.raises(UserError, match=message):
        open_images(tmp_path / "test.npz", SHAPE, **options)


def test_a_calibration_pack_is_data_to_choose_settings_on(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 6, 6, 3), dtype=np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    np.save(tmp_path / "labels.npy", np.arange(7))
    (batch,) = open_images(tmp_path, (3, 4, 4)).batches(10)
    assert np.array_equal(batch[0].permute(0, 2, 3, 1).numpy(), pixels[:, 1:5, 1:5])
    assert batch[1].tolist() == list(range(7))
    (tmp_path / "labels.npy").unlink()
    with pytest.raises(UserError, match="cannot be read as labelled images"):
        open_images(tmp_path, (3, 4, 4))


def test_a_missing_library_names_its_extra(tmp_path, monkeypatch):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "one.png").write_bytes(png(pixels(1)[0]))
    (tmp_path / "images.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match=r"Reading images needs Pillow: pip install 'mirageq\[data\]'"):
        everything(open_images(tmp_path, SHAPE))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"Reading parquet needs pyarrow: pip install 'mirageq\[data\]'"):
        open_images(tmp_path / "images.parquet", SHAPE)


def test_images_of_any_number_of_channels_are_scaled(tmp_path):
    for channels in (1, 2, 3, 5):
        ramp = np.broadcast_to(np.arange(0, 160, 10, dtype=np.uint8)[None, :, None], (8, 16, channels))
        np.savez(tmp_path / "images.npz", images=ramp[None], labels=[0])
        ((images, _),) = open_images(tmp_path / "images.npz", (channels, 16, 16), resize=16).batches(1)
        assert images.shape == (1, channels, 16, 16)
        assert (images[0, :, :, 1:] >= images[0, :, :, :-1]).all()


@pytest.mark.parametrize("labels", [["cat"], [0.5]])
def test_labels_are_whole_numbers(tmp_path, labels):
    np.savez(tmp_path / "images.npz", images=np.zeros((1, 8, 8, 3), np.uint8), labels=labels)
    with pytest.raises(UserError, match="labels are whole numbers, got"):
        open_images(tmp_path / "images.npz", SHAPE)


def test_labels_below_zero_are_told(tmp_path):
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 8, 8, 3), np.uint8), labels=[0, -1])
    data = open_images(tmp_path / "images.npz", SHAPE)
    with pytest.raises(UserError, match="have the label -1, and the network knows 5 classes"):
        data.check_labels(torch.tensor([0, -1]), 5)


def test_classes_are_in_the_order_of_their_names_on_every_system(tmp_path):
    for name in ("b", "A", "C"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(png(pixels(1)[0]))
    assert [file.parent.name for file, _ in open_images(tmp_path, SHAPE)._files.files] == ["A", "C", "b"]


def test_grey_images_serve_networks_of_one_channel_and_of_three(tmp_path):
    grey = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)
    for name, image in (("8", grey), ("16", grey.astype(np.uint16) * 256 + 255)):
        (tmp_path / name / "0").mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / name / "0" / "a.png")
        for channels in (1, 3):
            ((images, _),) = open_images(tmp_path / name, (channels, 16, 16)).batches(1)
            assert images.shape == (1, channels, 16, 16)
            assert (images[0] == torch.from_numpy(grey)).all()


def test_files_that_pillow_refuses_are_named(tmp_path, monkeypatch):
    (tmp_path / "0").mkdir()
    text = PngInfo()
    text.add_text("note", "a" * 2_000_000, zip=True)
    Image.fromarray(pixels(1)[0]).save(tmp_path / "0" / "a.png", pnginfo=text)
    with pytest.raises(UserError, match=r"a\.png is not a whole image: Decompressed data too large"):
        next(open_images(tmp_path, SHAPE).batches(1))
    Image.new("1", (16, 16)).save(tmp_path / "0" / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"a\.png is not a whole image: Image size"):
        next(open_images(tmp_path, SHAPE).batches(1))
