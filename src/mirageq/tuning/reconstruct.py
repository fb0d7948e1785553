"""Tuning by reconstruction: block after block, the student learns to give what the full-precision block gave.

Idea: quantize the network one block at a time. For each block, choose for every weight whether it is rounded up or
down, and learn the steps of its activations, so that the block's output stays what it was. No label and no teacher's
softmax; each block is a small problem that a few hundred images solve.
Reference: AdaRound (Nagel et al., ICML 2020) for the rounding, BRECQ (Li et al., ICLR 2021) for the blocks, LSQ (Esser
et al., ICLR 2020) for the steps, QDrop (Wei et al., ICLR 2022) for random dropping, GENIE-M (Jeon et al., CVPR 2023)
for the weight's step beside its rounding.
Differences from the official codes: blocks are found in the graph, not by class name; the squared error is plain (BRECQ
weights it by Fisher information); far fewer steps than their 20,000 a block, at a higher rate.
"""

# fx types an argument of a node as a union of everything:
# mypy: disable-error-code="union-attr, arg-type"

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx import GraphModule, Node

from mirageq.augment import low_passed, mixed
from mirageq.errors import UserError, check_not_negative, check_positive
from mirageq.graph import stored
from mirageq.images import ImageSource
from mirageq.journal import Checkpoint, Journal
from mirageq.paint import cosine
from mirageq.quant import Student, convert
from mirageq.quant.blocks import Block, between, find_blocks, single_layers
from mirageq.quant.quantizers import ActivationQuantizer, WeightQuantizer, in_float
from mirageq.seeding import stream
from mirageq.teacher import Teacher
from mirageq.tuning.cache import CHUNK, Cache
from mirageq.tuning.contract import Tuner, require_fixed_grids
from mirageq.tuning.soft import Dropping, DroppingActivation, SoftWeight

Side = tuple[GraphModule, Block, Cache]
"""A network, one of its blocks, and what the block reads."""

LOOKED_AT = 128  # images on which a block's error is told
CHECKED_EVERY = 50  # steps, for a loss that is no number; to look at it makes a GPU wait
CUTOFFS = (0.1, 0.5)  # of softened images, in parts of the highest frequency
LIVING_CACHES = 4  # activations of all images that are held at a time, the images besides


