"""What lies in the folder of a run or of a comparison, told in tables and drawn beside its files."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from mirageq.compare import Comparison, joined
from mirageq.run import Run
from mirageq.tables import page

console = Console()

SHOWN = 1000  # images looked through for the contact sheet


def show_run(run: Run) -> None:
    """Print a run's summary; draw its contact sheet and its loss curves."""
    from mirageq.report import contact_sheet, loss_curves

    summarise(run)
    sheet, curves = run.folder / "images.png", run.folder / "curves.png"
    loss_curves(run.folder, curves)
    print(f"wrote {curves}")
    contact_sheet(run.images().sample(SHOWN), sheet, mean=run.choice.mean, std=run.choice.std)
    print(f"wrote {sheet}")


def summarise(run: Run) -> None:
    """Print what a run is, and what it cost if it is finished."""
    record = run.record
    grid = Grid(box=None, show_header=False, pad_edge=False)
    grid.add_row("network", escape(record["network"]["name"]))
    scheme = "" if record["only_images"] else f" {run.scheme.bits} {run.scheme.placement}"
    grid.add_row("recipe", f"{record['recipe']['method']['name']}{scheme}")
    if run.finished:
        if student := record.get("student"):
            grid.add_row(
                "size", f"{student['total_bytes'] / 1e6:.2f} MB, full precision {student['fp32_bytes'] / 1e6:.2f} MB"
            )
        grid.add_row("time", ", ".join(f"{name} {value:.0f} s" for name, value in record["seconds"].items()))
        grid.add_row("memory", f"{record['peak_memory_bytes'] / 2**30:.2f} GiB at most")
    grid.add_row("status", record["status"])
    grid.add_row("folder", escape(str(run.folder)))
    console.print(grid, highlight=False)


def show_comparisons(comparisons: Sequence[Comparison]) -> None:
    """Print the tables of comparisons under one protocol, and write them, with plots, into the first one's folder.

    Raises:
        UserError: two of them differ in their protocol.
    """
    from mirageq.report import write_comparison

    first, *others = comparisons
    rows, features = joined(comparisons), {} if others else first.features()
    print(page(first.protocol, rows))
    print(f"wrote {', '.join(map(str, write_comparison(first.protocol, rows, first.folder, features)))}")
