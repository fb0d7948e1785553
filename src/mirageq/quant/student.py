"""The quantized network."""

# fx types an argument of a node as a union of everything:
# mypy: disable-error-code="union-attr, arg-type, operator, return-value"

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from mirageq.errors import UserError
from mirageq.graph import share, stored
from mirageq.quant.fake_quant import INT32_LIMIT
from mirageq.quant.quantizers import ActivationQuantizer, BiasQuantizer, WeightQuantizer
from mirageq.quant.ranges import range_observer
from mirageq.quant.remembered import Remembering
from mirageq.quant.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class Size:
    """Bytes of a student when its weights are stored in their bits, packed.

    Attributes:
        weight_bytes: quantized weights.
        scale_bytes: scales and zero points, 4 bytes each; a symmetric grid has no zero point.
        float_bytes: everything else (biases, norms with their statistics), 4 bytes a number.
        total_bytes: the sum.
        fp32_bytes: of the network the student was made from.
    """

    weight_bytes: int
    scale_bytes: int
    float_bytes: int
    total_bytes: int
    fp32_bytes: int


class Student(nn.Module):
    """A network that computes as its quantized self would; made by `convert`.

    `train()` and `eval()` change nothing: batch normalisations always use their running statistics. The state dict
    holds everything, so `convert(network, scheme)` followed by `load_state_dict` gives the same student bit by bit.

    Attributes:
        network: the graph, images -> (logits, features). One graph computes both; `logits_network()` has logits alone.
        scheme: the settings it was made with.
    """

    def __init__(
        self, network: GraphModule, scheme: Scheme, left_in_float: tuple[tuple[str, str], ...], fp32_bytes: int
    ) -> None:
        super().__init__()
        self.network, self.scheme = network, scheme
        self._left_in_float, self._fp32_bytes = left_in_float, fp32_bytes

    @property
    def weight_quantizers(self) -> dict[str, WeightQuantizer]:
        """Layer -> quantizer, in order of computation."""
        return {part.name: part for part in self.network.modules() if isinstance(part, WeightQuantizer)}

    @property
    def activation_quantizers(self) -> dict[str, ActivationQuantizer]:
        """Activation -> quantizer, in order of computation."""
        return {part.name: part for part in self.network.modules() if isinstance(part, ActivationQuantizer)}

    @property
    def bias_quantizers(self) -> dict[str, BiasQuantizer]:
        """Bias -> quantizer, in order of computation; only in the placement "deploy"."""
        return {part.name: part for part in self.network.modules() if isinstance(part, BiasQuantizer)}

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, C, H, W) -> logits (N, classes). Raises `UserError` before calibration."""
        logits: Tensor = self.network(images)[0]
        return logits

    def observe(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, classes) and the features (N, D) the last layer reads, averaged over space if need be."""
        logits, features = self.network(images)
        return logits, features

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Set the activation ranges from batches of normalised images (N, C, H, W), and fix them.

        While they are found, activations pass in float and weights are quantized, and with ranges from
        "batch_norms" activations have the sizes that those remember. Earlier ranges are replaced; they stay if an
        activation is refused.

        Raises:
            UserError: no batch, an activation that is NaN or infinite, or a bias beyond 32 bits.
        """
        scheme, quantizers = self.scheme, self.activation_quantizers
        for name, quantizer in quantizers.items():
            bits, symmetric = quantizer.bits, quantizer.symmetric
            quantizer.observe(range_observer(scheme.activation_range, name, bits, symmetric, scheme.percentile))
        for rounding in self.bias_quantizers.values():
            rounding.state = "off"
        run = self.network if scheme.ranges_from == "images" else Remembering(self.network).run
        try:
            for images in batches:
                run(images)
            ranges = {name: quantizer.observer.range() for name, quantizer in quantizers.items() if quantizer.observer}
        finally:
            for part in (*quantizers.values(), *self.bias_quantizers.values()):
                part.switch_on()
        for name, (lo, hi) in ranges.items():
            quantizers[name].set_range(lo, hi)
        for name, (bias, step) in self.integer_biases().items():
            if (largest := float((bias / step).abs().max())) > INT32_LIMIT:
                raise UserError(
                    f"The bias '{name}' needs {largest:.2g} steps of its layer's accumulator, more than 32 bits hold: "
                    "the input or a weight channel is all but zero. Use the placement 'paper', or prune the channel."
                )

    def integer_biases(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Bias -> (bias, step), both (O,): an integer runtime stores round(bias / step) in 32 bits."""
        found = {}
        for node in self.network.graph.find_nodes(op="call_module"):
            part = self.network.get_submodule(node.target)
            if isinstance(part, BiasQuantizer):
                bias, input_scale, weight_scale = node.args
                source = weight_scale.args[0]
                quantizer: WeightQuantizer = self.network.get_submodule(source.target)  # type: ignore[assignment]
                scale, _ = quantizer.affine(stored(self.network, source.args[0]))
                step = stored(self.network, input_scale) * scale.flatten()
                found[part.name] = stored(self.network, bias).detach(), step.detach()
        return found

    def quantized_weights(self) -> list[tuple[WeightQuantizer, Tensor]]:
        """Each quantizer with the weight it is for, once, however many layers read it; in order of computation."""
        found: dict[str, tuple[WeightQuantizer, Tensor]] = {}
        for node in self.network.graph.find_nodes(op="call_module"):
            part = self.network.get_submodule(node.target)
            if isinstance(part, WeightQuantizer):
                found[node.args[0].target] = part, stored(self.network, node.args[0])
        return list(found.values())

    def left_in_float(self) -> list[tuple[str, str]]:
        """What is not quantized: (tensor or operation, reason)."""
        return list(self._left_in_float)

    def logits_network(self) -> GraphModule:
        """The graph images -> logits, on the student's own tensors; for export and inspection."""
        copied = torch.fx.Graph()
        result = copied.graph_copy(self.network.graph, {})
        assert isinstance(result, tuple)
        copied.output(result[0])
        network = share(self.network, copied)
        network.graph.eliminate_dead_code()
        network.recompile()
        return network

    def size(self) -> Size:
        """How many bytes the student takes."""
        weights, scales, floats = 0, 0, stored_bytes(self.network)
        for part, weight in self.quantized_weights():
            weights += -(-weight.numel() * part.bits // 8)
            scales += 4 * len(weight) * (1 if part.symmetric else 2)
            floats -= 4 * weight.numel()
        for activation in self.activation_quantizers.values():
            scales += 4 if activation.symmetric else 8
        return Size(
            weight_bytes=weights,
            scale_bytes=scales,
            float_bytes=floats,
            total_bytes=weights + scales + floats,
            fp32_bytes=self._fp32_bytes,
        )


def stored_bytes(network: GraphModule) -> int:
    """Bytes of the floating-point tensors a graph reads, at 4 bytes a number; quantizers' own do not count."""
    own = tuple(
        name for name, part in network.named_modules() if isinstance(part, (WeightQuantizer, ActivationQuantizer))
    )
    nodes = {node.target: node for node in network.graph.find_nodes(op="get_attr")}
    tensors = [stored(network, node) for path, node in nodes.items() if path.rpartition(".")[0] not in own]
    return sum(4 * tensor.numel() for tensor in tensors if tensor.is_floating_point())
