"""GDFQ: a label-conditioned generator trained side by side with the student.

Idea: a small generator turns noise and a class into an image. The teacher must recognise the class (cross-entropy),
and the batch must have the statistics its BatchNorms remember. After a warm-up the generator takes one step for each
step of the student, so the student never sees an image twice.
Reference: Xu et al., "Generative Low-bitwidth Data Free Quantization", ECCV 2020, arXiv 2003.03603.
Differences from the official code:
  1. Activation ranges are calibrated once, on images of the warmed-up generator (official: a moving average during the
     first warm-up epochs, when the images are still noise).
  2. The generator's rate falls after fixed numbers of updates, and the student's follows its tuner; the weight of the
     distillation term is the tuner's too, the same for every method.
  3. Images of any size: the two doublings end at the image's own size.
Cost: for each image a pass forward and backward through generator and teacher; on small images the generator costs
more than a ResNet-20. Nothing is stored. It must be trained again for every student.
Choose it: as the frame generator methods are compared in, or when many different images matter more than good ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from mirageq.generator import GeneratorTraining
from mirageq.generator_source import GeneratorSource
from mirageq.images import ImageSource
from mirageq.journal import Journal
from mirageq.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class GDFQ(GeneratorTraining):
    """Settings of GDFQ: those of the common frame (see `GeneratorTraining`).

    The defaults are its code's for CIFAR-100; for ImageNet 10,000 updates of warm-up in batches of 16, by "norm".
    """

    def synthesize(self, teacher: Teacher, count: int, *, seed: int = 0, journal: Journal | None = None) -> ImageSource:
        """Warm the generator up; `count` matters only to a finished set."""
        teacher.require_batch_norms("GDFQ")
        source = GeneratorSource(teacher, self, seed)
        source.warm_up(journal or Journal())
        return source
