from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from mirageq import Distill, Journal, Noise, Scheme, Teacher, UserError, recipe
from mirageq.pipeline import calibrate
from mirageq.quant import convert
from mirageq.quant.fake_quant import grid, learned_fake_quantize
from mirageq.quant.quantizers import ActivationQuantizer, WeightQuantizer
from mirageq.testing import SHAPE, TinyDense, TinyResNet
from mirageq.tuning import Correct, soft
from mirageq.tuning.cache import Cache, Spilled
from mirageq.tuning.contract import forget
from mirageq.tuning.reconstruct import LIVING_CACHES, Reconstruct
from mirageq.tuning.soft import Dropping, DroppingActivation, SoftWeight

QUICK = {"steps": 60, "batch_size": 16, "images": 64}


@pytest.fixture(scope="module")
def teacher():
    return Teacher.wrap(TinyResNet(), SHAPE)


@pytest.fixture(scope="module")
def source(teacher):
    return Noise().synthesize(teacher, 64)


def student_of(teacher, source, **scheme):
    settings = {"weight_bits": 3, "activation_bits": 4, "weight_range": "mse", "activation_range": "mse"}
    student = convert(teacher.network, Scheme(**{**settings, **scheme}))
    calibrate(student, source, 64)
    return student


@pytest.mark.parametrize("placement", ["paper", "deploy"])
@pytest.mark.parametrize("settings", [{}, {"drop": 0.0}, {"weight_scale_lr": 1e-3}, {"bias_lr": 1e-3}])
def test_blocks_come_closer_and_weights_stay_on_their_grid(teacher, source, placement, settings):
    student = student_of(teacher, source, placement=placement)
    journal = Journal()
    Reconstruct(**{**QUICK, "steps": 200}, **settings).tune(teacher, student, source, journal=journal)
    first, _, _ = (row for row in journal.history if row["stage"] == "reconstruct")
    assert first["after"] < 0.9 * first["before"]
    for name, quantizer in student.weight_quantizers.items():
        weight = student.network.get_parameter(f"{name}.weight").detach()
        assert quantizer(weight)[0] == pytest.approx(weight, abs=1e-6)


@pytest.mark.parametrize("placement", ["deploy", "paper"])
def test_biases_learn_if_they_have_a_rate(teacher, source, placement):
    def moved(**settings):
        student = student_of(teacher, source, placement=placement)
        before = {name: value.clone() for name, value in student.named_parameters() if value.dim() == 1}
        Reconstruct(**QUICK, **settings).tune(teacher, student, source)
        return [bool((student.get_parameter(name) != value).any()) for name, value in before.items()]

    assert not any(moved())
    assert all(moved(bias_lr=1e-3))


def test_another_tuner_can_follow_and_an_interruption_in_it_costs_no_block(teacher, source, stumbling, tmp_path):
    then = Distill(steps=6, batch_size=8, ce_weight=0.0, lr=1e-4, optimizer="adam")
    settings = Reconstruct(**QUICK, then=then)
    whole, parts = student_of(teacher, source), student_of(teacher, source)
    settings.tune(teacher, whole, source)
    with pytest.raises(KeyboardInterrupt):
        settings.tune(teacher, parts, source, journal=stumbling(tmp_path, 5))
    again, journal = student_of(teacher, source), Journal(tmp_path, checkpoint_seconds=0)
    settings.tune(teacher, again, source, journal=journal)
    images = source.sample(8).images
    with torch.no_grad():
        assert torch.equal(whole(images), again(images))
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"reconstruct.pt", "tune.pt"}
    forget(journal)
    assert not (tmp_path / "checkpoints").exists()


def test_a_recipe_holds_both_tuners():
    table = {"tuner": {"name": "reconstruct", "steps": 7, "then": {"name": "distill", "steps": 3}}}
    built = recipe.build(table)
    assert built.tuner == Reconstruct(steps=7, then=Distill(steps=3))
    assert recipe.build(recipe.describe(built)) == built
    with pytest.raises(UserError, match=r"tuner\.then has no setting 'step'"):
        recipe.build({"tuner": {"name": "reconstruct", "then": {"step": 3}}})


def test_running_it_twice_gives_the_same_bits(teacher, source):
    images = source.sample(8).images
    results = []
    for _ in range(2):
        student = student_of(teacher, source)
        Reconstruct(**QUICK).tune(teacher, student, source, seed=3)
        with torch.no_grad():
            results.append(student(images))
    assert torch.equal(*results)


