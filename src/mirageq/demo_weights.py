"""The demo's EfficientNet-Lite0: from the names in its PyPI package to timm's `tf_efficientnet_lite0`."""

from __future__ import annotations

from torch import Tensor, nn

OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
EXPANDING = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
"""A block without expansion: the first one."""


def to_timm_names(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The package's tensors under the names of timm's `model`, which numbers blocks stage by stage."""
    places = [f"blocks.{stage}.{block}" for stage, blocks in enumerate(model.blocks) for block in range(len(blocks))]  # type: ignore[arg-type]
    renamed = {}
    for key, tensor in state.items():
        parts = key.split(".")
        if parts[0] != "_blocks":
            renamed[".".join([OUTSIDE[parts[0]], *parts[1:]])] = tensor
            continue
        index, layer = int(parts[1]), parts[2]
        names = EXPANDING if f"_blocks.{index}._expand_conv.weight" in state else PLAIN
        renamed[".".join([places[index], names[layer], *parts[3:]])] = tensor
    return renamed
