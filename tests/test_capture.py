from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from mirageq import Distill, Noise, canonical, graph, quantize
from mirageq.capture import capture, load_exported, on_device
from mirageq.errors import UserError
from mirageq.storage import network_hash
from mirageq.teacher import Teacher
from mirageq.testing import SHAPE, TinyResNet


class InPlace(nn.Module):
    """In-place activations and sums, dropout, and a value used after it was changed in place."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)
        self.act, self.drop = nn.Hardswish(inplace=True), nn.Dropout(0.5)

    def forward(self, x):
        x = nn.functional.relu_(self.bn(self.conv(x)))
        y = x
        x += 1
        x = self.drop(self.act(x) + y)
        return self.fc(x.mean((2, 3)))


def test_capture_agrees_with_the_model_and_leaves_it_alone():
    model = InPlace().train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    captured = capture(model, SHAPE)
    assert model.training
    images = torch.randn(5, *SHAPE)
    assert torch.equal(captured(images), InPlaceEval(model)(images))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    targets = [str(node.target) for node in captured.graph.nodes if node.op == "call_function"]
    assert not [target for target in targets if target.split(".")[1].endswith("_") or "dropout" in target]


def InPlaceEval(model):
    copy = InPlace()
    copy.load_state_dict(model.state_dict())
    return copy.eval()


class Padded(nn.Module):
    """Zeros around what convolutions read, and paddings that a convolution cannot do."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.second(nn.functional.pad(self.first(nn.functional.pad(x, (1, 1, 2, 2))), (0, 0, 1, 1)))
        for sides, settings in (
            ((0, 1, 0, 1), {}),
            ((-1, -1, 2, 2), {}),
            ((1, 1, 1, 1), {"mode": "reflect"}),
            ((1, 1, 1, 1), {"value": 0.5}),
            ((1, 1, 1, 1, 0, 0), {}),
        ):
            x = self.second(nn.functional.pad(x, sides, **settings))
        return self.fc(x.mean((2, 3)))


def test_convolutions_do_the_padding_with_zeros_that_they_can():
    model, images = Padded().eval(), torch.randn(3, 3, 128, 128)
    captured = capture(model, (3, 128, 128))
    assert torch.allclose(captured(images), model(images), atol=1e-6)
    layers = graph.weighted(captured.graph)
    assert [layer.args[4] for layer in layers[:2]] == [[2, 1], [2, 1]]
    outside = [place for place, layer in enumerate(layers) if graph.padding(layer.args[0]) == 0]
    assert (len(layers), outside) == (8, [2, 3, 6])
    assert len([node for node in captured.graph.nodes if "pad" in str(node.target)]) == 5


