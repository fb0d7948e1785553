"""The demo on a tiny network, and the outside method under the same conformance checks as the methods inside."""

from __future__ import annotations

import importlib.util
import io
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from mirageq import recipe
from mirageq.models import NetworkChoice
from mirageq.report import loss_curves
from mirageq.testing import METHOD_CHECKS, SHAPE


def example(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).resolve().parents[1] / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def own_method():
    return example("own_method")


@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__)
def test_own_method(check, own_method, tmp_path):
    check(own_method.SmoothNoise(), tmp_path)


def test_the_demo_compares_five_models_and_writes_a_run_and_a_proved_file(tmp_path):
    demo, screen = example("demo"), io.StringIO()
    quick = ["images=16", "calibration_images=16", "method.iterations=3", "method.image_size=null", "tuner.steps=3"]
    wanted = recipe.build(recipe.assign(recipe.read("demo"), quick))
    grey = (0.5, 0.5, 0.5)
    choice = NetworkChoice(name="py:mirageq.testing:TinyResNet", image_shape=SHAPE, mean=grey, std=grey)
    shares = demo.compare(choice, wanted, tmp_path / "demo", Console(file=screen, width=120))
    painted = {"painted images, tuned", "painted images, not tuned"}
    assert set(shares) == painted | {"noise, tuned", "no images", "8 bits, no images"}
    assert all(0 <= share <= 100 for share in shares.values())
    for name, share in shares.items():
        line = next(line for line in screen.getvalue().splitlines() if re.search(rf"[│|] {name} ", line))
        assert f"{share:.1f} %" in line
    assert "same class" in screen.getvalue()
    assert {"run.json", "images.png", "model.onnx"} <= {path.name for path in (tmp_path / "demo").iterdir()}
    (nothing := tmp_path / "nothing").mkdir()
    loss_curves(nothing, nothing / "curves.png")
    assert (tmp_path / "demo" / "curves.png").read_bytes() != (nothing / "curves.png").read_bytes()
    assert demo.free_folder(tmp_path / "demo") == tmp_path / "demo-2"
