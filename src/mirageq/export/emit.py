"""A student's graph with its quantizers replaced by the ONNX operations that compute the same integers.

    weight      DequantizeLinear(integer initialiser, scale, zero point), per output channel
    activation  QuantizeLinear -> Clip (if codes end inside the container) -> DequantizeLinear, per tensor
    bias        DequantizeLinear(int32 initialiser, s_x * s_w)

A code of k < 8 bits lies in an 8-bit container; the clip keeps it in its k bits, and does what a ReLU6 in front did.
ONNX Runtime, OpenVINO and TensorRT each fuse such pairs around an operation into its integer kernel. Where OpenVINO
fuses a convolution with the sum behind it, the convolution's own codes are clipped but no longer rounded; for it they
are written as Div, Round, Clip and Mul, which it keeps, behind the same integer kernel.
"""

# fx types an argument of a node as a union of everything:
# mypy: disable-error-code="union-attr, arg-type, operator, return-value"

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from mirageq.errors import UserError
from mirageq.graph import WEIGHTED, argument, kind, stored
from mirageq.quant import Student
from mirageq.quant.fake_quant import grid
from mirageq.quant.operations import CLAMPS, limits
from mirageq.quant.quantizers import ActivationQuantizer, BiasQuantizer, WeightQuantizer

OPSET = 21


@dataclass(frozen=True)
class Profile:
    """What a runtime wants of a QDQ file.

    Attributes:
        name: of the profile.
        runtime: that must agree with the student; None where only its own hardware runs it.
        symmetric: activations must be signed with zero point 0.
        clips: codes are cut off behind QuantizeLinear; otherwise they fill their container, and a clamp whose limits
            are not the container's stays in float in front of it.
        integer_bias: biases as int32 in steps of the accumulator; otherwise their rounded values in float.
        rounds_before_sums: a layer's output that a sum reads is rounded in float operations, because the runtime would
            leave it unrounded.
        other_kernels: the runtime has integer kernels of softmax, and of averages over a padded rim, that give other
            codes; so what follows them is rounded in float operations.
    """

    name: str
    runtime: str | None
    symmetric: bool = False
    clips: bool = True
    integer_bias: bool = True
    rounds_before_sums: bool = False
    other_kernels: bool = False

    @property
    def fewest_bits(self) -> int:
        """Of an activation."""
        return 2 if self.clips else 8


PROFILES = {
    "ort": Profile("ort", "onnxruntime", other_kernels=True),
    "openvino": Profile("openvino", "openvino", rounds_before_sums=True),
    "tensorrt": Profile("tensorrt", None, symmetric=True, clips=False, integer_bias=False),
}


def integer_network(student: Student, profile: Profile) -> GraphModule:
    """Images -> logits with ONNX quantization operations, ready for `torch.onnx.export`.

    Raises:
        UserError: the student is not calibrated, or its grids are not what the profile's runtime takes.
    """
    _check(student, profile)
    network = student.logits_network()
    graph = network.graph
    parts = {node: network.get_submodule(node.target) for node in graph.find_nodes(op="call_module")}
    biases = student.integer_biases()
    for node, part in parts.items():  # biases first: they read what takes the place of their weights' quantizers
        if isinstance(part, BiasQuantizer):
            values, step = biases[part.name]
            exact = _IntegerBias(values, step) if profile.integer_bias else _FloatBias(part, values, step)
            _replace(network, node, exact, f"bias_{node.name}")
    for node, part in parts.items():
        if isinstance(part, WeightQuantizer):
            integer = _IntegerWeight(part, stored(network, node.args[0]))
            for reader in list(node.users):
                if reader.args[1] == 0:
                    _replace(network, reader, integer, f"weight_{node.name}")
        elif isinstance(part, ActivationQuantizer):
            source, *bounds = rounded_by(node, part, profile.clips)
            node.update_arg(0, source)
            in_float = profile.rounds_before_sums and feeds_sum(source, node)
            in_float = in_float or (profile.other_kernels and _has_another_kernel(source))
            network.set_submodule(node.target, (_RoundedActivation if in_float else _IntegerActivation)(part, *bounds))
    graph.eliminate_dead_code()
    graph.lint()
    return GraphModule(network, graph).eval()


def packable(network: GraphModule, bits: int) -> set[str]:
    """The names of the integer weights that fit in `bits` bits, as `torch.onnx.export` calls them."""
    return {
        f"{name}.codes"
        for name, part in network.named_modules()
        if isinstance(part, _IntegerWeight) and part.bits <= bits
    }


def _check(student: Student, profile: Profile) -> None:
    for name, part in student.activation_quantizers.items():
        if not part.ready:
            raise UserError(f"The activation '{name}' has no range yet; calibrate the student before exporting it.")
        if part.bits < profile.fewest_bits:
            raise UserError(
                f"The profile '{profile.name}' takes activations of at least {profile.fewest_bits} bits, and '{name}' "
                f"has {part.bits}. Use the profile 'ort', or quantize to 8 bits."
            )
        if profile.symmetric and not part.symmetric:
            raise UserError(
                f"The profile '{profile.name}' takes symmetric grids only, and the activation '{name}' has a zero "
                "point. Quantize with scheme.activation_symmetric=true."
            )


