"""Stored images: a finished set from a file, so that one synthesis serves many bit-widths.

Idea: read the images another run painted. Comparing quantizers, bits or tuners on the very same images costs their
synthesis once.
Reference: none; it is a convenience of this package.
Differences from official code: there is none.
Cost: reading a file.
Choose it: with `mirageq quantize --images RUN`. It synthesises nothing, so it is not in the list of methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mirageq.errors import UserError
from mirageq.images import ImageSource, SyntheticSet
from mirageq.journal import Journal
from mirageq.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Images from a file.

    Attributes:
        path: a safetensors file with `images` (N, C, H, W) and `labels` (N,), as every run writes one.
    """

    path: str

    def synthesize(self, teacher: Teacher, count: int, *, seed: int = 0, journal: Journal | None = None) -> ImageSource:
        """The first `count` images of the file."""
        stored = SyntheticSet.load(Path(self.path), seed=seed)
        if not teacher.takes(shape := tuple(stored.images.shape[1:])):
            raise UserError(
                f"{self.path} holds images of shape {shape}, and the network takes {teacher.image_shape}. "
                "Give images made for this network."
            )
        if int(stored.labels.max()) >= teacher.classes:
            raise UserError(
                f"{self.path} holds images of class {int(stored.labels.max())}, and the network has {teacher.classes} "
                "classes. Give images made for this network."
            )
        if len(stored) < count:
            raise UserError(
                f"{self.path} holds {len(stored)} images, and {count} were asked for. Lower images, or make more."
            )
        return SyntheticSet(stored.images[:count], stored.labels[:count], seed=seed)
