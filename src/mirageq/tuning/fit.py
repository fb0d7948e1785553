"""One block's problem: roundings, steps and biases learn until the block gives what the full-precision one gave."""

# fx types an argument of a node as a union of everything:
# mypy: disable-error-code="union-attr, arg-type"

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from mirageq.errors import UserError, check_not_negative, check_positive
from mirageq.graph import stored
from mirageq.paint import cosine
from mirageq.quant.blocks import Block, between
from mirageq.quant.quantizers import ActivationQuantizer, WeightQuantizer
from mirageq.seeding import stream
from mirageq.tuning.cache import CHUNK, Cache
from mirageq.tuning.soft import Dropping, DroppingActivation, SoftWeight

LOOKED_AT = 128  # images on which a block's error is told
CHECKED_EVERY = 50  # steps, for a loss that is no number; to look at it makes a GPU wait


@dataclass(frozen=True)
class Problem:
    """A block of the student and what it has to give.

    Attributes:
        network: the student.
        block: of it.
        quantized: what the block reads in the student.
        full: what it reads in full precision.
        target: what it gives in full precision.
        settled: names of tensors that an earlier block has fitted, and this one leaves as they are.
        device: where to compute.
    """

    network: GraphModule
    block: Block
    quantized: Cache
    full: Cache
    target: Cache
    settled: frozenset[str]
    device: torch.device

    @property
    def run(self) -> GraphModule:
        """The block as a network of its own, on the student's tensors and on the quantizers that it has now."""
        return between(self.network, self.block.start, self.block.end)

    @torch.no_grad()
    def error(self) -> float:
        """The block's mean squared error over the first images."""
        run, chunks = self.run, torch.arange(min(len(self.quantized), LOOKED_AT)).split(CHUNK)
        errors = [
            (run(self.quantized.take(chunk).to(self.device)).cpu() - self.target.take(chunk)).square().sum()
            for chunk in chunks
        ]
        return float(sum(errors)) / (sum(map(len, chunks)) * int(np.prod(self.target.shape[1:])))


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Settings of fitting one block.

    Attributes:
        steps: updates of each block.
        batch_size: images of an update.
        lr: Adam's rate of the rounding.
        scale_lr: Adam's rate of the activations' steps, relative to their size; 0 leaves them as calibrated.
        weight_scale_lr: the same for the weights' steps, channel by channel (GENIE-M); 0 leaves them.
        bias_lr: Adam's rate of the biases, and of the scales and shifts of BatchNorms that are not folded, as it is; 0
            leaves them.
        drop: probability that a number is left in full precision while its block learns (QDrop); 0 never.
        rounding_weight: of the term that makes roundings decide; it starts after a fifth of the steps.
    """

    steps: int = 500
    batch_size: int = 32
    lr: float = 4e-2
    scale_lr: float = 4e-3
    weight_scale_lr: float = 0.0
    bias_lr: float = 0.0
    drop: float = 0.5
    rounding_weight: float = 0.01

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "lr")
        check_not_negative(self, "steps", "scale_lr", "weight_scale_lr", "bias_lr", "rounding_weight")
        if not 0 <= self.drop < 1:
            raise UserError(f"drop is a probability below 1; got {self.drop}.")

    def fit(self, problem: Problem, seed: int) -> tuple[float, float]:
        """Fit the block in place; its mean squared errors before and after.

        Raises:
            UserError: the loss is not finite.
        """
        before, network, target, device = problem.error(), problem.network, problem.target, problem.device
        run, generator = problem.run, stream(seed, "reconstruct", problem.block.name)
        dropping = Dropping(self.drop, generator)
        weights, activations = self._soften(problem, run, dropping)
        groups = self._groups(problem, run, weights, activations)
        learning = [parameter for group in groups for parameter in group["params"]]
        if not learning:
            return before, before
        optimizer = torch.optim.Adam(groups, lr=self.lr, fused=True)
        with _learning_alone(run, learning):
            for step in range(self.steps):
                chosen = torch.randint(len(problem.quantized), (self.batch_size,), generator=generator)
                x = dropping(problem.quantized.take(chosen).to(device), problem.full.take(chosen).to(device))
                wanted = target.take(chosen).to(device)
                error = (run(x) - wanted).square().sum()  # mse_loss loses the layout
                loss = error / (self.batch_size * _sites(target))
                decided = step / self.steps
                if weights and decided >= 0.2:
                    sharpness = cosine(20.0, 2.0, (decided - 0.2) / 0.8)
                    undecided = torch.stack([part.indecision(sharpness) for part in weights.values()]).sum()
                    loss = loss + self.rounding_weight * undecided
                if (step % CHECKED_EVERY == 0 or step == self.steps - 1) and not loss.isfinite():
                    told = float(loss.detach())
                    raise UserError(f"The loss of block '{problem.block.name}' became {told}. Lower tuner.lr.")
                for group in optimizer.param_groups[1:]:  # roundings need their rate to the end, to decide
                    group["lr"] = cosine(group["rate"], 0.0, decided)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        for node, part in weights.items():
            part.settle(network.get_submodule(node.target), stored(network, node.args[0]))
        for node, soft in activations.items():
            soft.settle(network.get_submodule(node.target))
        return before, problem.error()

    def _soften(self, problem: Problem, run: GraphModule, dropping: Dropping):
        """Put learning quantizers in the place of those that a block calls, but for weights that are settled."""
        network = problem.network
        weights: dict[Node, SoftWeight] = {}
        activations: dict[Node, DroppingActivation] = {}
        for node in run.graph.find_nodes(op="call_module"):
            part = network.get_submodule(node.target)
            if isinstance(part, WeightQuantizer):
                twice = node.target in {other.target for other in weights}
                if not twice and node.args[0].target not in problem.settled:
                    weight = stored(network, node.args[0])
                    weights[node] = SoftWeight(part, weight, bool(self.weight_scale_lr))
            elif isinstance(part, ActivationQuantizer):
                activations[node] = DroppingActivation(part, dropping)
        for softened in (weights, activations):
            for node, soft in softened.items():
                run.set_submodule(node.target, soft)
        return weights, activations

    def _groups(
        self,
        problem: Problem,
        run: GraphModule,
        weights: dict[Node, SoftWeight],
        activations: dict[Node, DroppingActivation],
    ) -> list[dict[str, Any]]:
        """What learns: the roundings first, at `lr`; then the rest, each group with its `rate` at the beginning."""
        groups: list[dict[str, Any]] = [{"params": [part.up for part in weights.values()]}]
        groups += [
            {"params": [part.factor for part in parts.values()], "rate": rate}
            for parts, rate in ((activations, self.scale_lr), (weights, self.weight_scale_lr))
            if rate
        ]
        if self.bias_lr:
            named = run.named_parameters()
            biases = [value for name, value in named if value.dim() == 1 and name not in problem.settled]
            groups.append({"params": biases, "rate": self.bias_lr})
        return groups


@contextmanager
def _learning_alone(run: nn.Module, learning: list[Tensor]) -> Iterator[None]:
    """No parameter but these requires a gradient for as long as this lasts, and none has one left afterwards."""
    wanted = {id(parameter) for parameter in learning}
    others = [parameter for parameter in run.parameters() if parameter.requires_grad and id(parameter) not in wanted]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for each in learning:
            each.grad = None
        for parameter in others:
            parameter.requires_grad_(True)


def _sites(cache: Cache) -> int:
    """Places of a feature map, over which the squared error is averaged; it is summed over channels, as in BRECQ.

    Of tokens (N, T, C) it is the other way round, which only weighs the error against the rounding term.
    """
    return max(int(np.prod(cache.shape[2:])), 1)
