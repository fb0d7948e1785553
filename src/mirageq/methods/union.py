"""Union: the images of two or three methods in one set, because each has gaps that the others do not share.

Idea: IntraQ's images hold something of every class and meet the remembered statistics loosely; ZeroQ's meet them
closely and show nothing; GENIE's are smooth, as photographs are. A student of few bits that is tuned on all of them
follows its teacher where any one alone would not have led it.
Reference: none; an ingredient of this package, measured in benchmarks/RESULTS.md.
Differences from official code: there is none.
Cost: that of each, for its part of the images.
Choose it: at 4 bits and below, above all for 2-bit weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mirageq.errors import UserError
from mirageq.images import Batch, ImageSource, SyntheticSet
from mirageq.journal import Journal
from mirageq.methods.contract import Method, parts_of
from mirageq.methods.intraq import IntraQ
from mirageq.methods.zeroq import ZeroQ
from mirageq.seeding import stream
from mirageq.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class Union:
    """Which methods; each makes as many of the images.

    Attributes:
        first: a method, `[method.first]` in a recipe.
        second: another, `[method.second]`.
        third: one more, `[method.third]`, or none.
    """

    first: Method = field(default_factory=IntraQ)
    second: Method = field(default_factory=ZeroQ)
    third: Method | None = None

    def synthesize(self, teacher: Teacher, count: int, *, seed: int = 0, journal: Journal | None = None) -> ImageSource:
        """`count` images of all, shuffled; those of a part are what its method makes alone."""
        methods = {"first": self.first, "second": self.second} | ({"third": self.third} if self.third else {})
        if count < len(methods):
            raise UserError(
                f"A union of {len(methods)} methods has as many images at least; got {count}. Raise images."
            )
        _require_one_shape({teacher.shape_at(size) for method in methods.values() for size in _sizes(method)})
        journal = journal or Journal()
        parts = []
        for index, (name, method) in enumerate(methods.items()):
            wanted = (count - index - 1) // len(methods) + 1  # one more of the first ones if it does not come out even
            part = method.synthesize(teacher, wanted, seed=seed, journal=journal.within(name)).sample(wanted)
            parts.append(Batch(part.images.half(), part.labels))
        _require_one_shape({tuple(part.images.shape[1:]) for part in parts})
        order = torch.randperm(count, generator=stream(seed, "union"))
        images, labels = (torch.cat(each)[order] for each in zip(*parts, strict=True))
        return SyntheticSet(images, labels, seed=seed)


def _sizes(method: Method) -> list[int | None]:
    """The `image_size` of a method, or of those that it is made of."""
    if hasattr(method, "image_size"):
        return [method.image_size]
    return [size for part in parts_of(method) for size in _sizes(part)]


def _require_one_shape(shapes: set[tuple[int, ...]]) -> None:
    if len(shapes) > 1:
        made = " and ".join(map(str, sorted(shapes)))
        raise UserError(f"The images of a union have one shape; its methods make {made}.")
