"""Tuning by reconstruction: block after block, the student learns to give what the full-precision block gave.

Idea: quantize the network one block at a time. For each block, choose for every weight whether it is rounded up or
down, and learn the steps of its activations, so that the block's output stays what it was. No label and no teacher's
softmax; each block is a small problem that a few hundred images solve.
Reference: AdaRound (Nagel et al., ICML 2020) for the rounding, BRECQ (Li et al., ICLR 2021) for the blocks, LSQ (Esser
et al., ICLR 2020) for the steps, QDrop (Wei et al., ICLR 2022) for random dropping, GENIE-M (Jeon et al., CVPR 2023)
for the weight's step beside its rounding.
Differences from the official codes: blocks are found in the graph, not by class name; the squared error is plain (BRECQ
weights it by Fisher information); far fewer steps than their 20,000 a block, at a higher rate; steps learn at a rate
relative to their size, which falls to zero (a cosine), and biases may learn too; which numbers are dropped is a window,
begun at random, of numbers that are drawn once a block.
Cost: `steps` updates of every block, each a forward and a backward pass of it: together about `steps` updates of the
whole network, and two passes of all images. In the shipped recipes five minutes (best-cifar10, a core with AVX-512) to
an hour and a half (best-imagenet, a core without).
Choose it: below 8 bits, with any method's images; `distill` alone where minutes count, `squant` at 8 bits.
"""

# fx types an argument of a node as a union of everything:
# mypy: disable-error-code="union-attr, arg-type"

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from mirageq.augment import low_passed, mixed
from mirageq.errors import UserError, check_not_negative, check_positive
from mirageq.images import ImageSource
from mirageq.journal import Checkpoint, Journal
from mirageq.quant import Student, float_twin
from mirageq.quant.blocks import Block, between, find_blocks, single_layers
from mirageq.quant.quantizers import in_float
from mirageq.seeding import stream
from mirageq.teacher import Teacher
from mirageq.tuning.cache import Cache
from mirageq.tuning.contract import Tuner, require_fixed_grids
from mirageq.tuning.fit import Fit, Problem

Errors = tuple[float, float]
"""Mean squared errors of what a block gives, before it is fitted and after."""

CUTOFFS = (0.1, 0.5)  # of softened images, in parts of the highest frequency
LIVING_CACHES = 4  # activations of all images that are held at a time


