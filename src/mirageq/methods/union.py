"""Union: the images of two methods in one set, because each has gaps that the other does not share.

Idea: IntraQ's images hold something of every class and meet the remembered statistics loosely; ZeroQ's meet them
closely and show nothing. A student of few bits that is tuned on both follows its teacher where either alone would not
have led it.
Reference: none; an ingredient of this package, measured in benchmarks/RESULTS.md.
Differences from official code: there is none.
Cost: that of both, each for its part of the images.
Choose it: at 4 bits and below, above all for 2-bit weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mirageq.errors import UserError
from mirageq.images import ImageSource, SyntheticSet
from mirageq.journal import Journal
from mirageq.methods.contract import Method
from mirageq.methods.intraq import IntraQ
from mirageq.methods.zeroq import ZeroQ
from mirageq.seeding import stream
from mirageq.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class Union:
    """Which two.

    Attributes:
        first: a method, `[method.first]` in a recipe.
        second: the other, `[method.second]`.
        share: the first one's part of the images, between 0 and 1.
    """

    first: Method = field(default_factory=IntraQ)
    second: Method = field(default_factory=ZeroQ)
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(f"share is the first method's part of the images, between 0 and 1; got {self.share}.")

    def synthesize(self, teacher: Teacher, count: int, *, seed: int = 0, journal: Journal | None = None) -> ImageSource:
        """`count` images of both, at least one of each, shuffled; those of a part are what it makes alone."""
        if count < 2:
            raise UserError("A union of two methods has at least 2 images; got 1. Raise images.")
        journal = journal or Journal()
        share = min(max(round(count * self.share), 1), count - 1)
        parts = [
            method.synthesize(teacher, wanted, seed=seed, journal=journal.within(name)).sample(wanted)
            for name, method, wanted in (("first", self.first, share), ("second", self.second, count - share))
        ]
        shapes = [tuple(part.images.shape[1:]) for part in parts]
        if shapes[0] != shapes[1]:
            raise UserError(f"The images of a union have one shape; its methods make {shapes[0]} and {shapes[1]}.")
        order = torch.randperm(count, generator=stream(seed, "union"))
        images, labels = (torch.cat(both)[order] for both in zip(*parts, strict=True))
        return SyntheticSet(images.half(), labels, seed=seed)
