"""The label-conditioned generator, and the settings of its training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirageq.errors import (
    UserError,
    check_choices,
    check_crop_scale,
    check_fraction,
    check_not_negative,
    check_positive,
)
from mirageq.precision import Precision

LEAK = 0.2
OFFICIAL_EPS = 0.8


@dataclass(frozen=True, kw_only=True)
class GeneratorTraining:
    """Settings of a generator and its training, those of GDFQ's code for CIFAR-100 by default.

    Attributes:
        warmup: generator updates before the student sees an image.
        batch_size: images of a warm-up update; afterwards the tuner's batch size counts.
        lr: Adam's learning rate, multiplied by `lr_factor` after each of `milestones` updates.
        lr_factor, milestones: of the rate's schedule.
        latent: length of the noise vector.
        width: channels of the trunk.
        conditioning: where the class enters: "embedding" multiplies the noise (CIFAR), "norm" gives each class its own
            scale and shift in the inner BatchNorms (ImageNet).
        class_weight: of the cross-entropy with the class an image is made for.
        bn_weight: of the BatchNorm alignment.
        last_bn_weight: of further alignment at the last BatchNorm alone (ClusterQ's released code amounts to 0.075).
        crop_probability: chance, per update, that the teacher sees the batch through random crops and flips.
        crop_scale: smallest area of a crop.
        precision: "bfloat16" runs generator and teacher under autocast, where the device has such instructions.
    """

    endless: ClassVar[bool] = True

    warmup: int = 800
    batch_size: int = 200
    lr: float = 1e-3
    lr_factor: float = 0.1
    milestones: tuple[int, ...] = (20_000, 40_000, 60_000)
    latent: int = 100
    width: int = 128
    conditioning: Literal["embedding", "norm"] = "embedding"
    class_weight: float = 1.0
    bn_weight: float = 0.1
    last_bn_weight: float = 0.0
    crop_probability: float = 0.0
    crop_scale: float = 0.8
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(self, "batch_size", "lr", "lr_factor", "latent", "width")
        check_not_negative(self, "warmup", "class_weight", "bn_weight", "last_bn_weight")
        check_crop_scale(self.crop_scale)
        check_fraction(self, "crop_probability")


class Generator(nn.Module):
    """(noise, labels) -> images: a quarter-size map is doubled twice, with three convolutions between.

    Its BatchNorms always use the batch's own statistics, as the official code never leaves training mode; they keep
    that code's eps of 0.8, which a positional argument put there. The last one, without scale and shift, makes the
    images' channels zero-mean and unit-variance: the normalised input space.
    """

    def __init__(self, classes: int, image_shape: tuple[int, int, int], settings: GeneratorTraining) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.classes, self.size = classes, (height, width)
        self.start = (settings.width, -(-height // 4), -(-width // 4))
        conditional = settings.conditioning == "norm"
        half = max(settings.width // 2, 1)
        self.embedding = None if conditional else nn.Embedding(classes, settings.latent)
        self.project = nn.Linear(settings.latent, self.start[0] * self.start[1] * self.start[2])
        self.conv1 = nn.Conv2d(settings.width, settings.width, 3, padding=1)
        self.conv2 = nn.Conv2d(settings.width, half, 3, padding=1)
        self.conv3 = nn.Conv2d(half, channels, 3, padding=1)
        self.norms = nn.ModuleList(
            _ClassNorm(size, classes if conditional else 1, eps)
            for size, eps in ((settings.width, 1e-5), (settings.width, OFFICIAL_EPS), (half, OFFICIAL_EPS))
        )

    @staticmethod
    @torch.no_grad()
    def drawn(
        classes: int, image_shape: tuple[int, int, int], settings: GeneratorTraining, generator: torch.Generator
    ) -> Generator:
        """A new network with starting weights from `generator`, in the ranges PyTorch's layers use."""
        with torch.device("meta"):  # the layers' own initialisation would use global random state
            network = Generator(classes, image_shape, settings)
        network.to_empty(device="cpu")
        for layer in network.modules():
            if isinstance(layer, nn.Embedding):
                layer.weight.normal_(generator=generator)
            elif isinstance(layer, (nn.Linear, nn.Conv2d)):
                bound = layer.weight[0].numel() ** -0.5
                for parameter in layer.parameters():
                    parameter.uniform_(-bound, bound, generator=generator)
            elif isinstance(layer, _ClassNorm):
                layer.scale.fill_(1)
                layer.shift.zero_()
        return network

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        if int(labels.max()) >= self.classes:
            raise UserError(
                f"The generator knows {self.classes} classes, and was asked for class {int(labels.max())}. "
                "Train a generator for this network."
            )
        if self.embedding is not None:
            noise, labels = noise * self.embedding(labels), torch.zeros_like(labels)
        height, width = self.size
        x = self.project(noise).unflatten(1, self.start).contiguous(memory_format=torch.channels_last)
        x = self.norms[0](x, labels)
        x = convolve_doubled(x, self.conv1)[:, :, : -(-height // 2), : -(-width // 2)]
        x = F.leaky_relu(self.norms[1](x, labels), LEAK, inplace=True)
        x = convolve_doubled(x, self.conv2)[:, :, :height, :width]
        x = F.leaky_relu(self.norms[2](x, labels), LEAK, inplace=True)
        return F.batch_norm(self.conv3(x).tanh().float(), None, None, training=True)


def convolve_doubled(x: Tensor, convolution: nn.Conv2d) -> Tensor:
    """What a 3x3 convolution with a border of 1 makes of `x` (N, C, H, W) at twice the size, each pixel shown as 2x2.

    Taps that read one pixel are added first: a transposed convolution by a 4x4 kernel, in 4/9 of the multiplications.
    """
    kernel = F.avg_pool2d(convolution.weight, 2, stride=1, padding=1, divisor_override=1).flip(2, 3).transpose(0, 1)
    return F.conv_transpose2d(x, kernel, convolution.bias, stride=2, padding=1)


class _ClassNorm(nn.Module):
    """Batch normalisation with a scale and shift for each class (de Vries et al., 2017); one class makes it plain."""

    def __init__(self, size: int, classes: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scale, self.shift = nn.Parameter(torch.ones(classes, size)), nn.Parameter(torch.zeros(classes, size))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        if len(self.scale) == 1:
            return F.batch_norm(x, None, None, self.scale[0], self.shift[0], training=True, eps=self.eps)
        normal = F.batch_norm(x, None, None, training=True, eps=self.eps)
        scale, shift = (table[labels][:, :, None, None] for table in (self.scale, self.shift))
        return torch.addcmul(shift.to(x.dtype), normal, scale.to(x.dtype))