@dataclass(frozen=True, kw_only=True)
class Reconstruct(Fit):
    """Settings of tuning by reconstruction.

    Attributes:
        images: of the source, cached at the blocks' borders.
        softened: low-passed copies of them besides, each with a cutoff of its own (SynQ, `CUTOFFS`): blocks see the
            same objects with and without the noise that synthesis leaves.
        mirrored: the mirror images of all these besides, which cost no synthesis.
        mixes: so many times as many blends of two of them besides (mixup): blocks cannot learn a small set by heart.
        layers_per_block: neighbouring blocks with fewer layers are joined.
        most_layers: a block with more layers is taken layer by layer, and the journal says so.
        cache_bytes: of memory for cached activations, half as much again where layers are taken one by one; what does
            not fit lies in temporary files.
        then: a tuner to go on with once every block is done, `[tuner.then]` in a recipe; distillation brings the blocks
            together.
    """

    images: int = 512
    softened: bool = False
    mirrored: bool = False
    mixes: int = 0
    layers_per_block: int = 2
    most_layers: int = 16
    cache_bytes: int = 2**30
    then: Tuner | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "images", "layers_per_block", "most_layers", "cache_bytes")
        check_not_negative(self, "mixes")
        then: object = self.then
        while then is not None:
            if isinstance(then, Reconstruct):
                raise UserError("What follows a reconstruction is another tuner; give this one more steps instead.")
            then = getattr(then, "then", None)

    def check(self, student: Student, images: int | None) -> None:
        """Raise a `UserError` for weights whose grid follows them, or fewer images than a batch."""
        if not self.steps:
            return
        require_fixed_grids(student, "Reconstruction")
        given = self.images if images is None else min(images, self.images)
        count = given * (1 + self.softened) * (1 + self.mirrored) * (1 + self.mixes)
        if count < self.batch_size:
            raise UserError(
                f"The batch size {self.batch_size} is larger than the {count} images to reconstruct on. "
                "Make more images or use a smaller batch."
            )

    def tune(
        self, teacher: Teacher, student: Student, source: ImageSource, *, seed: int = 0, journal: Journal | None = None
    ) -> None:
        """Reconstruct the blocks of a calibrated `student` in place, in order, on images of the source.

        Raises:
            UserError: fewer images than a batch, weights whose grid follows them, or a loss that is not finite.
        """
        journal = journal or Journal()
        if self.steps:
            self._all_blocks(teacher, student, source, seed, journal, journal.checkpoint("reconstruct"))
        if self.then:
            self.then.tune(teacher, student, source, seed=seed, journal=journal)

    def _all_blocks(
        self,
        teacher: Teacher,
        student: Student,
        source: ImageSource,
        seed: int,
        journal: Journal,
        checkpoint: Checkpoint,
    ) -> None:
        device = teacher.device
        network = student.logits_network()
        reference = float_twin(teacher.network, student.scheme).to(device).logits_network()
        blocks = _blocks(network, self.layers_per_block)
        meant = _blocks(reference, self.layers_per_block)
        done = 0
        if state := checkpoint.load():
            student.load_state_dict(state["student"])
            done = state["done"]
        if done == len(blocks):
            return
        with (
            tempfile.TemporaryDirectory() as folder,
            in_float(reference),
            journal.stage("reconstruct", len(blocks), start=done) as advance,
        ):
            images = self._images(student, source, seed)
            full = quantized = Cache(images, Path(folder), self.cache_bytes // LIVING_CACHES)
            del images
            settled: frozenset[str] = frozenset()
            for index, (block, twin) in enumerate(zip(blocks, meant, strict=True)):
                target = full.through(between(reference, twin.start, twin.end), device)
                problem = Problem(network, block, quantized, full, target, settled, device)
                if index >= done:
                    if len(block.layers) <= self.most_layers:
                        before, after = self.fit(problem, seed)
                    else:
                        before, after = self._fit_layers(problem, reference, twin, seed, journal)
                    advance(index, before=before, after=after)
                    checkpoint.save({"student": student.state_dict(), "done": index + 1})
                settled |= {name for name, _ in problem.run.named_parameters()}
                full, quantized = target, quantized.through(problem.run, device)
                del problem  # and with it what it read, before the next block's are made

    def _images(self, student: Student, source: ImageSource, seed: int) -> Tensor:
        """What the first block reads: images of the source, and what is made of them besides."""
        images, blending = source.sample(self.images).images.cpu(), stream(seed, "mixes")
        self.check(student, len(images))
        if self.softened:
            cutoffs = torch.empty(len(images)).uniform_(*CUTOFFS, generator=stream(seed, "softened"))
            images = torch.cat([images, low_passed(images, cutoffs)])
        if self.mirrored:
            images = torch.cat([images, images.flip(-1)])
        return torch.cat([images, *(mixed(images, blending) for _ in range(self.mixes))])

    def _fit_layers(self, problem: Problem, reference: GraphModule, twin: Block, seed: int, journal: Journal) -> Errors:
        """Fit the layers of a block one by one; the sums of their mean squared errors before and after."""
        network, block, device = problem.network, problem.block, problem.device
        singles, settled, errors = single_layers(network, block), problem.settled, []
        some = f"{len(singles)} of its {len(block.layers)} layers are reconstructed one by one, and the others not"
        journal.say(
            f"Between '{block.layers[0]}' and '{block.layers[-1]}' no block with one input and one output was found; "
            + (some if len(singles) < len(block.layers) else f"its {len(singles)} layers are reconstructed one by one")
            + "."
        )
        for single, meant in zip(singles, single_layers(reference, twin), strict=True):
            full = problem.full.through(between(reference, twin.start, meant.start), device)
            alone = Problem(
                network,
                single,
                problem.quantized.through(between(network, block.start, single.start), device),
                full,
                full.through(between(reference, meant.start, meant.end), device),
                settled,
                device,
            )
            errors.append(self.fit(alone, seed))
            settled |= {name for name, _ in alone.run.named_parameters()}
            del full, alone
        return sum(before for before, _ in errors), sum(after for _, after in errors)


def _blocks(network: GraphModule, layers_per_block: int) -> list[Block]:
    (output,) = network.graph.find_nodes(op="output")
    return find_blocks(network, output.args[0], layers_per_block)