class Tokens(nn.Module):
    """Pixels as tokens, by a transposition that leaves memory as it is."""

    def __init__(self):
        super().__init__()
        self.conv, self.mix, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4 * 14 * 14, 5)

    def forward(self, x):
        tokens = self.mix(self.conv(x).float().permute(0, 2, 3, 1))
        return self.fc(tokens.transpose(1, 2).flatten(1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_is_transposed_may_change_its_shape(layout):
    model, images = Tokens().eval(), torch.randn(3, *SHAPE).contiguous(memory_format=layout)
    captured = capture(model, SHAPE)
    assert torch.allclose(captured(images), model(images), atol=1e-6)
    assert torch.allclose(captured.double()(images.double()).float(), model(images), atol=1e-5)


class Standardised(nn.Module):
    """Weights and norms that are computed in forward: from stored tensors alone, from none, and from the image."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)
        self.mix = nn.Parameter(torch.randn(6, 6, 1, 1))

    def forward(self, x):
        weight = self.conv.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
        bn = self.bn
        x = nn.functional.conv2d(x, weight, self.conv.bias * 2)
        x = nn.functional.batch_norm(x, bn.running_mean * 2, bn.running_var, bn.weight.abs() + 1e-5, bn.bias)
        x = nn.functional.conv2d(x, torch.ones(6, 1, 2, 2) / 4, groups=6)
        x = nn.functional.conv2d(nn.functional.conv2d(x, self.mix * 2), self.mix * 3)
        x = nn.functional.conv2d(x, x.mean().expand(6, 1, 1, 1), groups=6)
        return self.fc(x.mean((2, 3)))


def test_what_layers_read_is_computed_once_if_no_image_is_in_it():
    model, images = Standardised().eval(), torch.randn(3, *SHAPE)
    captured = capture(model, SHAPE)
    assert torch.allclose(captured(images), model(images), atol=1e-5)
    layers = graph.weighted(captured.graph)
    weights = ["conv.weight_computed", "conv2d_1_computed", "mix_computed", "mix_computed_2", "fc.weight"]
    assert [layer.args[1].target for layer in layers] == weights
    assert layers[0].args[2].target == "conv.bias_computed"
    (norm,) = graph.batch_norms(captured.graph)
    assert norm.args[1].target == "bn.weight_computed"
    assert norm.args[3].target == "bn.running_mean_computed"
    assert "bn.running_mean_computed" in dict(captured.named_buffers())
    assert "conv.weight" not in dict(captured.named_parameters())


def test_tensors_made_on_the_way_are_made_on_the_device():
    class Padding(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(8, 5)

        def forward(self, x):
            x = self.conv(x)
            return self.fc(torch.cat([x, torch.zeros(x.shape, device=x.device)], 1).mean((2, 3)))

    captured = on_device(capture(Padding(), SHAPE), "meta")
    assert captured(torch.empty(2, *SHAPE, device="meta")).shape == (2, 5)


def test_the_last_layer_is_the_one_computed_last():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.gate, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Conv2d(8, 5, 1)

        def forward(self, x):
            x = self.conv(x)
            return self.head(x * self.gate(x.mean((2, 3)))[:, :, None, None]).mean((2, 3))

    assert graph.layer_name(graph.last_layer(capture(Gated(), SHAPE).graph)) == "head"


def test_norms_without_running_statistics_are_refused():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(784, 5)
    )
    with pytest.raises(UserError, match="or the norm keeps no running ones"):
        capture(model, SHAPE)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x):
            x = self.conv(x)
            return self.fc(nn.functional.batch_norm(x, x.mean((0, 2, 3)), x.var((0, 2, 3))).mean((2, 3)))

    with pytest.raises(UserError, match="computes its statistics from the images"):
        Teacher.wrap(Own().requires_grad_(False), SHAPE)


def test_layers_keep_their_names():
    captured = capture(TinyResNet(), SHAPE)
    assert [graph.layer_name(node) for node in graph.batch_norms(captured.graph)] == ["bn1", "bn2", "bn3"]
    assert [graph.layer_name(node) for node in graph.weighted(captured.graph)] == ["conv1", "conv2", "conv3", "linear"]


def test_observation_equals_what_hooks_on_the_model_see():
    model, seen = TinyResNet(), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen.__setitem__(name, inputs[0]))
    model.linear.register_forward_pre_hook(lambda _, inputs: seen.__setitem__("features", inputs[0]))
    images = torch.randn(4, *SHAPE)
    logits = model(images)
    observation = Teacher.wrap(TinyResNet(), SHAPE).observe(images)
    torch.testing.assert_close(observation.logits, logits)
    torch.testing.assert_close(observation.features, seen["features"])
    assert list(observation.bn_inputs) == ["bn1", "bn2", "bn3"]
    for name, value in observation.bn_inputs.items():
        torch.testing.assert_close(value, seen[name])


def test_an_exported_file_serves_as_well_as_the_model(tmp_path):
    model = TinyResNet()
    torch.export.save(export(model, (torch.zeros(2, *SHAPE),), dynamic_shapes=({0: Dim("n")},)), tmp_path / "net.pt2")
    program, shape = load_exported(tmp_path / "net.pt2")
    assert shape == SHAPE
    teacher = Teacher.wrap(program, shape)
    images = torch.randn(7, *SHAPE)
    torch.testing.assert_close(teacher(images), model(images))
    assert [norm.name for norm in teacher.batch_norms] == ["bn1", "bn2", "bn3"]


def test_a_file_exported_for_one_batch_size_is_refused(tmp_path):
    torch.export.save(export(TinyResNet(), (torch.zeros(2, *SHAPE),)), tmp_path / "net.pt2")
    with pytest.raises(UserError, match=r"net\.pt2 was exported for batches of exactly 2"):
        load_exported(tmp_path / "net.pt2")
    with pytest.raises(UserError, match="The program was exported for batches of exactly 2"):
        capture(torch.export.load(tmp_path / "net.pt2"), SHAPE)


class Always(nn.Module):
    """Drops out in evaluation mode too; or draws its own numbers, or adds what is random to nothing it gives."""

    def __init__(self, kind):
        super().__init__()
        self.fc, self.kind = nn.Linear(3, 5), kind

    def forward(self, x):
        x = nn.functional.dropout(x.mean((2, 3)))
        noise = torch.randn_like(x)
        return self.fc(x + noise if self.kind == "noise" else x)


def test_dropout_that_forgot_to_ask_for_the_mode_is_taken_out():
    network, model, images = capture(Always("dropout").eval(), SHAPE), Always("dropout"), torch.randn(8, *SHAPE)
    model.load_state_dict(network.state_dict())
    torch.testing.assert_close(network(images), model.fc(images.mean((2, 3))))


def test_a_network_that_draws_random_numbers_is_refused():
    with pytest.raises(UserError, match=r"The network draws random numbers \('randn_like', randn_like\)"):
        capture(Always("noise").eval(), SHAPE)


@pytest.mark.parametrize("layer", [nn.RReLU(), nn.LSTM(3, 3, dropout=0.5, num_layers=2), nn.GRU(3, 3)], ids=str)
def test_what_is_random_in_training_alone_is_captured(layer):
    class Mostly(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.fc = layer, nn.Linear(3, 5)

        def forward(self, x):
            x = self.layer(x.mean((2, 3))[None])
            return self.fc((x[0] if isinstance(x, tuple) else x)[0])

    model, images = Mostly().eval(), torch.randn(4, *SHAPE)
    torch.testing.assert_close(capture(model, SHAPE)(images), model(images))


def test_attention_that_always_drops_is_refused():
    class Dropping(nn.Module):
        def __init__(self, share):
            super().__init__()
            self.fc, self.share = nn.Linear(3, 5), share

        def forward(self, x):
            x = x.mean((2, 3))[:, None]
            return self.fc(nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=self.share)[:, 0])

    capture(Dropping(0.0).eval(), SHAPE)
    with pytest.raises(UserError, match="The network draws random numbers .*scaled_dot_product_attention"):
        capture(Dropping(0.5).eval(), SHAPE)


def test_a_program_whose_tensors_are_all_buffers_has_a_device():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.randn(5, 3))

        def forward(self, x):
            return nn.functional.linear(x.mean((2, 3)), self.weight)

    program = export(Fixed(), (torch.zeros(2, *SHAPE),), dynamic_shapes=({0: Dim("n")},))
    result = quantize(program, Noise(), image_shape=SHAPE, tuner=Distill(steps=0), images=8, calibration_images=8)
    assert result.teacher.device == torch.device("cpu")


def test_a_damaged_exported_file_is_named_and_torch_says_nothing_besides(tmp_path, capfd):
    (tmp_path / "net.pt2").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="net.pt2 is not a readable exported program"):
        load_exported(tmp_path / "net.pt2")
    with pytest.raises(UserError, match="torch.export cannot capture"):
        capture(Branching(), SHAPE)
    assert capfd.readouterr() == ("", "")


def test_an_exported_file_with_two_inputs_is_refused(tmp_path):
    class Scaled(TinyResNet):
        def forward(self, images, factor):
            return super().forward(images * factor)

    inputs = torch.zeros(2, *SHAPE), torch.ones(())
    torch.export.save(export(Scaled(), inputs, dynamic_shapes=({0: Dim("n")}, None)), tmp_path / "net.pt2")
    with pytest.raises(UserError, match="must take one image tensor"):
        load_exported(tmp_path / "net.pt2")


def test_a_program_exported_in_training_mode_is_refused():
    program = export(TinyResNet().train(), (torch.zeros(2, *SHAPE),), dynamic_shapes=({0: Dim("n")},))
    with pytest.raises(UserError, match="training mode"):
        capture(program, SHAPE)


class Branching(TinyResNet):
    def forward(self, images):
        return super().forward(images) if images.sum() > -1 else images.flatten(1)


class Pair(TinyResNet):
    def forward(self, images):
        logits = super().forward(images)
        return logits, logits


class Map(TinyResNet):
    def forward(self, images):
        return self.conv1(images)


class OneLogit(TinyResNet):
    def forward(self, images):
        return super().forward(images)[:, :1]


class HalfInside(TinyResNet):
    def forward(self, images):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(images)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (TinyResNet().double(), SHAPE, r"weights are torch.float64; give it in full precision: model.float\(\)"),
        (
            HalfInside(),
            SHAPE,
            "in torch.bfloat16, and quantization begins from float32. Leave autocast",
        ),
        (TinyResNet(), (1, 16, 16), r"does not accept images of shape \(1, 16, 16\)"),
        (Branching(), SHAPE, "torch.export cannot capture"),
        (Pair(), SHAPE, "return one tensor of logits"),
        (OneLogit(), SHAPE, "gives one number for an image, which leaves no classes"),
        (Map(), SHAPE, r"must return logits \(N, classes\)"),
        (nn.Flatten(), SHAPE, "has no parameters"),
        (TinyResNet(), (3, 16), "An image shape is"),
    ],
)
def test_networks_that_cannot_serve_are_refused_in_a_sentence(model, shape, message):
    with pytest.raises(UserError, match=message):
        Teacher.wrap(model, shape)


def test_weights_that_are_not_numbers_are_refused_by_name():
    model = TinyResNet()
    model.conv2.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="'conv2.weight' holds 1 values that are NaN or infinite"):
        Teacher.wrap(model, SHAPE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.5,)}, "mean must have one number for each of the 3 channels"),
        ({"std": (1, 0, 1)}, "std must be positive"),
    ],
)
def test_a_normalisation_that_does_not_fit_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        Teacher.wrap(TinyResNet(), SHAPE, **options)


class StandardisedByNorm(nn.Conv2d):
    """Weight standardisation as timm writes it: by a norm of the weight, whose statistics are its batch's."""

    def forward(self, x):
        weight = nn.functional.batch_norm(self.weight.reshape(1, len(self.weight), -1), None, None, training=True)
        return nn.functional.conv2d(x, weight.reshape_as(self.weight), self.bias)


def test_weights_that_a_norm_standardises_are_computed_once():
    torch.manual_seed(0)
    network = nn.Sequential(StandardisedByNorm(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(784, 5)).eval()
    images, captured = torch.randn(2, *SHAPE), capture(network, SHAPE)
    torch.testing.assert_close(captured(images), network(images))
    assert len(graph.weighted(captured.graph)) == 2


def test_computed_weights_are_known_by_what_they_are_computed_from(monkeypatch):
    network = nn.Sequential(StandardisedByNorm(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(784, 5)).eval()
    own, compute = network_hash(Teacher.wrap(network, SHAPE)), canonical._value
    monkeypatch.setattr(canonical, "_value", lambda *steps: compute(*steps) * (1 + 1e-7))  # as elsewhere
    assert network_hash(Teacher.wrap(network, SHAPE)) == own
    with torch.no_grad():
        network[0].weight += 1e-3 * torch.randn_like(network[0].weight)
    assert network_hash(Teacher.wrap(network, SHAPE)) != own


def test_networks_that_keep_computed_tensors_are_told():
    network = TinyResNet()
    network.last = network(torch.zeros(1, *SHAPE))
    with pytest.raises(
        UserError, match=r"cannot be copied: .*Delete activations that it keeps, and take an old weight_n"
    ):
        Teacher.wrap(network, SHAPE)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_wrapped_network_is_the_network(wrap):
    network = TinyResNet()
    assert network_hash(Teacher.wrap(wrap(network), SHAPE)) == network_hash(Teacher.wrap(network, SHAPE))


def test_an_average_without_padding_counts_no_rim():
    network = nn.Sequential(nn.Conv2d(3, 4, 2), nn.AvgPool2d(2, ceil_mode=True), nn.Flatten(), nn.Linear(256, 5)).eval()
    images, captured = torch.randn(2, *SHAPE), capture(network, SHAPE)
    torch.testing.assert_close(captured(images), network(images))
    (pool,) = captured.graph.find_nodes(op="call_function", target=torch.ops.aten.avg_pool2d.default)
    assert pool.args[3:6] == ([0, 0], True, False)


def test_an_image_shape_may_be_a_list():
    assert Teacher.wrap(TinyResNet(), list(SHAPE)).image_shape == SHAPE


def test_programs_of_any_image_size_or_without_layers_are_told(tmp_path):
    network, images = TinyResNet(), (torch.zeros(2, *SHAPE),)
    free = {name: torch.export.Dim(f"d{name}", min=2 if name == 0 else 8) for name in range(4) if name != 1}
    torch.export.save(torch.export.export(network, images, dynamic_shapes=(free,)), tmp_path / "any.pt2")
    with pytest.raises(UserError, match="exported for images of any size. Export it again with a fixed height and"):
        load_exported(tmp_path / "any.pt2")
    program = torch.export.export(network, images, dynamic_shapes=({0: torch.export.Dim("n")},))
    with pytest.raises(UserError, match="decomposed; export it again without run_decompositions"):
        Teacher.wrap(program.run_decompositions(), SHAPE)
