"""A finished set of images, painted part by part, resumable to the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mirageq.errors import UserError
from mirageq.images import Batch, GrowingSet, SyntheticSet
from mirageq.journal import Journal
from mirageq.leaves import dead_leaves
from mirageq.observe import Glance, Observation, Observer, compiled
from mirageq.paint import PAINTING, Descent, Loss, Parameters, descend, paint
from mirageq.precision import note_precision
from mirageq.seeding import stream
from mirageq.teacher import Teacher

Observe = Callable[[Tensor], Observation | Glance]


@dataclass(frozen=True)
class Part:
    """Images `start` to `stop` of a set, painted together as batch number `index`."""

    index: int
    start: int
    stop: int
    seed: int

    def stream(self, purpose: str) -> torch.Generator:
        """This part's own randomness for a purpose, whatever happened to the parts before it."""
        return stream(self.seed, "paint", self.index, purpose)

    def draw_labels(self, classes: int) -> Tensor:
        """(stop - start,) classes, uniform and independent."""
        return torch.randint(classes, (self.stop - self.start,), generator=self.stream("labels"))


class Canvas:
    """A set being painted part by part; finished parts are kept, so an interrupted run goes on where it was.

    Attributes:
        observe: what painting looks at the images with: the teacher's observer, compiled if the settings say so.
        image_shape: (C, H, W) of the images.
    """

    def __init__(self, teacher: Teacher, count: int, settings: Descent, seed: int, journal: Journal) -> None:
        if count < 1:
            raise UserError(f"The number of images to synthesise must be positive; got {count}.")
        self._range = teacher.pixel_range() if settings.clamp else None
        note_precision(settings.precision, teacher.device, journal)
        self.teacher, self.settings, self.seed, self.journal = teacher, settings, seed, journal
        self._observer = Observer(teacher.network, swing=True) if settings.swing else teacher.observe
        self.observe: Observe = compiled(self._observer) if settings.compile else self._observer
        path = journal.folder / "synthetic.safetensors" if journal.folder else None
        self.image_shape = teacher.shape_at(settings.image_size)
        self._set = GrowingSet(count, self.image_shape, path)
        self._count = count

    def parts(self) -> Iterator[Part]:
        for index, start in enumerate(range(0, self._count, self.settings.batch_size)):
            yield Part(index, start, min(start + self.settings.batch_size, self._count), self.seed)

    def paint(
        self, part: Part, loss: Loss, labels: Tensor | None = None, *, develop: Callable[[Tensor], Tensor] | None = None
    ) -> Batch:
        """Paint a part from noise or leaves (or read it, if it is already finished).

        Args:
            develop: what to make of the finished images before they are stored.

        Returns the images as they are stored, and their labels: the given ones, else those the teacher sees.
        """
        if self._set.finished < part.stop:
            stream, name = self._randomness(part), self._name(part)
            images = paint(
                self._start(part), loss, self.settings, stream, pixel_range=self._range, journal=self.journal, name=name
            )
            self._write(part, develop(images) if develop else images, labels)
        return self._read(part)

    def draw(self, part: Part, parameters: Sequence[Parameters], render: Callable[[], Tensor], loss: Loss) -> Batch:
        """As `paint`, but descend on `parameters`, from which `render()` computes the part's images (N, C, H, W).

        They have mean 0 and variance 1 in each channel; what lies beyond the pixels' range, if they have one, is cut
        off before the teacher sees it.
        """

        def shown() -> Tensor:
            return self._within_range(render())

        if self._set.finished < part.stop:
            name = self._name(part)
            descend(parameters, shown, loss, self.settings, self._randomness(part), journal=self.journal, name=name)
            with torch.no_grad():
                self._write(part, shown(), None)
        return self._read(part)

    def _start(self, part: Part) -> Tensor:
        count, device = part.stop - part.start, self.teacher.device
        if self.settings.start == "leaves":
            return self._within_range(dead_leaves(count, self.image_shape, part.stream("leaves")).to(device))
        return torch.randn((count, *self.image_shape), generator=part.stream("noise")).to(device)

    def _within_range(self, images: Tensor) -> Tensor:
        """Of mean 0 and variance 1, as pixels, if these have a range: two standard deviations reach its ends."""
        if not self._range:
            return images
        low, high = self._range
        return ((low + high) / 2 + images * (high - low) / 4).clamp(low, high)

    def _randomness(self, part: Part) -> torch.Generator:
        """Of the loss and of the swing alike, so that one state brings both back."""
        generator = part.stream("loss")
        self._observer.swing_by(generator)
        return generator

    def _name(self, part: Part) -> str:
        return f"images {part.start}-{part.stop - 1}"

    def _write(self, part: Part, images: Tensor, labels: Tensor | None) -> None:
        self._set.write(part.start, images, self.teacher.pseudo_labels(images) if labels is None else labels)
        self.journal.checkpoint(PAINTING).clear()

    def _read(self, part: Part) -> Batch:
        images, labels = self._set.read(part.start, part.stop)
        return Batch(images.to(self.teacher.device), labels.to(self.teacher.device))

    def finish(self) -> SyntheticSet:
        return self._set.finish(self.seed)