def rounded_by(node: Node, quantizer: ActivationQuantizer, clips: bool = True) -> tuple[Node, int, int]:
    """What a quantizer at `node` rounds, and the smallest and the largest code that it gives.

    A clamp that it alone reads is left out: rounding keeps the order, so codes cut off where the clamp's limits are
    rounded to are the same, and a clamp between a convolution and its quantizer would keep the convolution in float.
    Without `clips` this is done only where the grid ends there anyway.
    """
    clamp, ends = node.args[0], grid(quantizer.bits, quantizer.symmetric)
    if kind(clamp) not in CLAMPS or len(clamp.users) > 1:
        return clamp, *ends
    cut = torch.tensor(limits(clamp), device=quantizer.scale.device)  # type: ignore[union-attr]
    codes = torch.round(cut / quantizer.scale.detach()) + quantizer.zero_point  # type: ignore[operator]
    if codes.isnan().any():
        return clamp, *ends
    low, high = codes.clamp(*ends).int().tolist()
    return (clamp.args[0], low, high) if clips or (low, high) == ends else (clamp, *ends)


def feeds_sum(source: Node, quantizer: Node) -> bool:
    """Whether what lies between a layer and its only reader, a sum, is this quantizer; `source` is what it rounds."""
    return source.target in WEIGHTED and [kind(reader) for reader in quantizer.users] == ["add"]


def _has_another_kernel(source: Node) -> bool:
    """Whether the integer kernel of an operation gives other codes than its float kernel and rounding do."""
    rim = argument(source, 4, "ceil_mode", False) and argument(source, 5, "count_include_pad", True)
    return kind(source) in ("softmax", "_softmax") or (kind(source) == "avg_pool2d" and rim)


def _replace(network: GraphModule, node: Node, part: nn.Module, name: str) -> None:
    """Let the readers of `node` read `part()` instead."""
    network.add_submodule(name, part)
    graph: Graph = network.graph
    with graph.inserting_before(node):
        new = graph.call_module(name, ())
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)


def _symbolic(
    operation: str, inputs: tuple[Tensor, ...], like: Tensor, dtype: torch.dtype, **attributes: int
) -> Tensor:
    result: Tensor = torch.onnx.ops.symbolic(
        operation, inputs, attributes, dtype=dtype, shape=like.shape, version=OPSET
    )
    return result


class _RoundedActivation(nn.Module):
    def __init__(self, quantizer: ActivationQuantizer, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.scale, self.zero_point = float(quantizer.scale), float(quantizer.zero_point)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.round(x / self.scale) + self.zero_point
        return (codes.clamp(self.low, self.high) - self.zero_point) * self.scale


class _IntegerActivation(nn.Module):
    def __init__(self, quantizer: ActivationQuantizer, low: int, high: int) -> None:
        super().__init__()
        self.container = torch.int8 if quantizer.symmetric else torch.uint8
        self.clip = (low, high) != grid(8, quantizer.symmetric)
        self.register_buffer("scale", quantizer.scale.detach().clone())  # type: ignore[operator]
        for name, value in (("zero_point", int(quantizer.zero_point)), ("low", low), ("high", high)):
            self.register_buffer(name, torch.tensor(value, dtype=self.container))

    def forward(self, x: Tensor) -> Tensor:
        codes = _symbolic("QuantizeLinear", (x, self.scale, self.zero_point), x, self.container)
        if self.clip:
            codes = _symbolic("Clip", (codes, self.low, self.high), x, self.container)
        return _symbolic("DequantizeLinear", (codes, self.scale, self.zero_point), x, torch.float32)


class _IntegerWeight(nn.Module):
    def __init__(self, quantizer: WeightQuantizer, weight: Tensor) -> None:
        super().__init__()
        self.bits = quantizer.bits
        container = torch.int8 if quantizer.symmetric else torch.uint8
        scale, zero_point = quantizer.affine(weight)
        self.register_buffer("codes", quantizer.codes(weight).to(container))
        self.register_buffer("scale", scale.detach().flatten().clone())
        self.register_buffer("zero_point", zero_point.detach().flatten().to(container))

    def forward(self) -> Tensor:
        inputs = (self.codes, self.scale, self.zero_point)
        return _symbolic("DequantizeLinear", inputs, self.codes, torch.float32, axis=0)


class _IntegerBias(nn.Module):
    def __init__(self, bias: Tensor, step: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", torch.round(bias.detach() / step).to(torch.int32))
        self.register_buffer("scale", step)

    def forward(self) -> Tensor:
        return _symbolic("DequantizeLinear", (self.codes, self.scale), self.codes, torch.float32, axis=0)


class _FloatBias(nn.Module):
    def __init__(self, rounding: BiasQuantizer, bias: Tensor, step: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", rounding(bias.detach(), step, torch.ones_like(step)))

    def forward(self) -> Tensor:
        return self.values.clone()
