from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mirageq.capture import capture
from mirageq.quant import Scheme, convert
from mirageq.testing import SHAPE, TinyResNet


class Net(nn.Module):
    """3 x 16 x 16 images through `body`, then to four logits."""

    def __init__(self, body):
        super().__init__()
        self.conv, self.conv2, self.body = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), body
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.body(self, self.conv(x)).mean((2, 3)))


def placed(model, placement="deploy", **settings):
    return of(capture(model.eval(), SHAPE), placement, **settings)


def of(network, placement, **settings):
    student = convert(network, Scheme(placement=placement, **settings))
    images = torch.randn(4, *SHAPE)
    student.calibrate([images])
    assert student(images).shape[0] == 4
    return student


def test_a_small_residual_network_by_hand():
    paper, deploy = placed(TinyResNet(), "paper"), placed(TinyResNet(), "deploy")
    assert list(paper.weight_quantizers) == list(deploy.weight_quantizers) == ["conv1", "conv2", "conv3", "linear"]
    assert list(paper.activation_quantizers) == ["conv1", "conv2.add", "conv3"]
    assert list(deploy.activation_quantizers) == ["image", "conv1", "conv2", "conv2.add", "conv3", "conv3.mean"]
    assert list(deploy.bias_quantizers) == ["conv1.bias", "conv2.bias", "conv3.bias", "linear.bias"]
    assert deploy.left_in_float() == [("linear", "the logits, the network's result")]
    floats = [name for name, _ in paper.left_in_float()]
    assert floats == ["image", "conv2", "conv3.mean", "linear.bias", "linear"]


class Ending(nn.Module):
    """Two heads, and what a network may still do with their logits."""

    def __init__(self, end):
        super().__init__()
        self.conv, self.f, self.g, self.end = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), nn.Linear(8, 4), end

    def forward(self, x):
        x = torch.relu(self.conv(x)).mean((2, 3))
        return self.end(self.f(x), self.g(x))


@pytest.mark.parametrize("placement", ["paper", "deploy"])
@pytest.mark.parametrize(
    ("end", "layers"),
    [
        (lambda f, g: torch.cat([f, g], 1), "fg"),
        (lambda f, g: (f + g) / 2, "fg"),
        (lambda f, g: torch.cat([torch.zeros_like(g), g], 1), "g"),
        (lambda f, g: 16 * g, "g"),
        (lambda f, g: torch.log_softmax(g / 3 - 1, 1), "g"),
        (lambda f, g: F.normalize(g), "g"),
        (lambda f, g: 30 * torch.tanh(g / 30), "g"),
        (lambda f, g: g - g.mean(1, keepdim=True), "g"),
        (lambda f, g: torch.stack([f, g]).mean(0), "fg"),
        (lambda f, g: torch.relu(f) + g, "fg"),
        (lambda f, g: torch.sigmoid(f) * g, "fg"),
    ],
)
def test_logits_stay_in_float_whatever_is_done_with_them(end, layers, placement):
    student = placed(Ending(end), placement, first_last_bits=8, residual_bits=6)
    assert set(student.activation_quantizers) <= {"image", "conv", "conv.mean"}
    for layer in layers:
        assert student.weight_quantizers[layer].bits == 8
    logits = [name for name, why in student.left_in_float() if why.startswith("the logits")]
    assert sorted(logits) == list(layers)


@pytest.mark.parametrize(
    ("end", "kept"),
    [
        (lambda a, b: torch.cat([a, b], 1).amax((2, 3)), ["a", "b"]),
        (lambda a, b: (a * torch.sigmoid(b.mean((2, 3), keepdim=True))).amax((2, 3)), ["b.sigmoid"]),
        (lambda a, b: (a + b).mean((2, 3)), ["a", "b", "b.add"]),
    ],
)
def test_maps_before_the_last_pooling_are_on_a_grid(end, kept):
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return end(torch.relu(self.a(x)), torch.relu(self.b(x)))

    assert set(kept) <= set(placed(Mapped()).activation_quantizers)


