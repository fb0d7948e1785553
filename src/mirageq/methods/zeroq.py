"""ZeroQ: images whose batch statistics are those the network's BatchNorm layers remember.

Idea: start from Gaussian noise and descend on the pixels until, at the input of every BatchNorm layer, the batch's
mean and standard deviation match the running ones. No class enters: the images are "typical", not of something.
Reference: Cai et al., "ZeroQ: A Novel Zero Shot Quantization Framework", CVPR 2020, eq. 3.
Differences from the official code:
  1. Statistics are the batch's, as BatchNorm computes them and as later papers have ZeroQ; there each image's own, over
     space, is drawn to the remembered ones, at the input (to 0 and 1) as at every layer.
  2. Distances are averaged over channels; there they are summed and divided by the number of images, or of channels,
     in one version or the other. The rate is the later version's (0.5), and there is no early stop as in the earlier.
  3. Labels are the teacher's own guesses (the official code assigns none), so that any tuner can be fed.
Cost: one teacher forward and backward pass an image and iteration; 500 iterations.
Choose it: first, of all that paint: alone it serves distillation at least as well as IntraQ, at less cost
(benchmarks/RESULTS.md). With `class_weight` and `swing` it paints objects that can be recognised, as DeepInversion (Yin
et al., CVPR 2020) does with other priors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mirageq.canvas import Canvas, Observe
from mirageq.errors import check_not_negative
from mirageq.images import ImageSource
from mirageq.journal import Journal
from mirageq.losses import bn_deviation_alignment, deviation_alignment
from mirageq.moments import channel_statistics
from mirageq.paint import Descent
from mirageq.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class ZeroQ(Descent):
    """Settings of ZeroQ, the paper's by default.

    Attributes:
        class_weight: of the cross-entropy with a class drawn for each image, which the paper's images do without.
    """

    batch_size: int = 64
    iterations: int = 500
    patience: int = 100
    class_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "class_weight")

    def synthesize(self, teacher: Teacher, count: int, *, seed: int = 0, journal: Journal | None = None) -> ImageSource:
        """Paint `count` images, a batch at a time."""
        teacher.require_batch_norms("ZeroQ")
        canvas = Canvas(teacher, count, self, seed, journal or Journal())
        for part in canvas.parts():
            labels = part.draw_labels(teacher.classes).to(teacher.device) if self.class_weight else None
            canvas.paint(part, partial(self._loss, teacher, canvas.observe, labels), labels)
        return canvas.finish()

    def _loss(
        self, teacher: Teacher, observe: Observe, labels: Tensor | None, images: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Eq. 3: squared distances of means and deviations, averaged over channels, summed over layers."""
        seen = observe(images)
        blank = torch.zeros(images.shape[1], device=images.device)
        whole = deviation_alignment(*channel_statistics(images), blank, blank + 1)
        terms = {"bn": bn_deviation_alignment(seen, teacher.batch_norms), "input": whole}
        if labels is not None:
            terms["class"] = self.class_weight * F.cross_entropy(seen.logits.float(), labels)
        return terms
