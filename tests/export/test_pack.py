"""Packs, and each adapter against the tool it is for."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from mirageq import Teacher, UserError, cli
from mirageq.data import open_images
from mirageq.export import export_teacher
from mirageq.export.adapters import nncf_dataset, onnxruntime_reader, torch_loader, write_folder, write_numpy
from mirageq.export.pack import open_pack, write_pack
from mirageq.images import Batch
from mirageq.testing import SHAPE, TinyResNet

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


@pytest.fixture(scope="module")
def teacher():
    return Teacher.wrap(TinyResNet(), SHAPE, mean=MEAN, std=STD)


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    return Batch(torch.randn(24, *SHAPE, generator=generator), torch.arange(24) % 5)


@pytest.fixture
def pack(teacher, batch, tmp_path):
    write_pack(batch, teacher, tmp_path / "pack", {"method": "test"})
    return open_pack(tmp_path / "pack")


def test_pixels_give_the_networks_input_back_where_they_can_show_it(pack, batch):
    assert pack.pixels.dtype == np.uint8
    assert pack.pixels.shape == (24, *SHAPE[1:], 3)
    mean, std = (np.reshape(values, (3, 1, 1)).astype(np.float32) for values in (MEAN, STD))
    lowest, highest = -mean / std, (1 - mean) / std
    expected = np.clip(batch.images.numpy(), lowest, highest)
    assert pack.inputs(0, 24) == pytest.approx(expected, abs=0.51 / 255 / min(STD))
    outside = (batch.images.numpy() < lowest - 0.01) | (batch.images.numpy() > highest + 0.01)
    assert pack.manifest.clipped == pytest.approx(outside.mean(), abs=0.01)
    assert pack.labels.tolist() == batch.labels.tolist()


def test_images_of_another_size_are_no_pack(teacher, tmp_path):
    small = Batch(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))
    with pytest.raises(UserError, match=r"shape \(3, 8, 8\), and other tools feed the network \(3, 16, 16\). Paint"):
        write_pack(small, teacher, tmp_path / "pack", {})
    assert not (tmp_path / "pack").exists()


def test_a_run_becomes_a_pack_an_array_and_a_folder(tmp_path, capsys):
    network = ["py:mirageq.testing:TinyResNet", "--image-shape", "3,16,16", "--mean", "0.5,0.5,0.5"]
    run = [*network, "--std", "0.25,0.25,0.25", "--method", "noise", "--count", "12", "--out", str(tmp_path / "run")]
    assert cli.main(["synthesize", *run]) == 0
    extra = ["--numpy", str(tmp_path / "images.npy"), "--folder", str(tmp_path / "folder")]
    assert cli.main(["pack", str(tmp_path / "run"), "--out", str(tmp_path / "pack"), "--count", "10", *extra]) == 0
    assert "wrote 10 images" in capsys.readouterr().out
    pack = open_pack(tmp_path / "pack")
    assert pack.manifest.made_by["method"] == "noise"
    assert np.load(tmp_path / "images.npy") == pytest.approx(pack.inputs(0, 10, channels_last=True))
    folder = open_images(tmp_path / "folder", SHAPE)
    assert folder.count == 10
    assert cli.main(["pack", str(tmp_path / "run"), "--out", str(tmp_path / "pack")]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_onnxruntime_quantizes_with_the_pack(pack, teacher, tmp_path):
    from onnxruntime import InferenceSession
    from onnxruntime.quantization import quantize_static

    export_teacher(teacher, tmp_path / "float.onnx")
    reader = onnxruntime_reader(pack, batch_size=4)
    quantize_static(tmp_path / "float.onnx", tmp_path / "int8.onnx", reader)
    assert reader.get_next() is None
    reader.rewind()
    assert reader.get_next()["images"].shape == (4, *SHAPE)
    session = InferenceSession(str(tmp_path / "int8.onnx"), providers=["CPUExecutionProvider"])
    images = pack.inputs(0, 24)
    expected = teacher(torch.from_numpy(images)).detach().numpy()
    got = session.run(None, {"images": images})[0]
    assert np.abs(got - expected).max() < 0.2 * np.abs(expected).max()


def test_nncf_quantizes_a_torch_and_an_openvino_model_with_the_pack(pack, teacher, tmp_path):
    nncf, openvino = pytest.importorskip("nncf"), pytest.importorskip("openvino")
    images = pack.inputs(0, 24)
    expected = teacher(torch.from_numpy(images)).detach().numpy()
    export_teacher(teacher, tmp_path / "float.onnx")
    model = openvino.Core().read_model(tmp_path / "float.onnx")
    quantized = nncf.quantize(model, nncf_dataset(pack), subset_size=24)
    got = openvino.Core().compile_model(quantized, "CPU")([images])[0]
    assert np.abs(got - expected).max() < 0.2 * np.abs(expected).max()
    first = next(iter(nncf_dataset(pack, tensors=True, batch_size=8).get_inference_data()))
    assert torch.equal(first, torch.from_numpy(images[:8]))
    named = next(iter(nncf_dataset(pack, input_name="images").get_inference_data()))
    assert np.array_equal(named["images"], images[:1])


def test_a_plain_pytorch_loop_reads_the_pack(pack, teacher):
    seen = [(images, labels) for images, labels in torch_loader(pack, batch_size=10)]
    assert [len(labels) for _, labels in seen] == [10, 10, 4]
    assert torch.equal(torch.cat([images for images, _ in seen]), torch.from_numpy(pack.inputs(0, 24)))
    assert torch.cat([labels for _, labels in seen]).tolist() == pack.labels.tolist()


def test_arrays_come_in_either_layout(pack, tmp_path):
    write_numpy(pack, tmp_path / "a.npy", channels_last=False)
    assert np.array_equal(np.load(tmp_path / "a.npy"), pack.inputs(0, 24))
    write_numpy(pack, tmp_path / "b.npy", normalised=False)
    assert np.array_equal(np.load(tmp_path / "b.npy"), pack.pixels)
    with pytest.raises(UserError, match="cannot be written"):
        write_numpy(pack, tmp_path / "none" / "c.npy")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        write_folder(pack, tmp_path / "file")


def test_damage_and_other_formats_are_said(pack, tmp_path):
    folder = tmp_path / "pack"
    data = bytearray((folder / "pixels.npy").read_bytes())
    data[-1] ^= 1
    (folder / "pixels.npy").write_bytes(data)
    with pytest.raises(UserError, match="is damaged: its hash"):
        open_pack(folder)
    (folder / "pixels.npy").write_bytes(data[:-9])
    with pytest.raises(UserError, match="not a readable calibration pack"):
        open_pack(folder)
    manifest = json.loads((folder / "pack.json").read_text())
    (folder / "pack.json").write_text(json.dumps({**manifest, "format": 9}))
    with pytest.raises(UserError, match="written in format 9"):
        open_pack(folder)
    with pytest.raises(UserError, match="not a readable calibration pack"):
        open_pack(tmp_path)


def test_without_normalisation_there_are_no_pixels(batch, tmp_path):
    with pytest.raises(UserError, match="give its mean and std"):
        write_pack(batch, Teacher.wrap(TinyResNet(), SHAPE), tmp_path / "pack", {})
    assert not (tmp_path / "pack").exists()


def test_a_missing_tool_or_too_large_a_batch_is_said(pack, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="holds 24 images, fewer than the batch size 25"):
        nncf_dataset(pack, batch_size=25)
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(UserError, match="pip install nncf"):
        nncf_dataset(pack)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match="Writing images needs pillow"):
        write_folder(pack, tmp_path / "folder")
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    with pytest.raises(UserError, match=r"mirageq\[onnx\]"):
        onnxruntime_reader(pack)
