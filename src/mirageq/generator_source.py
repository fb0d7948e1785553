"""A source of images whose generator keeps training while the student learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mirageq.augment import random_resized_crop
from mirageq.errors import UserError
from mirageq.generator import Generator, GeneratorTraining
from mirageq.images import Batch
from mirageq.journal import Journal
from mirageq.losses import bn_alignment
from mirageq.observe import Observation
from mirageq.precision import autocast, note_precision
from mirageq.seeding import stream
from mirageq.teacher import Teacher

SAMPLE_BATCH = 64

Draw = Callable[[Tensor, str], Tensor]
"""`draw(labels, purpose)`: images (N, C, H, W) of these classes, without gradient; `purpose` names the randomness."""


def even_batches(labels: Tensor) -> tuple[Tensor, ...]:
    """Labels (N,) in batches of nearly equal size: a generator's norms see what an image is beside."""
    return labels.tensor_split(-(-len(labels) // SAMPLE_BATCH))


class Guide(Protocol):
    """What a method adds to the common frame: further loss terms, and whatever it remembers for them."""

    def terms(self, seen: Observation, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Further named, already weighted terms; randomness comes from the generator alone."""
        ...

    def after_update(self, step: int, draw: Draw) -> None:
        """Called after each generator update, `step` of them being done."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class GeneratorSource:
    """An `ImageSource` whose generator takes one training step before each batch it hands to the student.

    Every update has randomness of its own (from the seed and its number), so state is tensors and one count.
    """

    def __init__(self, teacher: Teacher, settings: GeneratorTraining, seed: int, guide: Guide | None = None) -> None:
        self.teacher, self.settings, self.seed, self.guide = teacher, settings, seed, guide
        drawn = Generator.drawn(teacher.classes, teacher.image_shape, settings, stream(seed, "generator"))
        self.generator = drawn.to(teacher.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.Adam(self.generator.parameters(), lr=settings.lr, betas=(0.5, 0.999))
        self.step = 0

    def warm_up(self, journal: Journal) -> None:
        """Train the generator alone, resuming from the journal; a finished warm-up is read, not repeated."""
        note_precision(self.settings.precision, self.teacher.device, journal)
        checkpoint = journal.checkpoint("generator")
        if state := checkpoint.load():
            self.load_state_dict(state)
            if self.step >= self.settings.warmup:
                return
        with journal.stage("generator", self.settings.warmup, start=self.step) as advance:
            while self.step < self.settings.warmup:
                _, terms = self._update(self.settings.batch_size)
                advance(self.step - 1, **terms)
                checkpoint.offer(self.state_dict)
        checkpoint.save(self.state_dict())

    def sample(self, count: int) -> Batch:
        """`count` images of the generator as it is now; classes take turns in a random order."""
        randomness = stream(self.seed, "generator", "sample")
        labels = torch.randperm(self.teacher.classes, generator=randomness)[torch.arange(count) % self.teacher.classes]
        labels = labels[torch.randperm(count, generator=randomness)]
        images = [self._draw(batch, f"sample {index}") for index, batch in enumerate(even_batches(labels))]
        return Batch(torch.cat(images).cpu(), labels)

    def batches(self, batch_size: int, student: Callable[[Tensor], Tensor] | None = None) -> Iterator[Batch]:
        while True:
            yield self._update(batch_size)[0]

    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": self.generator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "guide": self.guide.state_dict() if self.guide else {},
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            UserError: it belongs to a generator of other classes or shape.
        """
        try:
            self.generator.load_state_dict(state["generator"])
        except RuntimeError as error:
            raise UserError(
                f"The saved generator does not fit this network of {self.teacher.classes} classes and images of shape "
                f"{self.teacher.image_shape}. Use another output folder, or the network and settings it began with."
            ) from error
        self.optimizer.load_state_dict(state["optimizer"])
        if self.guide:
            self.guide.load_state_dict(state["guide"])
        self.step = state["step"]

    def _update(self, batch_size: int) -> tuple[Batch, dict[str, float]]:
        """One training step of the generator: the images made for it, and its loss terms."""
        settings, generator = self.settings, stream(self.seed, "generator", self.step)
        labels, noise = self._inputs(batch_size, generator)
        with autocast(settings.precision, labels.device):
            images = self.generator(noise, labels)
            viewed = images
            if torch.rand((), generator=generator) < settings.crop_probability:
                viewed = random_resized_crop(images, generator, scale=(settings.crop_scale, 1.0))
            terms = self._terms(self.teacher.observe(viewed), labels, generator)
        total = torch.stack([term.float() for term in terms.values()]).sum()
        if not total.isfinite():
            raise UserError(
                f"The generator's loss became {float(total.detach())} at update {self.step}. Lower method.lr."
            )
        passed = sum(self.step >= milestone for milestone in settings.milestones)
        self.optimizer.param_groups[0]["lr"] = settings.lr * settings.lr_factor**passed
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        self.step += 1
        if self.guide:
            self.guide.after_update(self.step, self._draw)
        return Batch(images.detach(), labels), {name: float(term.detach()) for name, term in terms.items()}

    def _terms(self, seen: Observation, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        settings, norms = self.settings, self.teacher.batch_norms
        terms = {
            "class": settings.class_weight * F.cross_entropy(seen.logits.float(), labels),
            "bn": settings.bn_weight * bn_alignment(seen, norms),
        }
        if settings.last_bn_weight:
            terms["last bn"] = settings.last_bn_weight * bn_alignment(seen, norms[-1:])
        return terms | (self.guide.terms(seen, labels, generator) if self.guide else {})

    def _inputs(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        labels = torch.randint(self.teacher.classes, (count,), generator=generator)
        noise = torch.randn(count, self.settings.latent, generator=generator)
        return labels.to(self.teacher.device), noise.to(self.teacher.device)

    @torch.no_grad()
    def _draw(self, labels: Tensor, purpose: str) -> Tensor:
        noise = torch.randn(len(labels), self.settings.latent, generator=stream(self.seed, "generator", purpose))
        return self.generator(noise.to(self.teacher.device), labels.to(self.teacher.device))