@pytest.mark.parametrize("more", [{"mixes": 1}, {"mirrored": True}, {"softened": True}])
def test_blends_mirror_images_and_low_passed_copies_are_images_too(more, teacher, source, monkeypatch):
    cached = []

    class Watched(Cache):
        def __init__(self, values, *more):
            super().__init__(values, *more)
            cached.append(values)

    monkeypatch.setattr("mirageq.tuning.reconstruct.Cache", Watched)
    settings = {"steps": 2, "batch_size": 32}
    with pytest.raises(UserError, match="larger than the 16 images"):
        Reconstruct(**settings, images=16).tune(teacher, student_of(teacher, source), source)
    assert cached == []
    Reconstruct(**settings, images=16, **more).tune(teacher, student_of(teacher, source), source)
    originals, copies = cached[0].split(16)
    assert torch.equal(originals, source.sample(16).images)
    if "mirrored" in more:
        assert torch.equal(copies, originals.flip(-1))
    elif "softened" in more:
        rough, smooth = (part.diff(dim=3).square().mean((1, 2, 3)) for part in (originals, copies))
        assert (smooth < 0.9 * rough).all()
    else:
        shares = torch.linalg.lstsq(originals.flatten(1).T, copies.flatten(1).T).solution
        assert (shares.abs() > 1e-4).sum(0).max() == 2


@pytest.mark.parametrize("placement", ["paper", "deploy"])
def test_an_interrupted_run_ends_with_the_same_bits(placement, teacher, source, stumbling, tmp_path):
    whole, parts, again = (student_of(teacher, source, placement=placement) for _ in range(3))
    settings = Reconstruct(**QUICK, bias_lr=1e-2, layers_per_block=1)
    settings.tune(teacher, whole, source)
    with pytest.raises(KeyboardInterrupt):  # in the second block, with the first one settled
        settings.tune(teacher, parts, source, journal=stumbling(tmp_path, 2))
    assert (tmp_path / "checkpoints" / "reconstruct.pt").exists()
    settings.tune(teacher, again, source, journal=Journal(tmp_path))
    images = source.sample(8).images
    with torch.no_grad():
        assert torch.equal(whole(images), again(images))