def test_a_head_that_something_else_reads_is_no_logit():
    class Again(Ending):
        def forward(self, x):
            x = self.f(torch.relu(self.conv(x)).mean((2, 3)))
            return x + self.g(torch.cat([torch.relu(x), x], 1))

    model = Again(None)
    model.g = nn.Linear(8, 4)
    student = placed(model, first_last_bits=8)
    assert "f" in student.activation_quantizers
    assert (student.weight_quantizers["f"].bits, student.weight_quantizers["g"].bits) == (4, 8)


def test_cifar_resnet20_has_20_weight_and_19_activation_quantizers(shared_data, monkeypatch):
    monkeypatch.syspath_prepend(str(shared_data))
    import zoo

    network = capture(zoo.load("cifar10_resnet20_akamaster")[0], (3, 32, 32))
    paper = convert(network, Scheme())
    assert (len(paper.weight_quantizers), len(paper.activation_quantizers)) == (20, 19)
    deploy = convert(network, Scheme(placement="deploy"))
    # image, 19 convolutions (10 with their ReLU), 9 sums with their ReLU, pooling; the padded shortcuts need none
    assert (len(deploy.weight_quantizers), len(deploy.activation_quantizers)) == (20, 1 + 19 + 9 + 1)


@pytest.mark.parametrize(
    ("body", "deploy", "paper"),
    [
        (lambda net, x: F.max_pool2d(x.relu(), 2), ["conv"], ["conv"]),
        (lambda net, x: F.max_pool2d(x, 2).relu(), ["conv", "conv_2"], ["conv"]),
        (lambda net, x: F.silu(x), ["conv", "conv.silu"], ["conv.silu"]),
        (lambda net, x: x * torch.sigmoid(x), ["conv", "conv.sigmoid", "conv.mul"], ["conv.mul"]),
        (lambda net, x: x.clamp(min=0).clamp(max=4), ["conv"], ["conv"]),
        (lambda net, x: x.relu().clamp_max(6), ["conv"], ["conv"]),
        (lambda net, x: F.hardtanh(x, 0, 6), ["conv"], ["conv"]),
        (lambda net, x: F.relu(F.relu6(x)), ["conv"], ["conv"]),
        (
            lambda net, x: x.relu() + net.conv2(x.relu()),
            ["conv", "conv_2", "conv_3", "conv2", "conv2.add"],
            ["conv", "conv_2"],
        ),
        (lambda net, x: x + net.conv2(x.relu()), ["conv", "conv_2", "conv2", "conv2.add"], ["conv"]),
        (lambda net, x: F.pad(x.relu(), (1, 1, 1, 1)), ["conv"], ["conv"]),
        (lambda net, x: F.pad(x.relu(), (1, 1, 1, 1), value=2.0), ["conv", "conv.pad"], ["conv"]),
        (lambda net, x: F.pad(x.relu(), (1, 1, 1, 1), mode="reflect"), ["conv"], ["conv"]),
        (lambda net, x: torch.cat(x.relu().chunk(2, 1)[::-1], 1), ["conv", "conv.cat"], ["conv"]),
        (lambda net, x: x / x.norm(dim=1, keepdim=True).clamp(min=1e-6), ["conv", "conv.div"], []),
        (lambda net, x: x.relu().clip(0.1, 4), ["conv"], ["conv"]),
        (lambda net, x: F.threshold(x, 0.0, 0.0), ["conv"], ["conv"]),
        (lambda net, x: x.multiply(torch.special.expit(x)), ["conv", "conv.sigmoid", "conv.mul"], ["conv.mul"]),
        (lambda net, x: torch.concat(x.relu().chunk(2, 1)[::-1], 1), ["conv", "conv.cat"], ["conv"]),
        (lambda net, x: x.relu()[:, :, ::2].transpose(2, 3).relu(), ["conv"], ["conv", "conv_2"]),
        (lambda net, x: F.gelu(x) * 2 + 1, ["conv", "conv.gelu", "conv.mul", "conv.add"], ["conv.gelu"]),
        (lambda net, x: torch.topk(x, 3, dim=2).values, ["conv", "conv.topk"], []),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_placements(body, deploy, paper):
    network = capture(Net(body).eval(), SHAPE)
    assert list(of(network, "paper").activation_quantizers) == paper
    if deploy is not None:
        first, *middle, last = of(network, "deploy").activation_quantizers
        assert (first, middle) == ("image", deploy)
        assert last.endswith("mean")


class Tail(nn.Module):
    def __init__(self, end):
        super().__init__()
        self.conv, self.end = nn.Conv2d(3, 4, 16), end

    def forward(self, x):
        return self.end(self.conv(x))


@pytest.mark.parametrize(
    ("end", "quantized"),
    [
        (lambda y: y.flatten(1), ["image"]),
        (lambda y: y.mean((2, 3)), ["image", "conv"]),
        (lambda y: y.flatten(1).softmax(1), ["image"]),
        (lambda y: y.relu().flatten(1), ["image"]),
    ],
)
def test_logits_stay_in_float_through_views_and_softmax(end, quantized):
    student = placed(Tail(end))
    assert list(student.activation_quantizers) == quantized
    assert student.left_in_float()[-1][0] == ("conv.mean" if "conv" in quantized else "conv")


def test_what_an_integer_runtime_cannot_do_is_reported():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma, self.norm = nn.Parameter(torch.ones(8, 1, 1)), nn.LayerNorm(14)
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
            self.made = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            x = self.norm(self.conv(x)) * self.gamma
            return self.fc(F.linear(x.mean((2, 3)), self.made - x.mean(), self.fc.weight.sum(0)))

    reasons = dict(placed(Odd()).left_in_float())
    assert "layer_norm is computed in float" in reasons["conv.layer_norm"]
    assert "read by mul" in reasons["gamma"]
    assert "computed in forward" in reasons["conv.linear"]


def test_padding_that_only_max_pools_see_keeps_the_grid():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x):
            x = F.pad(self.conv(x), (0, 1, 0, 1), value=-torch.inf)
            return self.fc(F.max_pool2d(x, 3, 2).mean((2, 3)))

    student = placed(Padded())
    assert list(student.activation_quantizers) == ["image", "conv", "conv.mean"]
    student.calibrate([torch.randn(4, *SHAPE)])
    assert student(torch.randn(4, *SHAPE)).isfinite().all()


def test_first_and_last_bits():
    for placement, last_input in (("paper", "conv3"), ("deploy", "conv3.mean")):
        student = placed(TinyResNet(), placement, weight_bits=3, activation_bits=4, first_last_bits=8)
        assert [part.bits for part in student.weight_quantizers.values()] == [8, 3, 3, 8]
        bits = {name: part.bits for name, part in student.activation_quantizers.items()}
        assert bits.pop(last_input) == 8
        assert bits.pop("image", 8) == 8
        assert set(bits.values()) == {4}
    assert placed(TinyResNet(), "deploy").activation_quantizers["image"].bits == 8


def test_the_first_layer_may_give_more_bits():
    settings = {"activation_bits": 3, "first_output_bits": 8}
    bits = {name: part.bits for name, part in placed(TinyResNet(), **settings).activation_quantizers.items()}
    assert bits == {"image": 8, "conv1": 8, "conv2": 3, "conv2.add": 3, "conv3": 3, "conv3.mean": 3}
    beside = placed(TinyResNet(), residual_bits=7, **settings).activation_quantizers
    assert beside["conv1"].bits == 8
    assert "conv1.requantized" not in beside
    paper = placed(TinyResNet(), "paper", **settings).activation_quantizers
    assert [paper[name].bits for name in ("conv1", "conv2.add")] == [8, 3]
    gated = placed(Net(lambda net, x: net.conv2(F.silu(x))), **settings).activation_quantizers
    assert {name: part.bits for name, part in gated.items()} == {
        "image": 8,
        "conv": 8,
        "conv.silu": 8,
        "conv2": 3,
        "conv2.mean": 3,
    }


def test_residual_bits_are_for_what_sums_and_pooling_read():
    settings = {"activation_bits": 3, "first_last_bits": 4, "residual_bits": 7}
    bits = {name: part.bits for name, part in placed(TinyResNet(), **settings).activation_quantizers.items()}
    stream = {"conv1": 7, "conv1.requantized": 3}
    assert bits == {"image": 8, **stream, "conv2": 7, "conv2.add": 3, "conv3": 7, "conv3.mean": 4}
    paper = placed(TinyResNet(), "paper", **settings).activation_quantizers
    assert {name: part.bits for name, part in paper.items()} == {**stream, "conv2.add": 3, "conv3": 4}


@pytest.mark.parametrize(
    ("body", "bits"),
    [
        (lambda net, x: net.conv2(x) + x, [8, 3]),
        (lambda net, x: net.conv2(F.pad(x, (1, 1)))[..., 1:-1] + x, [8, 3]),
        (lambda net, x: net.conv2(y := F.pad(x, (1, 1))) + y, [3]),  # one tensor for both: as layers need it
        (lambda net, x: net.conv2(x), [3]),
        (lambda net, x: net.conv2(x).relu() + x.mean(), [8, 3]),
    ],
)
def test_a_stream_is_requantized_for_the_layers_that_read_it(body, bits):
    student = placed(Net(body), residual_bits=8, activation_bits=3)
    parts = student.activation_quantizers
    assert [part.bits for name, part in parts.items() if name in ("conv", "conv.requantized")] == bits
    (rounding,) = student.network.graph.find_nodes(op="call_module", target="bias_quantizers.conv2_bias")
    read = "conv_requantized" if len(bits) == 2 else "conv"
    assert rounding.args[1].target == f"activation_quantizers.{read}.scale"
    (layer,) = (reader for reader in student.network.graph.nodes if rounding in reader.all_input_nodes)
    assert read in str(layer.args[0].target) or read in str(layer.args[0].args[0].target)


def test_padded_shortcuts_share_the_grid_of_their_source():
    student = placed(Net(lambda net, x: net.conv2(F.pad(x.relu()[:, :, ::2], (2, 2)))))
    (rounding,) = student.network.graph.find_nodes(op="call_module", target="bias_quantizers.conv2_bias")
    assert rounding.args[1].target == "activation_quantizers.conv.scale"


@pytest.mark.parametrize(
    "body",
    [
        lambda net, x: F.normalize(x.relu(), dim=1),
        lambda net, x: (x - x.mean(1, True)) / torch.sqrt((x - x.mean(1, True)).pow(2).mean(1, True) + 1e-6),
        lambda net, x: x.relu().clamp(min=1e-6).pow(net.power).mean((2, 3), True).pow(1 / net.power),
        lambda net, x: x.relu() / (x.relu().sum(1, True) * 2 + 1e-6),
    ],
    ids=["normalize", "layer norm", "generalised mean", "linear attention"],
)
def test_what_is_divided_by_keeps_its_digits(body):
    network = Net(body).eval()
    with torch.no_grad():
        network.conv.bias[:] = -torch.arange(1.0, 9.0)  # most channels are dead, most divisors near zero
    network.power = nn.Parameter(torch.tensor(3.0))
    student, images = of(capture(network, SHAPE), "deploy"), torch.randn(64, *SHAPE)
    student.calibrate([images])
    logits = student(images)
    logits.square().sum().backward()
    assert logits.isfinite().all()
    assert all(value.grad.isfinite().all() for value in student.parameters() if value.grad is not None)
    assert any("keeps its digits near zero" in reason for _, reason in student.left_in_float())
