"""Correction of means: what quantization adds to each channel on average is taken away again.

Idea: a rounded weight shifts the mean of its layer's output, the shift passes the nonlinearity and meets the next. Go
through the network once, in order, with both networks on the same images: at each layer subtract from the bias what the
student's channel means exceed the full-precision ones by. Where a batch normalisation follows, its running mean and
variance are moved by as much as its input's moments moved.
Reference: bias correction (Nagel et al., ICCV 2019, sec. 4.2, the empirical form); batch-norm re-estimation (Sun et
al., "Hybrid 8-bit floating point training", NeurIPS 2019), here on synthetic images.
Differences: norms are not given the synthetic images' own moments, which a synthetic set gets wrong, but the remembered
ones: the mean moved by the difference between the student and the full-precision network on those images, the variance
by the ratio.
Cost: two forward passes, no gradient.
Choose it: for a student that is only calibrated, and before distillation; after `reconstruct` it did harm.
"""

# fx types an argument of a node as a union of everything:
# mypy: disable-error-code="union-attr, arg-type, operator, return-value, index"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from mirageq.errors import check_positive
from mirageq.graph import BATCH_NORM, LINEAR, WEIGHTED, is_stored, running_statistics, stored
from mirageq.images import ImageSource
from mirageq.journal import Journal
from mirageq.moments import channel_statistics
from mirageq.quant import Student, float_twin
from mirageq.quant.quantizers import BiasQuantizer, in_float
from mirageq.teacher import Teacher
from mirageq.tuning.contract import Tuner

Moments = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Correct:
    """Settings of correction.

    Attributes:
        images: of the source, seen in one batch.
        biases: correct the biases of layers.
        batch_norms: move running statistics (where norms are left, in the placement "paper").
        then: a tuner to go on with, `[tuner.then]` in a recipe.
    """

    images: int = 256
    biases: bool = True
    batch_norms: bool = True
    then: Tuner | None = None

    def __post_init__(self) -> None:
        check_positive(self, "images")

    def tune(
        self, teacher: Teacher, student: Student, source: ImageSource, *, seed: int = 0, journal: Journal | None = None
    ) -> None:
        """Correct a calibrated `student` in place on images of the source."""
        images = source.sample(self.images).images.to(teacher.device)
        full = float_twin(teacher.network, student.scheme).to(teacher.device)
        meant = _Measure(full.network)
        with torch.no_grad():
            with in_float(full):
                meant.run(images)
            _Correction(student.network, meant.moments, self).run(images)
        if self.then:
            self.then.tune(teacher, student, source, seed=seed, journal=journal)


class _Measure(Interpreter):
    """Notes the moments of each layer's output and each norm's input."""

    def __init__(self, network: GraphModule) -> None:
        super().__init__(network)
        self.moments: dict[str, Moments] = {}

    def run_node(self, n: Node) -> Any:
        if n.target is BATCH_NORM:
            self.moments[n.name] = channel_statistics(self.env[n.args[0]])
        value = super().run_node(n)
        if n.target in WEIGHTED:
            self.moments[n.name] = channel_statistics(_channels_second(n, value))
        return value


def _channels_second(layer: Node, value: Tensor) -> Tensor:
    """A view (N, C, ...) of what a layer gives; a linear one, of tokens too, has its channels last."""
    return value.movedim(-1, 1) if layer.target is LINEAR else value


class _Correction(Interpreter):
    """Runs the student and moves its biases and norms to the moments it was meant to have."""

    def __init__(self, network: GraphModule, meant: dict[str, Moments], settings: Correct) -> None:
        super().__init__(network)
        self.network, self.meant, self.settings = network, meant, settings
        self.done: set[Node] = set()  # what several layers share is moved once, by the first of them

    def run_node(self, n: Node) -> Any:
        if n.target is BATCH_NORM and self.settings.batch_norms and self._first(running_statistics(n)[0]):
            self._move_norm(n)
        value = super().run_node(n)
        bias = self._bias(n) if n.target in WEIGHTED and self.settings.biases else None
        if bias is not None and self._first(bias):
            channels = _channels_second(n, value)
            shift = channel_statistics(channels)[0] - self.meant[n.name][0]
            stored(self.network, bias).sub_(shift)
            channels.sub_(shift.view(-1, *[1] * (channels.dim() - 2)))
        return value

    def _move_norm(self, n: Node) -> None:
        mean, var = (stored(self.network, node) for node in running_statistics(n))
        seen, meant = channel_statistics(self.env[n.args[0]]), self.meant[n.name]
        mean.add_(seen[0] - meant[0])
        eps = n.args[7]
        var.copy_(((var + eps) * (seen[1] + eps) / (meant[1] + eps) - eps).clamp_min(0))

    def _first(self, tensor: Node) -> bool:
        first = tensor not in self.done
        self.done.add(tensor)
        return first

    def _bias(self, n: Node) -> Node | None:
        """The stored bias (O,) of a layer, behind its rounding if there is one."""
        node = n.args[2] if len(n.args) > 2 else n.kwargs.get("bias")
        if isinstance(node, Node) and node.op == "call_module":
            rounds = isinstance(self.network.get_submodule(node.target), BiasQuantizer)
            node = node.args[0] if rounds else None
        return node if is_stored(node) else None