class Recurrent(nn.Module):
    """Two layers that every block calls."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 5)
        self.first, self.second = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.eval()

    def forward(self, x):
        x = self.stem(x).relu()
        for _ in range(3):
            x = (x + self.second(self.first(x).relu())).relu()
        return self.fc(x.mean((2, 3)))


def test_layers_of_several_blocks_are_settled_once_and_resumed_to_the_same_bits(source, stumbling, tmp_path):
    torch.manual_seed(0)
    teacher = Teacher.wrap(Recurrent(), SHAPE)
    whole, parts, again = (student_of(teacher, source, placement="deploy") for _ in range(3))
    settings = Reconstruct(**QUICK, bias_lr=1e-2)
    settings.tune(teacher, whole, source)
    with pytest.raises(KeyboardInterrupt):  # in the third block, whose layers the second one has settled
        settings.tune(teacher, parts, source, journal=stumbling(tmp_path, 3))
    settings.tune(teacher, again, source, journal=Journal(tmp_path))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
        if name.startswith(("first", "second")):
            assert torch.equal(value, parts.state_dict()[name]), name


def test_a_network_without_blocks_is_taken_layer_by_layer_and_it_is_said(source):
    teacher = Teacher.wrap(TinyDense(), SHAPE)
    student = student_of(teacher, source)
    steps = {name: float(part.scale) for name, part in student.activation_quantizers.items()}
    journal = Journal()
    Reconstruct(**QUICK, layers_per_block=1, most_layers=2).tune(teacher, student, source, journal=journal)
    notes = [row["text"] for row in journal.history if row["stage"] == "note"]
    assert len(notes) == 1
    assert "Between 'layers.0' and 'layers.2' no block" in notes[0]
    assert all(float(part.scale) != steps[name] for name, part in student.activation_quantizers.items())
    for name, quantizer in student.weight_quantizers.items():
        weight = student.network.get_parameter(f"{name}.weight").detach()
        assert quantizer(weight)[0] == pytest.approx(weight, abs=1e-6)


def test_of_a_network_without_blocks_it_is_said_which_layers_are_left(sequence_first):
    teacher = Teacher.wrap(sequence_first, SHAPE)
    source, journal = Noise().synthesize(teacher, 64), Journal()
    student = student_of(teacher, source, placement="deploy")
    Reconstruct(**QUICK, layers_per_block=1, most_layers=2).tune(teacher, student, source, journal=journal)
    (note,) = [row["text"] for row in journal.history if row["stage"] == "note"]
    assert "Between 'a' and 'b' no block" in note
    assert "0 of its 3 layers are reconstructed one by one, and the others not." in note


def test_weights_that_are_buffers_are_reconstructed_too(source):
    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("first", torch.randn(8, 3, 3, 3))
            self.fc = torch.nn.Linear(8, 5)

        def forward(self, x):
            return self.fc(torch.relu(torch.nn.functional.conv2d(x, self.first)).mean((2, 3)))

    teacher = Teacher.wrap(Fixed(), SHAPE)
    student, images = student_of(teacher, source), source.sample(64).images
    before = (student(images) - teacher(images)).square().mean()
    Reconstruct(**QUICK, layers_per_block=1).tune(teacher, student, source)
    assert (student(images) - teacher(images)).square().mean() < before


class Twice(nn.Module):
    """A network whose middle, `body(x, conv)`, calls one convolution twice."""

    def __init__(self, body):
        super().__init__()
        self.stem, self.conv, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), body
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.body(torch.relu(self.stem(x)), self.conv).mean((2, 3)))


def test_a_block_in_which_nothing_is_left_to_learn_is_passed_over(source):
    in_a_row = Twice(lambda x, conv: conv(conv(x)))
    teacher, journal = Teacher.wrap(in_a_row, SHAPE), Journal()
    student = student_of(teacher, source)
    Reconstruct(**QUICK, layers_per_block=1).tune(teacher, student, source, journal=journal)
    errors = [(row["before"], row["after"]) for row in journal.history if row["stage"] == "reconstruct"]
    assert errors[2][0] == errors[2][1]
    assert errors[1][0] > errors[1][1]


@pytest.mark.parametrize("most", [16, 1])
def test_so_many_caches_live_at_a_time(source, most, monkeypatch):
    alive, most_alive = weakref.WeakSet(), []

    class Watched(Cache):
        def __init__(self, *settings):
            super().__init__(*settings)
            alive.add(self)
            most_alive.append(len(alive))

    monkeypatch.setattr("mirageq.tuning.cache.Cache", Watched)
    monkeypatch.setattr("mirageq.tuning.reconstruct.Cache", Watched)
    teacher = Teacher.wrap(TinyDense(), SHAPE)
    settings = {**QUICK, "steps": 2}
    Reconstruct(**settings, layers_per_block=1, most_layers=most).tune(teacher, student_of(teacher, source), source)
    assert max(most_alive) <= (LIVING_CACHES if most > 1 else LIVING_CACHES * 3 // 2)


@pytest.mark.parametrize("bias_lr", [0.0, 1e-3])
def test_no_gradient_is_left_behind(teacher, source, bias_lr):
    student = student_of(teacher, source)
    Reconstruct(**QUICK, bias_lr=bias_lr).tune(teacher, student, source)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in student.parameters())


def test_roundings_begin_to_decide_after_a_fifth_and_ever_more_sharply(teacher, source, monkeypatch):
    asked, indecision = [], SoftWeight.indecision

    def noted(self, sharpness):
        asked.append(sharpness)
        return indecision(self, sharpness)

    monkeypatch.setattr(SoftWeight, "indecision", noted)
    Reconstruct(**{**QUICK, "steps": 50}).tune(teacher, student_of(teacher, source), source)
    assert len(asked) == 40 * 4  # layers
    steps = list(dict.fromkeys(asked))
    assert len(steps) == 40
    assert steps == sorted(steps, reverse=True)
    assert (steps[0], steps[-1]) == (20.0, pytest.approx(2.0, abs=0.1))


def test_activations_beyond_the_limit_lie_in_a_file_and_change_nothing(teacher, source, monkeypatch):
    images = source.sample(8).images
    results, files = [], []

    class Watched(Spilled):
        def __init__(self, shape, folder):
            super().__init__(shape, folder)
            files.append(folder)

    monkeypatch.setattr("mirageq.tuning.cache.Spilled", Watched)
    for limit in (2**30, 1000):
        student = student_of(teacher, source)
        Reconstruct(**QUICK, cache_bytes=limit).tune(teacher, student, source)
        assert bool(files) == (limit == 1000)
        with torch.no_grad():
            results.append(student(images))
    assert torch.equal(*results)


def test_a_soft_weight_begins_at_the_weight_and_ends_on_a_code_beside_it():
    weight = torch.nn.Parameter(torch.randn(6, 4, 3, 3))
    quantizer = WeightQuantizer("layer", weight.detach(), 3, True, "mse")
    soft = SoftWeight(quantizer, weight, False)
    scale, _ = quantizer.affine(weight)
    low, high = (bound * scale for bound in grid(3, True))
    assert soft(weight)[0].detach() == pytest.approx(weight.detach().clamp(low, high), abs=2e-3)
    before = weight.detach().clone()
    soft.settle(quantizer, weight)
    inside = (before > low) & (before < high)
    assert ((weight - before).abs() / scale)[inside].max() <= 1 + 1e-5
    assert soft.indecision(20.0) > 0
    with torch.no_grad():
        soft.up.fill_(50)
        soft(weight)
    assert soft.indecision(20.0) == 0


@pytest.mark.parametrize("piece", [40, 2**17])
def test_a_soft_weight_has_the_gradients_of_its_formula(piece, monkeypatch):
    monkeypatch.setattr(soft, "PIECE", piece)
    weight, pull = torch.randn(6, 4, 3, 3) * 0.1, torch.randn(6, 4, 3, 3)
    part = SoftWeight(WeightQuantizer("layer", weight, 3, True, "percentile", 90.0), weight, learn_scale=True)
    with torch.no_grad():
        part.up.mul_(4)  # some shares at their ends, some codes beyond the grid's
    result, indecision = part(weight)[0], part.indecision(3.5)
    ((result * pull).sum() + 0.1 * indecision).backward()

    up, factor = part.up.detach().clone().requires_grad_(), torch.ones_like(part.factor).requires_grad_()
    share = (torch.sigmoid(up) * 1.2 - 0.1).clamp(0, 1)
    codes = torch.minimum(torch.maximum(part.base + share, part.low), part.high)
    expected, undecided = codes * part.start * factor, (1 - (2 * share - 1).abs() ** 3.5).sum()
    ((expected * pull).sum() + 0.1 * undecided).backward()
    assert ((share == 0) | (share == 1)).any()
    assert ((codes == part.low) | (codes == part.high)).any()
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-7)  # a short piece may be computed by scalars
    assert indecision.item() == pytest.approx(undecided.item(), rel=1e-5)
    assert torch.allclose(part.up.grad, up.grad, rtol=1e-4, atol=1e-7)
    assert torch.allclose(part.factor.grad, factor.grad, rtol=1e-4)


def test_dropping_leaves_numbers_out_at_its_rate():
    quantizer = ActivationQuantizer("x", 2, False)
    quantizer.set_range(torch.tensor(0.0), torch.tensor(1.0))
    x = torch.rand(4, 50, 10, 5).contiguous(memory_format=torch.channels_last)
    dropping = DroppingActivation(quantizer, Dropping(0.3, torch.Generator().manual_seed(0)))
    dropped = dropping(x) == x
    assert dropped.float().mean() == pytest.approx(0.3, abs=0.02)
    assert all(share == pytest.approx(0.3, abs=0.15) for share in dropped.float().mean((0, 2, 3)))
    assert (dropped != (dropping(x) == x)).float().mean() == pytest.approx(2 * 0.3 * 0.7, abs=0.02)  # anew at each call
    assert dropping(x).stride() == x.stride()
    assert torch.equal(DroppingActivation(quantizer, Dropping(0.0, torch.Generator()))(x), quantizer(x))


@pytest.mark.parametrize("layouts", [(torch.contiguous_format,) * 2, (torch.channels_last, torch.contiguous_format)])
def test_what_a_block_reads_is_mixed_from_both_networks_number_by_number(layouts):
    quantized, full = (torch.randn(8, 6, 10, 9).contiguous(memory_format=layout) for layout in layouts)
    mixed = Dropping(0.3, torch.Generator().manual_seed(0))(quantized, full)
    stays = mixed == full
    assert torch.equal(mixed, torch.where(stays, full, quantized))
    assert stays.float().mean() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(Dropping(0.0, torch.Generator())(quantized, full), quantized)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_dropping_in_pieces_gives_the_numbers_and_gradients_of_the_whole(drop, layout, monkeypatch):
    monkeypatch.setattr(soft, "PIECE", 100)
    quantizer = ActivationQuantizer("x", 3, False)
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    x, pull = (torch.randn(4, 5, 6, 3).contiguous(memory_format=layout) for _ in range(2))
    x.requires_grad_()
    part = DroppingActivation(quantizer, Dropping(drop, torch.Generator().manual_seed(0)))
    result = part(x)
    (result * pull).sum().backward()
    dropped = (result == x).detach()

    twin, scale = x.detach().clone().requires_grad_(), part.start.clone().requires_grad_()
    quantized = learned_fake_quantize(twin, scale, quantizer.zero_point, *grid(3, False))
    whole = torch.where(dropped, twin, quantized)
    (whole * pull).sum().backward()
    assert torch.equal(result, whole)
    assert torch.allclose(x.grad, twin.grad)
    assert torch.allclose(part.factor.grad, scale.grad * part.start, rtol=1e-5)


def test_zero_steps_change_nothing(teacher, source):
    student = student_of(teacher, source)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    Reconstruct(steps=0).tune(teacher, student, source)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_what_cannot_work_is_said(teacher, source):
    with pytest.raises(UserError, match="Set scheme.weight_range to mse or percentile"):
        Reconstruct(**QUICK).tune(teacher, student_of(teacher, source, weight_range="minmax"), source)
    with pytest.raises(UserError, match="batch size 100 is larger than the 64 images"):
        Reconstruct(steps=1, batch_size=100).tune(teacher, student_of(teacher, source), source)
    for name in ("batch_size", "images", "lr", "layers_per_block", "most_layers", "cache_bytes"):
        with pytest.raises(UserError, match=f"{name} must be positive; got 0"):
            Reconstruct(**{name: 0})
    with pytest.raises(UserError, match="drop is a probability"):
        Reconstruct(drop=1.0)
    with pytest.raises(UserError, match="What follows a reconstruction is another tuner; give this one more steps"):
        Reconstruct(then=Reconstruct())
    with pytest.raises(UserError, match="What follows a reconstruction is another tuner; give this one more steps"):
        Reconstruct(then=Correct(then=Reconstruct()))
    for name in ("steps", "mixes", "scale_lr", "weight_scale_lr", "bias_lr", "rounding_weight"):
        with pytest.raises(UserError, match=f"{name} must not be negative; got -1"):
            Reconstruct(**{name: -1})
    broken = student_of(teacher, source)
    with torch.no_grad():
        broken.network.get_parameter("conv3.weight").fill_(torch.nan)
    with pytest.raises(UserError, match=r"The loss of block .* became nan.*Lower tuner\.lr"):
        Reconstruct(**QUICK).tune(teacher, broken, source)


def test_steps_of_all_channels_learn_at_one_rate_relative_to_their_size():
    torch.manual_seed(0)
    weight = torch.randn(3, 8) * torch.tensor([[1.0], [1e-2], [1e2]])
    soft = SoftWeight(WeightQuantizer("layer", weight, 4, True, "mse"), weight, learn_scale=True)
    before = soft.scale.detach().clone()
    optimizer = torch.optim.Adam([soft.factor], lr=0.1)
    (soft(weight)[0] / weight.abs().amax(1, keepdim=True)).sum().backward()
    optimizer.step()
    assert (soft.scale / before - 1).abs().flatten().tolist() == pytest.approx([0.1] * 3, rel=1e-2)


def test_a_layer_that_is_read_twice_in_a_block_has_one_rounding():
    residual = Twice(lambda x, conv: torch.relu(x + conv(torch.relu(conv(x)))))
    teacher = Teacher.wrap(residual, SHAPE)
    source = Noise().synthesize(teacher, 64)
    student, images = student_of(teacher, source), source.sample(64).images
    before = (student(images) - teacher(images)).square().mean()
    Reconstruct(**QUICK).tune(teacher, student, source)
    assert (student(images) - teacher(images)).square().mean() < before
    quantizer = student.weight_quantizers["conv"]
    codes = student.network.get_parameter("conv.weight") / quantizer.scale
    assert codes.round().detach() == pytest.approx(codes.detach(), abs=1e-3)


@pytest.mark.parametrize("most", [16, 1])
def test_tokens_in_front_of_images_are_no_trouble(most, sequence_first):
    teacher = Teacher.wrap(sequence_first, SHAPE)
    source = Noise().synthesize(teacher, 40)  # more than a chunk
    student = student_of(teacher, source, placement="deploy")
    Reconstruct(**{**QUICK, "images": 40}, layers_per_block=1, most_layers=most).tune(teacher, student, source)
    assert student(source.sample(4).images).isfinite().all()
