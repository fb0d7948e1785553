from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from mirageq.capture import capture
from mirageq.graph import aten, batch_norms, weighted
from mirageq.quant.fold import fold_batch_norms

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def randomised(model):
    """Norms that do something: fresh ones hardly differ from the identity."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, NORMS):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
                nn.init.normal_(module.bias, 0, 0.1, generator=generator)
    return model.eval()


def library(name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}: pip install mirageq[{name}]")
    models = pytest.importorskip("mirageq.models")
    return getattr(models, f"import_{name}")()


def folded_like(model, shape):
    network = capture(randomised(model), shape)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    folded = fold_batch_norms(network)
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, result = network(images), folded(images)
    assert batch_norms(network.graph)
    assert not batch_norms(folded.graph)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert (result - expected).abs().max() <= 2e-5 * expected.abs().max()
    return network, folded


def test_a_small_densenet_and_its_norms_before_convolutions():
    models = library("torchvision").models
    model = models.DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=16, num_classes=10)
    _, folded = folded_like(model, (3, 64, 64))
    alone = [layer.args[1].target for layer in weighted(folded.graph) if "norm" in layer.args[1].target]
    assert len(alone) == 4 + 1 + 1  # before each dense layer's first convolution, the transition, the end


@pytest.mark.slow  # capturing takes seconds each
@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("torchvision", "resnet18"),
        ("torchvision", "mobilenet_v2"),
        ("torchvision", "densenet121"),
        ("torchvision", "regnet_y_400mf"),
        ("timm", "tf_efficientnet_lite0"),
    ],
)
def test_real_networks_compute_the_same_without_norms(source, name):
    package = library(source)
    torch.manual_seed(0)
    model = package.create_model(name) if source == "timm" else package.models.get_model(name)
    network, folded = folded_like(model, (3, 64, 64))
    layers, before = weighted(folded.graph), len(weighted(network.graph))
    unfolded = [layer for layer in layers if "norm" in layer.args[1].target]
    assert len(layers) == before + len(unfolded)
    assert bool(unfolded) == (name == "densenet121")
    kept = {layer.args[1].target for layer in weighted(network.graph)}
    assert kept <= {layer.args[1].target for layer in layers}


class Odd(nn.Module):
    """Norms in every place where folding may go wrong."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.conv, self.plain = nn.Conv2d(3, 6, 3, padding="same", bias=True), nn.BatchNorm2d(6, affine=False)
        self.twice, self.shared = nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.other = nn.BatchNorm2d(6)
        self.branch, self.after_branch = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.hidden, self.flat = nn.Linear(6, 5), nn.BatchNorm1d(5)
        self.alone = nn.BatchNorm1d(5)
        self.tokens, self.channels_are_dim_1 = nn.Linear(4, 7), nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        x = self.plain(self.conv(self.first(x)))
        x = self.shared(self.twice(x))
        x = self.other(self.twice(x.relu()))
        x = self.shared(x.relu())
        y = self.branch(x)
        x = self.after_branch(y) + y
        x = self.alone(self.flat(self.hidden(x.mean((2, 3)))).relu())
        x = self.channels_are_dim_1(self.tokens(x.unsqueeze(2).expand(-1, 5, 4) * 1.5)).mean(2)
        return self.head(x)


def test_odd_places():
    _, folded = folded_like(Odd(), (3, 8, 8))
    names = [layer.args[1].target for layer in weighted(folded.graph)]
    assert names == [
        *("first.weight", "conv.weight", "twice.weight_2", "twice.weight", "shared.weight", "branch.weight"),
        *("after_branch.weight", "hidden.weight", "alone.weight", "tokens.weight", "channels_are_dim_1.weight"),
        "head.weight",
    ]
    biases = [layer.args[2].target for layer in weighted(folded.graph)]
    names[2:4] = "twice.weight", "twice.weight_2"
    assert biases == [name.replace("weight", "bias") for name in names]
    assert all(isinstance(parameter, nn.Parameter) for parameter in folded.parameters())
    assert not dict(folded.named_buffers())


def test_a_norm_alone_is_a_depthwise_convolution():
    _, folded = folded_like(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)), (3, 2, 2))
    conv = folded.graph.find_nodes(op="call_function", target=aten.conv2d.default)[0]
    assert folded.get_parameter(conv.args[1].target).shape == (3, 1, 1, 1)
    assert conv.args[6] == 3
