"""SynQ's filter: another method's images without the high frequencies that descent leaves in them.

Idea: images painted by descent carry noise that real ones do not: their spectrum hardly falls towards high frequencies.
Multiply each image's Fourier transform by a Gaussian that does.
Reference: Kim et al., "SynQ: Accurate Zero-shot Quantization by Synthesis-aware Fine-tuning", ICLR 2025.
Differences from the official method: only the filter is here. Its use of hard labels for easy images alone is
`ce_confidence` of the distillation tuner; the alignment of class activation maps is not built. The width of the filter
is ours: relative to the image's size, so that one setting serves all resolutions; and no channel leaves the range that
it had.
Cost: the other method's.
Choose it: for painted images at 3 bits and below; what it brings has not been measured here yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mirageq.augment import low_passed
from mirageq.errors import UserError
from mirageq.images import ImageSource, SyntheticSet
from mirageq.journal import Journal
from mirageq.methods.contract import Method
from mirageq.methods.intraq import IntraQ
from mirageq.teacher import Teacher

CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class SynQ:
    """Settings of SynQ's filter.

    Attributes:
        candidates: the method that makes the images, `[method.candidates]` in a recipe.
        cutoff: standard deviation of the Gaussian over frequencies, in parts of the highest one (half the image's
            size); infinity keeps every frequency.
    """

    candidates: Method = field(default_factory=IntraQ)
    cutoff: float = 0.5

    def __post_init__(self) -> None:
        if not self.cutoff > 0:
            raise UserError(f"cutoff is a positive part of the highest frequency; got {self.cutoff}.")

    def synthesize(self, teacher: Teacher, count: int, *, seed: int = 0, journal: Journal | None = None) -> ImageSource:
        """Make the images, filter them; labels stay what the images were made for."""
        journal = (journal or Journal()).within("candidates")
        made = self.candidates.synthesize(teacher, count, seed=seed, journal=journal).sample(count)
        passed = [low_passed(images, self.cutoff).half() for images in made.images.split(CHUNK)]
        return SyntheticSet(torch.cat(passed), made.labels, seed=seed)
