from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from mirageq import UserError
from mirageq.capture import capture
from mirageq.observe import Observer, compiled
from mirageq.teacher import Teacher

SHAPE = (3, 9, 9)


class Strided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.other = nn.Conv2d(4, 5, 3, stride=2), nn.BatchNorm2d(5)
        self.last = nn.Linear(5, 6)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.last(torch.relu(self.other(self.second(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return capture(Strided(), SHAPE)


def test_only_what_follows_a_stride_swings_and_the_network_stays(network):
    images = torch.randn(4, *SHAPE)
    plain = Observer(network)(images)
    observe = Observer(network, swing=True)
    observe.swing_by(torch.Generator().manual_seed(0))
    seen = [observe(images) for _ in range(12)]
    for one in seen:
        assert torch.equal(one.bn_inputs["norm"], plain.bn_inputs["norm"])
    moved = [not torch.equal(one.logits, plain.logits) for one in seen]
    assert any(moved)
    assert not all(moved)  # one shift of nine is none
    assert torch.equal(Observer(network)(images).logits, plain.logits)
    observe.swing_by(torch.Generator().manual_seed(0))
    assert torch.equal(observe(images).logits, seen[0].logits)


class Twice(nn.Module):
    """One norm read twice, and two more whose statistics lie in the network itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, stride=2, padding="valid"), nn.BatchNorm2d(3)
        for name in ("a", "b"):
            self.register_buffer(f"mean_{name}", torch.zeros(3))
            self.register_buffer(f"var_{name}", torch.ones(3))
        self.last = nn.Linear(3, 4)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(2 * self.norm(self.conv(x)))
        x = nn.functional.batch_norm(2 * x, self.mean_a, self.var_a)
        return self.last(nn.functional.batch_norm(2 * x, self.mean_b, self.var_b).mean((2, 3)))


def test_norms_of_one_module_have_names_of_their_own():
    teacher = Teacher.wrap(Twice(), SHAPE)
    names = [norm.name for norm in teacher.batch_norms]
    assert len(set(names)) == 4
    assert names[:2] == ["norm", "norm_2"]
    assert all(names)
    seen = teacher.observe(torch.randn(4, *SHAPE))
    assert list(seen.bn_inputs) == names
    spread = [float(x.std()) for x in seen.bn_inputs.values()]
    assert spread[1] == pytest.approx(2 * spread[0], rel=1e-3)


def test_convolutions_told_to_pad_in_words_swing_too():
    network = capture(Twice(), SHAPE)
    images, observe = torch.randn(4, *SHAPE), Observer(network, swing=True)
    observe.swing_by(torch.Generator().manual_seed(0))
    plain = Observer(network)(images).logits
    assert any(not torch.equal(observe(images).logits, plain) for _ in range(8))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a C++ compiler")
def test_a_compiled_pass_sees_the_same_and_has_the_same_gradient(network):
    images = torch.randn(6, *SHAPE, requires_grad=True)
    observe = Observer(network)
    results = []
    for look in (observe, compiled(observe)):
        seen = look(images)
        total = sum(
            (mean.square().sum() + var.sum() for mean, var in seen.moments.values()), seen.logits.square().sum()
        )
        results.append((seen, torch.autograd.grad(total, images)[0]))
    (plain, gradient), (fast, other) = results
    assert torch.allclose(fast.logits, plain.logits, atol=1e-5)
    assert torch.allclose(fast.features, plain.features, atol=1e-5)
    assert list(fast.moments) == list(plain.moments)
    for name, moments in fast.moments.items():
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(moments, plain.moments[name], strict=True))
    assert torch.allclose(other, gradient, atol=1e-4)


def test_where_nothing_compiles_a_sentence_says_so(network, monkeypatch):
    def broken(function, **settings):
        def run(images):
            raise torch._dynamo.exc.BackendCompilerFailed(lambda graph: graph, RuntimeError("no C++ compiler"), None)

        return run

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UserError, match=r"cannot be compiled here.*method.compile=false"):
        compiled(Observer(network))(torch.zeros(2, *SHAPE))
