"""What people look at: contact sheets and loss curves."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from mirageq.images import Batch
from mirageq.journal import read_history

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Curves = dict[str, dict[str, list[tuple[int, float]]]]


def to_pixels(images: Tensor, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Tensor:
    """Normalised images (N, C, H, W) -> pixels in [0, 1]: exact where the normalisation is known, else stretched."""
    if mean is None or std is None:
        low = images.amin((1, 2, 3), keepdim=True)
        return (images - low) / (images.amax((1, 2, 3), keepdim=True) - low).clamp_min(1e-6)
    shape = (1, -1, 1, 1)
    return (images * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)).clamp(0, 1)


def contact_sheet(
    batch: Batch,
    path: Path,
    *,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    rows: int = 10,
    per_class: int = 8,
) -> None:
    """Write a PNG of at most `rows` x `per_class` images in the order of their classes, at most `per_class` of each."""
    chosen: list[int] = []
    for label in batch.labels.unique().tolist():
        chosen += (batch.labels == label).nonzero().flatten()[:per_class].tolist()
    chosen = chosen[: rows * per_class]
    pixels = to_pixels(batch.images[chosen], mean, std)
    lines, size = -(-len(chosen) // per_class), 1.1 if pixels.shape[-1] < 100 else 1.6
    figure, axes = plt.subplots(lines, per_class, figsize=(per_class * size, lines * (size + 0.2)), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, label in zip(axes.flat, pixels, batch.labels[chosen].tolist(), strict=False):
        axis.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray" if image.shape[0] == 1 else None)
        axis.set_title(f"class {label}", fontsize=7, pad=2)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def loss_curves(history: Path, path: Path) -> None:
    """Write a PNG with the loss terms of synthesis (all batches over one another) and of tuning."""
    curves = _curves(read_history(history))
    painting = {stage: terms for stage, terms in curves.items() if stage.startswith("images")}
    panels = [("synthesis, one line a batch", painting)] if painting else []
    if "tune" in curves:
        panels.append(("tuning", {"tune": curves["tune"]}))
    figure, axes = plt.subplots(1, max(len(panels), 1), figsize=(6 * max(len(panels), 1), 4), squeeze=False)
    for axis, (title, stages) in zip(axes[0], panels, strict=False):
        _draw(axis, title, stages)
    if not panels:
        axes[0][0].set_title("this run has no losses")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw(axis: plt.Axes, title: str, stages: dict[str, dict[str, list[tuple[int, float]]]]) -> None:
    names = sorted({name for terms in stages.values() for name in terms if name != "lr"})
    for color, name in enumerate(names):
        label: str | None = name
        for terms in stages.values():
            points = [(step, value if value > 0 else math.nan) for step, value in terms.get(name, [])]
            if any(value > 0 for _, value in points):
                axis.plot(*zip(*points, strict=True), color=f"C{color}", lw=1, alpha=0.8, label=label)
                label = None  # one entry in the legend for all lines of a term
    axis.set(title=title, xlabel="step", ylabel="weighted loss term", yscale="log")
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend()


def _curves(history: list[dict]) -> Curves:
    """History rows regrouped for plotting: stage -> term -> [(step, value)]."""
    result: Curves = {}
    for row in history:
        if row["stage"] != "note":
            for name, value in row.items():
                if name not in ("stage", "step"):
                    result.setdefault(row["stage"], {}).setdefault(name, []).append((row["step"], value))
    return result
