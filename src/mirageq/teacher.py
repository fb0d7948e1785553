"""The frozen full-precision network, validated once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from mirageq.capture import capture, on_device
from mirageq.errors import UserError, first_line
from mirageq.graph import batch_norms, device_of, is_stored, running_statistics, stored
from mirageq.observe import Observation, Observer


@dataclass(frozen=True)
class BatchNormStatistics:
    """What a batch normalisation remembers of its training inputs: per-channel mean and variance, each (C,)."""

    name: str
    mean: Tensor
    var: Tensor


@dataclass(frozen=True)
class Teacher:
    """A frozen copy of a classifier, ready to be asked.

    Make one with `Teacher.wrap`. Images are (N, C, H, W) floats in the network's own normalised input space.

    Attributes:
        network: the captured graph, images -> logits; no gradient reaches its tensors.
        image_shape: (C, H, W).
        classes: number of logits.
        feature_dim: D of the penultimate features.
        batch_norms: the running statistics, in order of computation; empty if the network has none.
        mean, std: the normalisation, per channel for pixels in [0, 1]; None if unknown.
    """

    network: GraphModule
    image_shape: tuple[int, int, int]
    classes: int
    feature_dim: int
    batch_norms: tuple[BatchNormStatistics, ...]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    observe: Observer

    @staticmethod
    @torch.inference_mode(False)  # its tensors are to be learned on, whatever the caller computes in
    def wrap(
        model: nn.Module | ExportedProgram,
        image_shape: tuple[int, int, int],
        *,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        device: str | torch.device = "cpu",
    ) -> Teacher:
        """Copy, freeze and check `model`; the caller's model is not touched.

        Raises:
            UserError: the model cannot be captured, holds non-finite numbers, or does not map images of
                `image_shape` to a matrix of finite logits.
        """
        _check_normalisation(image_shape, mean, std)
        channels, height, width = image_shape
        image_shape = channels, height, width  # it may have come as a list
        network = on_device(capture(model, image_shape), device).requires_grad_(False)
        _check_finite(network)
        _check_norms(network)
        observe = Observer(network)
        seen = _first_look(observe, image_shape, device)
        norms = tuple(
            BatchNormStatistics(name, *(stored(network, value) for value in running_statistics(node)))
            for name, node in zip(observe.names, batch_norms(network.graph), strict=True)
        )
        return Teacher(network, image_shape, seen.logits.shape[1], seen.features.shape[1], norms, mean, std, observe)

    def __call__(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, classes)."""
        return self.network(images)

    @property
    def device(self) -> torch.device:
        return device_of(self.network)

    def require_batch_norms(self, method: str) -> None:
        """Raise a `UserError` unless the network has the running statistics that `method` lives on."""
        if not self.batch_norms:
            raise UserError(
                f"{method} paints images from BatchNorm running statistics, and this network has no BatchNorm layer. "
                "Use a network trained with BatchNorm, before its norms are folded away, or the method 'noise'."
            )

    def pixel_range(self) -> tuple[Tensor, Tensor]:
        """What pixels of 0 and of 1 are once normalised, each (C, 1, 1).

        Raises:
            UserError: the normalisation is unknown.
        """
        if self.mean is None or self.std is None:
            raise UserError("The range of pixels follows from the network's normalisation; give its mean and std.")
        mean, std = (torch.tensor(values, device=self.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return -mean / std, (1 - mean) / std

    def shape_at(self, size: int | None) -> tuple[int, int, int]:
        """The shape (C, H, W) of images of `size` x `size` pixels; None stands for the network's own size.

        Raises:
            UserError: the network does not take them.
        """
        channels, height, width = self.image_shape
        if size is None:
            return self.image_shape
        if not self.takes((channels, size, size)):
            raise UserError(
                f"The network takes images of {height} x {width} pixels and none of {size} x {size}. "
                "Leave method.image_size out."
            )
        return channels, size, size

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether the network has logits for images of this shape (C, H, W)."""
        if shape == self.image_shape:
            return True
        try:
            return self.pseudo_labels(torch.zeros(2, *shape, device=self.device)).shape == (2,)
        except RuntimeError:
            return False

    def pseudo_labels(self, images: Tensor) -> Tensor:
        """The classes (N,) this network assigns to images, for methods that assign none themselves."""
        with torch.no_grad():
            return self(images).argmax(1)


def _check_normalisation(image_shape: tuple[int, ...], mean: tuple | None, std: tuple | None) -> None:
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise UserError(f"An image shape is (channels, height, width), all positive; got {tuple(image_shape)}.")
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != image_shape[0]:
            raise UserError(
                f"{name} must have one number for each of the {image_shape[0]} channels; got {len(values)}: {values}."
            )
        if values is not None and not all(map(math.isfinite, values)):
            raise UserError(f"{name} must be finite in every channel; got {values}.")
    if mean is not None and not all(0 <= value <= 1 for value in mean):
        raise UserError(f"mean is that of pixels in [0, 1]; got {mean}. Divide mean and std of bytes by 255.")
    if std is not None and min(std) <= 0:
        raise UserError(f"std must be positive in every channel; got {std}.")


def _check_finite(network: GraphModule) -> None:
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise UserError(
                f"The network's tensor '{name}' holds {bad} values that are NaN or infinite (of {tensor.numel()}). "
                "Use an undamaged checkpoint."
            )


def _check_norms(network: GraphModule) -> None:
    for node in batch_norms(network.graph):
        if not all(map(is_stored, running_statistics(node))):
            raise UserError(
                f"The batch normalisation '{node.name}' computes its statistics from the images. Use a network whose "
                "norms have stored ones."
            )


def _first_look(observe: Observer, image_shape: tuple[int, int, int], device: str | torch.device) -> Observation:
    """Show the network two blank images to learn its shapes."""
    try:
        with torch.no_grad():
            seen = observe(torch.zeros(2, *image_shape, device=device))
    except Exception as error:
        raise UserError(
            f"The network does not accept images of shape {tuple(image_shape)} (channels, height, width): "
            f"{first_line(error)}. Give the shape it was exported with."
        ) from error
    if seen.logits.dim() != 2 or not seen.logits.is_floating_point():
        raise UserError(
            f"The network must return logits (N, classes); for 2 images it returned a tensor of shape "
            f"{tuple(seen.logits.shape)}. Wrap it so that it classifies whole images."
        )
    if seen.logits.shape[1] < 2:
        raise UserError(
            "The network gives one number for an image, which leaves no classes to compare. Wrap it to return "
            "torch.cat([torch.zeros_like(x), x], 1) for its x: the softmax of these two logits is the sigmoid of x."
        )
    return seen
