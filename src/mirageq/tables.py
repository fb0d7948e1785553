"""Tables of a comparison: from finished cells to markdown and plain numbers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table as Grid

from mirageq.export import Delivery
from mirageq.export.verify import EXACT_PRODUCTS
from mirageq.protocol import Protocol

Row = dict[str, Any]


def source_of(row: Row) -> str:
    """What a row of a table is called: the method, and the variant if there is one."""
    return f"{row['method']} {row.get('variant', '')}".strip()


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def accuracy_table(rows: Sequence[Row]) -> str:
    """Markdown: a line for each source of images, and for each bit-width top-1 over seeds, its drop, and the KL.

    The divergence from the teacher (KL) has a column where every row tells it.
    """
    bits = _in_order(row["bits"] for row in rows)
    figures = ["top-1", "drop", "KL"] if _diverging(rows) else ["top-1", "drop"]
    lines = [
        "| images from | " + " | ".join(f"{name} " + " | ".join(figures) for name in bits) + " |",
        "| --- |" + " ---: |" * len(bits) * len(figures),
    ]
    for source in _in_order(source_of(row) for row in rows):
        ours = [[row for row in rows if source_of(row) == source and row["bits"] == name] for name in bits]
        lines.append(f"| {source} | " + " | ".join(" | ".join(_figures(cell)[: len(figures)]) for cell in ours) + " |")
    return "\n".join(lines)


def image_table(rows: Sequence[Row]) -> str:
    """Markdown: what each source's images are like to the teacher, and what they cost on the first row's device."""
    lines = [
        "| images from | recognised, % | intra-class distance | silhouette | seconds to make | seconds to tune |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for source in _in_order(source_of(row) for row in rows):
        ours = [row for row in rows if source_of(row) == source]
        figures = [
            _mean([row["images"][name] for row in ours], digits)
            for name, digits in (("recognised", 1), ("intra_class_distance", 3), ("silhouette", 3))
        ]
        alike = _on_one_device(ours)
        times = [f"{statistics.mean(row['seconds'][name] for row in alike):.0f}" for name in ("synthesize", "tune")]
        lines.append(f"| {source} | " + " | ".join(figures + times) + " |")
    return "\n".join(lines)


def page(protocol: Protocol, rows: Sequence[Row]) -> str:
    """Both tables with their protocol, as markdown."""
    if not rows:
        return f"{protocol.sentences()}\n\nNo cell is finished yet.\n"
    error = max(row["standard_error"] for row in rows)
    divergence = " KL is the divergence from the teacher's probabilities, in nats an image." if _diverging(rows) else ""
    memory = max(row["peak_memory_bytes"] for row in _on_one_device(rows)) / 2**30
    return (
        f"{protocol.sentences()}\n\n{accuracy_table(rows)}\n\n"
        f"`±` is the standard deviation over seeds; the binomial error of one figure is at most {error:.2f}."
        f"{divergence} Peak memory {memory:.1f} GiB.\n\n{image_table(rows)}\n"
    )


def summary(rows: Sequence[Row]) -> list[Row]:
    """Plain numbers: one entry for each source and bit-width."""
    entries = []
    for source in _in_order(source_of(row) for row in rows):
        for bits in _in_order(row["bits"] for row in rows):
            ours = [row for row in rows if source_of(row) == source and row["bits"] == bits]
            if ours:
                mean, spread = mean_and_spread([row["top1"] for row in ours])
                entry = {
                    "images_from": source,
                    "bits": bits,
                    "top1": mean,
                    "spread": spread,
                    "seeds": len(ours),
                    "drop": ours[0]["full_precision"] - mean,
                }
                if _diverging(ours):
                    entry["divergence"] = statistics.mean(row["divergence"] for row in ours)
                entries.append(entry)
    return entries


def describe(delivery: Delivery) -> list[str | Grid]:
    """What there is to say of an exported file, for the terminal."""
    sizes = Grid("bytes of", "MB", box=None, pad_edge=False)
    for name, count in (
        ("the student, weights in exactly their bits", delivery.logical_bytes),
        ("the file's tensors, integers in their containers", delivery.container_bytes),
        ("the file", delivery.file_bytes),
        ("the full-precision network as a file", delivery.float_file_bytes),
    ):
        sizes.add_row(name, f"{count / 1e6:.2f}")
    proofs = Grid(
        "proved in",
        "images",
        "same class",
        "same logits",
        "as in float64",
        "ms",
        "ms in float",
        "faster",
        box=None,
        pad_edge=False,
    )
    for proof in delivery.verifications:
        proofs.add_row(
            proof.runtime,
            str(proof.count),
            f"{proof.agreement:.1f} %",
            f"{proof.exact:.1f} %",
            f"{proof.float_agreement:.1f} %",
            f"{proof.milliseconds:.2f}",
            f"{proof.float_milliseconds:.2f}",
            f"{proof.speedup:.2f}x",
        )
    told = [f"left in float: {name}: {reason}" for name, reason in delivery.left_in_float]
    if delivery.profile == "ort":
        told.append(
            "on a processor without VNNI give ONNX Runtime the session option "
            f"{'='.join(EXACT_PRODUCTS)}, as here: it cuts off sums of 8-bit products otherwise"
        )
    structure = f"the profile '{delivery.profile}' is checked for its structure only"
    return [sizes, "", proofs if delivery.verifications else structure, "", *told, f"wrote {delivery.path}"]


def _on_one_device(rows: Sequence[Row]) -> list[Row]:
    """Those computed on the device of the first row: seconds and memory of a processor and of a GPU do not mix."""
    devices = [row.get("machine", {}).get("device", "cpu") for row in rows]
    return [row for row, device in zip(rows, devices, strict=True) if device == devices[0]]


def _diverging(rows: Sequence[Row]) -> bool:
    """Whether every row tells its divergence from the teacher."""
    return all(row.get("divergence") is not None for row in rows)


def _figures(rows: Sequence[Row]) -> list[str]:
    """Top-1, drop and divergence of cells that differ in their seed alone."""
    if not rows:
        return ["-"] * 3
    mean, spread = mean_and_spread([row["top1"] for row in rows])
    seeds = f" ± {spread:.2f} ({len(rows)} seeds)" if len(rows) > 1 else " (1 seed)"
    drop = rows[0]["full_precision"] - mean
    return [f"{mean:.2f}{seeds}", f"{drop:.2f}", _mean([row.get("divergence") for row in rows], 3)]


def _mean(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.{digits}f}" if known else "-"


def _in_order(values: Any) -> list[str]:
    """Each value once, in the order of its first appearance."""
    return list(dict.fromkeys(values))
