"""GENIE: each batch has a generator of its own, which learns together with the vectors it draws from.

Idea: descent on pixels is fast but leaves noise; a generator knows that neighbouring pixels belong together, but has to
serve all images. So train a small generator from scratch for each batch, and its latent vectors with it, until the
batch's statistics are the remembered ones. Strided convolutions swing: they see their input moved by a random shift, so
that the gradient does not favour the pixels their grid happens to read.
Reference: Jeon et al., "GENIE: Show Me the Data for Quantization", CVPR 2023 (GENIE-D; its overview, no code was read).
Differences from the official method: the generator is this package's (GDFQ's with one class, whose embedding scales
the latents and learns too); rates and their schedule are ours; labels are the teacher's guesses. GENIE-M, its
quantizer, is `tuner.weight_scale_lr` of the reconstruction.
Cost: that of ZeroQ and of a generator of similar size; for 32 x 32 images `width = 32` will do, at a third of the time.
Choose it: for smooth images, where painted ones are noisy; with the tuner `reconstruct`, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mirageq.canvas import Canvas, Observe
from mirageq.errors import UserError, check_positive
from mirageq.generator import Generator, GeneratorTraining
from mirageq.images import ImageSource
from mirageq.journal import Journal
from mirageq.losses import bn_deviation_alignment
from mirageq.paint import Descent, Parameters
from mirageq.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class Genie(Descent):
    """Settings of GENIE-D.

    Attributes:
        lr: Adam's learning rate of the latent vectors.
        generator_rate: the generator's learning rate, in parts of `lr`.
        latent: length of a latent vector.
        width: channels of the generator's trunk.
    """

    batch_size: int = 128
    iterations: int = 500
    lr: float = 0.1
    patience: int = 100
    generator_rate: float = 0.05
    latent: int = 256
    width: int = 128
    swing: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "generator_rate", "latent", "width")
        if self.start != "noise":
            raise UserError(f"GENIE's images are drawn from latent vectors; they cannot start from {self.start}.")

    def synthesize(self, teacher: Teacher, count: int, *, seed: int = 0, journal: Journal | None = None) -> ImageSource:
        """Draw `count` images, a batch and a generator at a time."""
        teacher.require_batch_norms("GENIE")
        canvas = Canvas(teacher, count, self, seed, journal or Journal())
        shape = GeneratorTraining(latent=self.latent, width=self.width)
        for part in canvas.parts():
            size = part.stop - part.start
            network = Generator.drawn(1, canvas.image_shape, shape, part.stream("generator")).to(teacher.device)
            latents = torch.randn(size, self.latent, generator=part.stream("latents")).to(teacher.device)
            labels = torch.zeros(size, dtype=torch.long, device=teacher.device)
            learning = [
                Parameters([latents.requires_grad_()]),
                Parameters(list(network.parameters()), rate=self.generator_rate),
            ]
            canvas.draw(part, learning, partial(network, latents, labels), partial(_loss, teacher, canvas.observe))
        return canvas.finish()


def _loss(teacher: Teacher, observe: Observe, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    seen = observe(images)
    return {"bn": bn_deviation_alignment(seen, teacher.batch_norms)}
