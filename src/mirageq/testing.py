"""The conformance suite: behaviours every synthesis method must have, in or out of this package.

In your own tests:

    @pytest.mark.parametrize("check", mirageq.testing.METHOD_CHECKS, ids=lambda check: check.__name__)
    def test_my_method(check, tmp_path):
        check(MyMethod(iterations=6, batch_size=4), tmp_path)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirageq.errors import UserError
from mirageq.hashing import hash_tensors
from mirageq.images import SyntheticSet
from mirageq.journal import HISTORY, Journal, read_history
from mirageq.methods import Method
from mirageq.reference import card
from mirageq.teacher import Teacher

COUNT, CLASSES, SHAPE = 10, 5, (3, 16, 16)
CARD_HEADINGS = ("Idea:", "Reference:", "Differences from", "Cost:", "Choose it:")


class TinyResNet(nn.Module):
    """A residual network with 3 BatchNorm layers that a CPU evaluates in a millisecond; random but fixed weights."""

    def __init__(self, norms: bool = True) -> None:
        super().__init__()
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d if norms else nn.Identity  # type: ignore[assignment]
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), norm(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), norm(12)
        self.linear = nn.Linear(12, CLASSES)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in self.parameters():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / max(tensor[0].numel(), 1) ** 0.5)
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.3, generator=generator)  # type: ignore[union-attr]
                    module.running_var.uniform_(0.5, 1.5, generator=generator)  # type: ignore[union-attr]
                    module.weight.uniform_(0.5, 1.5, generator=generator)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(images)))
        x = torch.relu(x + self.bn2(self.conv2(x)))
        x = torch.relu(self.bn3(self.conv3(x)))
        return self.linear(x.mean((2, 3)))


class TinyDense(nn.Module):
    """Three convolutions whose outputs are all read at the end: no cut between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(4 * (n + 1), 4, 3, padding=1) for n in range(3))
        self.last = nn.Linear(16, 5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        found = [F.relu(self.first(x))]
        for layer in self.layers:
            found.append(F.relu(layer(torch.cat(found, 1))))
        logits: Tensor = self.last(torch.cat(found, 1).mean((2, 3)))
        return logits


def quick(kind: type) -> Method:
    """A method with settings small enough for a test."""
    small = {"iterations": 6, "batch_size": 4, "warmup": 6, "width": 8, "latent": 4, "centre_iterations": 3}
    small |= {"centroid_every": 1, "centre_batch": 4}
    fields: dict[str, object] = {field.name: field.default_factory for field in dataclasses.fields(kind)}
    parts = {
        name: quick(inner) for name, inner in fields.items() if isinstance(inner, type) and issubclass(inner, Method)
    }
    return kind(**parts, **{name: value for name, value in small.items() if name in fields})


def is_a_frozen_settings_dataclass_with_a_card(method: Method, folder: Path) -> None:
    kind = type(method)
    assert dataclasses.is_dataclass(kind), "a method is a dataclass of its settings"
    parameters = kind.__dataclass_params__  # type: ignore[attr-defined]
    assert parameters.frozen, "its settings must not change: use @dataclass(frozen=True, kw_only=True)"
    assert all(field.kw_only for field in dataclasses.fields(kind)), "settings are given by name"
    text = card(kind)
    missing = [heading for heading in CARD_HEADINGS if heading not in text]
    assert not missing, f"the module's docstring is its card and lacks {missing}"


def makes_the_images_it_was_asked_for(method: Method, folder: Path) -> None:
    batch = method.synthesize(_teacher(), COUNT).sample(COUNT)
    assert batch.images.shape == (COUNT, *SHAPE)
    assert batch.images.dtype == torch.float32
    assert batch.images.isfinite().all()
    assert batch.labels.shape == (COUNT,)
    assert batch.labels.dtype == torch.int64
    assert ((batch.labels >= 0) & (batch.labels < CLASSES)).all()


def repeats_itself_for_a_seed_and_differs_between_seeds(method: Method, folder: Path) -> None:
    first, again, other = (_digest(method, seed) for seed in (0, 0, 1))
    assert first == again, "randomness must come from the seed alone"
    assert first != other, "the seed must matter"


def leaves_the_world_as_it_was(method: Method, folder: Path) -> None:
    teacher = _teacher()
    before, random_before = hash_tensors(dict(teacher.network.state_dict())), torch.get_rng_state()
    method.synthesize(teacher, COUNT)
    assert hash_tensors(dict(teacher.network.state_dict())) == before, "the teacher was changed"
    assert torch.equal(torch.get_rng_state(), random_before), "global random state was used"
    assert all(parameter.grad is None for parameter in teacher.network.parameters())


def continues_an_interrupted_run_to_the_same_bits(method: Method, folder: Path) -> None:
    whole = _digest(method, 0)
    for survived in (2, 8):
        attempt = folder / str(survived)
        attempt.mkdir()
        with contextlib.suppress(KeyboardInterrupt):
            method.synthesize(_teacher(), COUNT, journal=_StumblingJournal(attempt, [survived]))
        rows = [row for file in attempt.rglob(HISTORY) for row in read_history(file)]
        assert len(rows) <= survived + 1, "steps went on after an interruption: parts take journal.within(NAME)"
        source = method.synthesize(_teacher(), COUNT, journal=Journal(attempt, checkpoint_seconds=0))
        assert hash_tensors(source.sample(COUNT)._asdict()) == whole, f"interrupted after {survived} steps"


def writes_what_it_gives(method: Method, folder: Path) -> None:
    source = method.synthesize(_teacher(), COUNT, journal=Journal(folder))
    if (file := folder / "synthetic.safetensors").exists():  # else the run will write a sample
        assert torch.equal(SyntheticSet.load(file).sample(COUNT).images, source.sample(COUNT).images)


def gives_endless_batches_that_resume(method: Method, folder: Path) -> None:
    student = TinyResNet()
    source = method.synthesize(_teacher(), COUNT)
    batches = list(islice(source.batches(4, student), 5))
    assert all(batch.images.shape == (4, *SHAPE) and batch.labels.shape == (4,) for batch in batches)
    source = method.synthesize(_teacher(), COUNT)
    list(islice(source.batches(4, student), 3))
    state = source.state_dict()
    resumed = method.synthesize(_teacher(), COUNT)
    resumed.load_state_dict(state)
    for expected, got in zip(batches[3:], resumed.batches(4, student), strict=False):
        assert torch.equal(expected.images, got.images)


def tells_when_a_network_has_no_batch_norm(method: Method, folder: Path) -> None:
    teacher = Teacher.wrap(TinyResNet(norms=False), SHAPE)
    try:
        method.synthesize(teacher, COUNT)
    except UserError as error:
        message = str(error)
    else:
        return  # a method may do without
    assert "BatchNorm" in message


METHOD_CHECKS = (
    is_a_frozen_settings_dataclass_with_a_card,
    makes_the_images_it_was_asked_for,
    repeats_itself_for_a_seed_and_differs_between_seeds,
    leaves_the_world_as_it_was,
    continues_an_interrupted_run_to_the_same_bits,
    writes_what_it_gives,
    gives_endless_batches_that_resume,
    tells_when_a_network_has_no_batch_norm,
)


class _StumblingJournal(Journal):
    """A journal under which the computation, its parts' steps included, is interrupted after so many steps."""

    def __init__(self, folder: Path | None, steps_left: list[int]) -> None:
        super().__init__(folder, checkpoint_seconds=0)
        self._steps_left = steps_left

    def _alike(self, folder: Path | None) -> Journal:
        return _StumblingJournal(folder, self._steps_left)

    def _append(self, row: dict) -> None:
        super()._append(row)
        self._steps_left[0] -= 1
        if self._steps_left[0] < 0:
            raise KeyboardInterrupt


@functools.cache
def _teacher() -> Teacher:
    return Teacher.wrap(TinyResNet(), SHAPE)


def _digest(method: Method, seed: int) -> str:
    return hash_tensors(method.synthesize(_teacher(), COUNT, seed=seed).sample(COUNT)._asdict())
