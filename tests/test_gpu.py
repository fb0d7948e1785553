"""The main job on a GPU: every method, tuner and kind of range, continuing, and the command line from run to file."""

from __future__ import annotations

import json
from itertools import islice

import pytest
import torch
from torch import nn

from mirageq import Correct, Distill, Journal, Reconstruct, Scheme, SQuant, Teacher, cli, quantize
from mirageq.methods import METHODS, Noise, ZeroQ
from mirageq.quant import convert
from mirageq.quant.quantizers import in_float
from mirageq.testing import SHAPE, TinyDense, TinyResNet, quick

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEPLOY = Scheme(placement="deploy", weight_range="mse", activation_range="mse", residual_bits=8)


@pytest.fixture(scope="module")
def teacher():
    return Teacher.wrap(TinyResNet(), SHAPE, mean=(0.5,) * 3, std=(0.25,) * 3, device="cuda")


@pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)
def test_a_method_makes_images_and_goes_on_where_it_was(kind, teacher, tmp_path, stumbling):
    method = quick(kind)
    source = method.synthesize(teacher, 10)
    assert source.sample(10).images.isfinite().all()
    batch = next(islice(source.batches(4, teacher), 1, None))
    assert batch.images.shape == (4, *SHAPE)
    if hasattr(method, "iterations") and not hasattr(method, "warmup"):
        with pytest.raises(KeyboardInterrupt):
            method.synthesize(teacher, 10, journal=stumbling(tmp_path, 3))
        continued = method.synthesize(teacher, 10, journal=Journal(tmp_path))
        torch.testing.assert_close(continued.sample(10).images, source.sample(10).images, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("tuner", "scheme"),
    [
        (Distill(steps=4, batch_size=8), Scheme()),
        (Distill(steps=4, batch_size=8, mix=True, ce_weight=0.0), Scheme(learned_steps=True, weight_range="mse")),
        (Reconstruct(steps=8, batch_size=8, images=16, mirrored=True, softened=True, mixes=1), DEPLOY),
        (Reconstruct(steps=8, batch_size=8, images=16, weight_scale_lr=1e-3, bias_lr=1e-3, cache_bytes=2**12), DEPLOY),
        (Reconstruct(steps=8, batch_size=8, images=16, then=Distill(steps=2, batch_size=8)), DEPLOY),
        (SQuant(), Scheme(placement="deploy", weight_range="mse", ranges_from="batch_norms")),
        (Correct(images=16), DEPLOY),
        (Correct(images=16), Scheme(placement="deploy", activation_range="percentile")),
        (Distill(steps=0), Scheme(activation_range="ema", weight_range="percentile")),
    ],
    ids=str,
)
def test_a_student_is_the_same_on_both_devices(tuner, scheme, teacher):
    result = quantize(teacher, ZeroQ(iterations=3, batch_size=8), scheme=scheme, tuner=tuner, images=16)
    images = result.source.sample(16).images
    with torch.backends.cudnn.flags(allow_tf32=False):
        here = result.student(images.cuda()).cpu()
    assert here.isfinite().all()
    there = result.student.cpu()(images)
    assert (here - there).abs().median() < 1e-3  # a value in the middle of two codes may fall either way


def test_equalization_changes_no_logit():
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    teacher = Teacher.wrap(nn.Sequential(*layers, nn.Linear(8, 5)), SHAPE, device="cuda")
    student = convert(teacher.network, Scheme(placement="deploy", equalize=True)).cuda()
    images = torch.randn(4, *SHAPE, device="cuda")
    with in_float(student), torch.no_grad():
        torch.testing.assert_close(student(images), teacher(images), atol=1e-3, rtol=1e-3)


def test_layers_of_a_dense_network_are_reconstructed_one_by_one():
    teacher = Teacher.wrap(TinyDense(), SHAPE, device="cuda")
    tuner = Reconstruct(steps=4, batch_size=8, images=16, most_layers=2)
    result = quantize(teacher, Noise(), scheme=DEPLOY, tuner=tuner, images=16)
    assert result.student(result.source.sample(4).images.cuda()).isfinite().all()


def test_the_command_line_from_run_to_file(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    run = tmp_path / "run"
    made = [
        "py:mirageq.testing:TinyResNet",
        "--image-shape",
        "3,16,16",
        "--mean",
        "0.5,0.5,0.5",
        "--std",
        "0.2,0.2,0.2",
    ]
    made += ["--method", "zeroq", "--set", "method.iterations=3", "--set", "images=32", "--set", "tuner.steps=2"]
    made += ["--set", "scheme.placement=deploy", "--set", "tuner.batch_size=8"]
    assert cli.main(["quantize", *made, "--out", str(run)]) == 0, capsys.readouterr().err
    assert json.loads((run / "run.json").read_text())["machine"]["device"] == torch.cuda.get_device_name()
    assert cli.main(["show", str(run)]) == 0
    assert cli.main(["export", str(run), "--out", str(tmp_path / "file.onnx")]) == 0, capsys.readouterr().err
