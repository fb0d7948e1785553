"""What people look at: contact sheets, loss curves, and the tables and plots of a comparison."""

from __future__ import annotations

import json
import math
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from mirageq.images import Batch
from mirageq.journal import HISTORY, read_history
from mirageq.protocol import Protocol
from mirageq.tables import Row, mean_and_spread, page, source_of, summary

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

Curves = dict[str, dict[str, list[tuple[int, float]]]]

DRAWN_CLASSES = 10
STAGES = {"generator": "the generator's warm-up", "reconstruct": "reconstruction", "tune": "tuning"}
COLUMNS = 3  # of panels
FEWEST_POINTS = 10  # for a picture of features


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
    if pixels.shape[1] not in (1, 3):
        pixels = pixels.mean(1, keepdim=True)
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


def loss_curves(folder: Path, path: Path) -> None:
    """Write a PNG of a run's loss terms: of synthesis (all batches over one another), of a generator, and of tuning.

    A method that is made of others has the panels of each, under the name of its part.
    """
    panels = []
    for file in sorted(folder.rglob(HISTORY), key=lambda file: (-len(file.parts), file)):  # synthesis before tuning
        curves = _curves(read_history(file))
        of = "" if file.parent == folder else f"{file.parent.relative_to(folder).as_posix()}: "
        painting = {stage: terms for stage, terms in curves.items() if stage.startswith("images")}
        panels += [(f"{of}synthesis, one line a batch", painting)] if painting else []
        panels += [(of + title, {stage: curves[stage]}) for stage, title in STAGES.items() if stage in curves]
    columns = min(max(len(panels), 1), COLUMNS)
    lines = max(-(-len(panels) // COLUMNS), 1)
    figure, axes = plt.subplots(lines, columns, figsize=(6 * columns, 4 * lines), squeeze=False)
    for axis, (title, stages) in zip(axes.flat, panels, strict=False):
        _draw(axis, title, stages)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    if not panels:
        axes[0][0].set_title("this run has no losses")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_comparison(protocol: Protocol, rows: list[Row], folder: Path, features: dict[str, Batch]) -> list[Path]:
    """Write a comparison's `table.md`, `table.json`, `accuracy.png` and `features.png`, as far as there is a row.

    There is no picture of features of fewer than `FEWEST_POINTS` images.

    Returns the paths written.
    """
    written = []
    if rows:
        written = [folder / name for name in ("table.md", "table.json", "accuracy.png")]
        written[0].write_text(page(protocol, rows), "utf-8")
        written[1].write_text(json.dumps(summary(rows), indent=2) + "\n")
        accuracy_plot(rows, written[2])
    shown = _most_frequent_classes(features, DRAWN_CLASSES)
    if sum(len(batch.labels) for batch in shown.values()) >= FEWEST_POINTS:
        written.append(folder / "features.png")
        feature_map(shown, written[-1])
    return written


def accuracy_plot(rows: list[Row], path: Path) -> None:
    """Write a PNG of top-1 against bits, a line for each method with its spread over seeds, and full precision."""
    bits = sorted({row["bits"] for row in rows}, reverse=True)
    figure, axis = plt.subplots(figsize=(1.8 + 1.6 * len(bits), 4.2))
    sources = list(dict.fromkeys(source_of(row) for row in rows))
    for place, source in enumerate(sources):
        points = []
        for index, name in enumerate(bits):
            values = [row["top1"] for row in rows if row["bits"] == name and source_of(row) == source]
            if values:
                points.append((index + 0.04 * (place - len(sources) / 2), *mean_and_spread(values)))
        x, y, spread = zip(*points, strict=True)
        axis.errorbar(x, y, yerr=spread, marker="o", ms=4, lw=1, capsize=3, label=source)
    axis.axhline(rows[0]["full_precision"], color="black", lw=0.8, ls="--", label="full precision")
    axis.set(xticks=range(len(bits)), xticklabels=bits, ylabel="top-1, percent")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def feature_map(shown: dict[str, Batch], path: Path) -> None:
    """Write a PNG of penultimate features in two dimensions, a panel for each method and a colour for each class.

    The axes are the same in all panels: the two directions along which the class means of all panels spread most.
    Labels are below `DRAWN_CLASSES`.
    """
    directions = {name: torch.nn.functional.normalize(batch.images, dim=1) for name, batch in shown.items()}
    means = [
        directions[name][batch.labels == c].mean(0) for name, batch in shown.items() for c in batch.labels.unique()
    ]
    points = torch.stack(means) if len(means) > 2 else torch.cat(list(directions.values()))
    middle = points.mean(0)
    plane = torch.linalg.svd(points - middle, full_matrices=False).Vh[:2]
    columns = min(len(shown), COLUMNS)
    lines = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.4 * columns, 3.2 * lines), squeeze=False, sharex=True, sharey=True
    )
    for axis, (name, batch) in zip(axes.flat, shown.items(), strict=False):
        places = (directions[name] - middle) @ plane.T
        axis.scatter(*places.T.tolist(), c=batch.labels.tolist(), cmap="tab10", s=6, vmin=0, vmax=DRAWN_CLASSES - 1)
        axis.set_title(name, fontsize=9)
    for axis in list(axes.flat)[len(shown) :]:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _most_frequent_classes(features: dict[str, Batch], classes: int) -> dict[str, Batch]:
    """The features of the classes that most images have, with labels from 0 on; without the methods that have none."""
    if not features:
        return {}
    counts = torch.bincount(torch.cat([batch.labels for batch in features.values()]))
    chosen = counts.argsort(descending=True, stable=True)[:classes].sort().values
    shown = {}
    for name, batch in features.items():
        kept = torch.isin(batch.labels, chosen)
        if kept.any():
            shown[name] = Batch(batch.images[kept], torch.searchsorted(chosen, batch.labels[kept]))
    return shown


def _draw(axis: plt.Axes, title: str, stages: dict[str, dict[str, list[tuple[int, float]]]]) -> None:
    blocks = "reconstruct" in stages
    names = sorted({name for terms in stages.values() for name in terms if name != "lr"}, reverse=blocks)
    style = {"ls": "", "marker": "o"} if blocks else {"lw": 1}
    for color, name in enumerate(names):
        label: str | None = name
        for terms in stages.values():
            points = [(step, value if value > 0 else math.nan) for step, value in terms.get(name, [])]
            if any(value > 0 for _, value in points):
                axis.plot(*zip(*points, strict=True), color=f"C{color}", alpha=0.8, label=label, **style)
                label = None  # one entry in the legend for all lines of a term
    along, up = ("block", "mean squared error of its output") if blocks else ("step", "weighted loss term")
    axis.set(title=title, xlabel=along, ylabel=up, yscale="log")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
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