@dataclass(frozen=True, kw_only=True)
class Reconstruct:
    """Settings of tuning by reconstruction.

    Attributes:
        steps: updates of each block.
        batch_size: images of an update.
        images: of the source, cached at the blocks' borders.
        softened: low-passed copies of them besides, each with a cutoff of its own (SynQ, `CUTOFFS`): blocks see the
            same objects with and without the noise that synthesis leaves.
        mirrored: the mirror images of all these besides, which cost no synthesis.
        mixes: so many times as many blends of two of them besides (mixup): blocks cannot learn a small set by heart.
        lr: Adam's rate of the rounding.
        scale_lr: Adam's rate of the activations' steps, relative to their size; 0 leaves them as calibrated.
        weight_scale_lr: the same for the weights' steps, channel by channel (GENIE-M); 0 leaves them.
        bias_lr: Adam's rate of the biases, and of the scales and shifts of BatchNorms that are not folded, as it is; 0
            leaves them.
        drop: probability that a number is left in full precision while its block learns (QDrop); 0 never.
        rounding_weight: of the term that makes roundings decide; it starts after a fifth of the steps.
        layers_per_block: neighbouring blocks with fewer layers are joined.
        most_layers: a block with more layers is taken layer by layer, and the journal says so.
        cache_bytes: of memory for cached activations, half as much again where layers are taken one by one; what does
            not fit lies in temporary files.
        then: a tuner to go on with once every block is done, `[tuner.then]` in a recipe; distillation brings the blocks
            together.
    """

    steps: int = 500
    batch_size: int = 32
    images: int = 512
    softened: bool = False
    mirrored: bool = False
    mixes: int = 0
    lr: float = 4e-2
    scale_lr: float = 4e-3
    weight_scale_lr: float = 0.0
    bias_lr: float = 0.0
    drop: float = 0.5
    rounding_weight: float = 0.01
    layers_per_block: int = 2
    most_layers: int = 16
    cache_bytes: int = 2**30
    then: Tuner | None = None

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "images", "lr", "layers_per_block", "most_layers", "cache_bytes")
        check_not_negative(self, "steps", "mixes", "scale_lr", "weight_scale_lr", "bias_lr", "rounding_weight")
        if not 0 <= self.drop < 1:
            raise UserError(f"drop is a probability below 1; got {self.drop}.")
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
        images, blending = source.sample(self.images).images, stream(seed, "mixes")
        self.check(student, len(images))
        if self.softened:
            cutoffs = torch.empty(len(images)).uniform_(*CUTOFFS, generator=stream(seed, "softened"))
            images = torch.cat([images, low_passed(images, cutoffs)])
        if self.mirrored:
            images = torch.cat([images, images.flip(-1)])
        images = torch.cat([images, *(mixed(images, blending) for _ in range(self.mixes))])
        device = teacher.device
        network = student.logits_network()
        reference = convert(teacher.network, student.scheme).to(device).logits_network()  # the same graph, untouched
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
            full = quantized = Cache(images, Path(folder), self.cache_bytes // LIVING_CACHES)
            settled: set[str] = set()
            for index, (block, twin) in enumerate(zip(blocks, meant, strict=True)):
                target = full.through(between(reference, twin.start, twin.end), device)
                if index >= done:
                    if len(block.layers) <= self.most_layers:
                        before, after = self._fit(network, block, quantized, full, target, seed, settled)
                    else:
                        sides = (network, block, quantized), (reference, twin, full)
                        before, after = self._fit_layers(*sides, seed, settled, journal)
                    advance(index, before=before, after=after)
                    checkpoint.save({"student": student.state_dict(), "done": index + 1})
                full, run = target, between(network, block.start, block.end)
                settled |= {name for name, _ in run.named_parameters()}
                quantized = quantized.through(run, device)

    def _fit_layers(
        self, student: Side, reference: Side, seed: int, settled: set[str], journal: Journal
    ) -> tuple[float, float]:
        """Fit the layers of a block one by one; the sums of their mean squared errors before and after."""
        (network, block, quantized), (untouched, twin, full) = student, reference
        journal.say(
            f"Between '{block.layers[0]}' and '{block.layers[-1]}' no block with one input and one output was found; "
            f"its {len(block.layers)} layers are reconstructed one by one."
        )
        errors = []
        device = next(network.parameters()).device
        for single, meant in zip(single_layers(network, block), single_layers(untouched, twin), strict=True):
            seen = quantized.through(between(network, block.start, single.start), device)
            wanted = full.through(between(untouched, twin.start, meant.start), device)
            given = wanted.through(between(untouched, meant.start, meant.end), device)
            errors.append(self._fit(network, single, seen, wanted, given, seed, settled))
            settled = settled | {name for name, _ in between(network, single.start, single.end).named_parameters()}
        return sum(before for before, _ in errors), sum(after for _, after in errors)

    def _fit(
        self,
        network: GraphModule,
        block: Block,
        quantized: Cache,
        full: Cache,
        target: Cache,
        seed: int,
        settled: set[str],
    ) -> tuple[float, float]:
        """Fit a block, but not the tensors that an earlier one reads too; its mean squared errors before and after."""
        run = between(network, block.start, block.end)
        before = _error(run, quantized, target)
        generator = stream(seed, "reconstruct", block.name)
        dropping = Dropping(self.drop, generator)
        weights, activations = self._soften(network, run, dropping, settled)
        groups: list[dict[str, Any]] = [{"params": [part.up for part in weights.values()]}]
        groups += [
            {"params": [part.factor for part in parts.values()], "rate": rate}
            for parts, rate in ((activations, self.scale_lr), (weights, self.weight_scale_lr))
            if rate
        ]
        if self.bias_lr:
            biases = [value for name, value in run.named_parameters() if value.dim() == 1 and name not in settled]
            groups.append({"params": biases, "rate": self.bias_lr})
        device = next(network.parameters()).device
        optimizer = torch.optim.Adam(groups, lr=self.lr, fused=True)
        for step in range(self.steps):
            chosen = torch.randint(len(quantized), (self.batch_size,), generator=generator)
            x = dropping(quantized.take(chosen).to(device), full.take(chosen).to(device))
            wanted = target.take(chosen).to(device)
            loss = (run(x) - wanted).square().sum() / (self.batch_size * _sites(target))  # mse_loss loses the layout
            decided = step / self.steps
            if weights and decided >= 0.2:
                sharpness = cosine(20.0, 2.0, (decided - 0.2) / 0.8)
                loss = (
                    loss
                    + self.rounding_weight
                    * torch.stack([part.indecision(sharpness) for part in weights.values()]).sum()
                )
            if (step % CHECKED_EVERY == 0 or step == self.steps - 1) and not loss.isfinite():
                raise UserError(f"The loss of block '{block.name}' became {float(loss.detach())}. Lower tuner.lr.")
            for group in optimizer.param_groups[1:]:  # steps settle; roundings need their rate to the end, to decide
                group["lr"] = cosine(group["rate"], 0.0, decided)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for node, part in weights.items():
            part.settle(network.get_submodule(node.target), stored(network, node.args[0]))
        for node, soft in activations.items():
            soft.settle(network.get_submodule(node.target))
        return before, _error(between(network, block.start, block.end), quantized, target)

    def _soften(self, network: GraphModule, run: GraphModule, dropping: Dropping, settled: set[str]):
        """Put learning quantizers in the place of those that a block calls, but for weights that are `settled`."""
        weights: dict[Node, SoftWeight] = {}
        activations: dict[Node, DroppingActivation] = {}
        for node in run.graph.find_nodes(op="call_module"):
            part = network.get_submodule(node.target)
            if isinstance(part, WeightQuantizer):
                twice = node.target in {other.target for other in weights}
                if not twice and node.args[0].target not in settled:
                    weight = stored(network, node.args[0])
                    weights[node] = SoftWeight(part, weight, bool(self.weight_scale_lr))
            elif isinstance(part, ActivationQuantizer):
                activations[node] = DroppingActivation(part, dropping)
        for softened in (weights, activations):
            for node, soft in softened.items():
                run.set_submodule(node.target, soft)
        return weights, activations


def _blocks(network: GraphModule, layers_per_block: int) -> list[Block]:
    (output,) = network.graph.find_nodes(op="output")
    return find_blocks(network, output.args[0], layers_per_block)


def _sites(cache: Cache) -> int:
    """Places of a feature map, over which the squared error is averaged; it is summed over channels, as in BRECQ.

    Of tokens (N, T, C) it is the other way round, which only weighs the error against the rounding term.
    """
    return max(int(np.prod(cache.shape[2:])), 1)


@torch.no_grad()
def _error(run: nn.Module, inputs: Cache, target: Cache) -> float:
    """Mean squared error over the first images."""
    device = next(run.parameters()).device
    chunks = torch.arange(min(len(inputs), LOOKED_AT)).split(CHUNK)
    errors = [(run(inputs.take(chunk).to(device)).cpu() - target.take(chunk)).square().sum() for chunk in chunks]
    return float(sum(errors)) / (sum(map(len, chunks)) * int(np.prod(target.shape[1:])))
