"""Write `benchmarks/RESULTS.md` from the rows in `benchmarks/results/`: python benchmarks/table.py"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from mirageq import recipe

HERE = Path(__file__).resolve().parent
Row = dict


def main() -> None:
    parts = [(HERE / "results" / "HEAD.md").read_text()]
    for path in sorted((HERE / "results").glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        intro = (HERE / "results" / f"{path.stem}.md").read_text()
        parts.append(f"{intro}\n{table(rows)}\n\n{costs(path.stem, rows)}\n")
    parts.append((HERE / "results" / "TAIL.md").read_text())
    (HERE / "RESULTS.md").write_text("\n".join(parts))


def table(rows: list[Row]) -> str:
    """Networks x methods (or variants) against bits: top-1, its drop from full precision, its spread over seeds."""
    bits = list(dict.fromkeys(row["bits"] for row in rows))
    lines = [
        "| network | images from | " + " | ".join(f"{name} top-1 | drop" for name in bits) + " |",
        "| --- | --- |" + " ---: | ---: |" * len(bits),
    ]
    for network in dict.fromkeys(row["network"] for row in rows):
        ours = [row for row in rows if row["network"] == network]
        full, count = ours[0]["full_precision"], ours[0]["count"]
        lines.append(
            f"| {network} | (full precision, {count:,} images) | " + " | ".join([f"{full:.2f} | "] * len(bits)) + " |"
        )
        for source in dict.fromkeys(source_of(row) for row in ours):
            cells = [cell([r for r in ours if source_of(r) == source and r["bits"] == name], full) for name in bits]
            lines.append(f"| {network} | {source} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def source_of(row: Row) -> str:
    return f"{row['method']} {row.get('variant', '')}".strip()


def cell(rows: list[Row], full: float) -> str:
    if not rows:
        return "- | -"
    values = [row["top1"] for row in rows]
    mean = statistics.mean(values)
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    seeds = f" ({len(values)} seeds)" if len(values) > 1 else " (1 seed)"
    return f"{mean:.2f}{spread}{seeds} | {full - mean:.2f}"


def costs(plan: str, rows: list[Row]) -> str:
    """What the rows were made with, and what they cost."""
    shown = recipe.describe(recipe.build({**rows[0]["recipe"], "method": {"name": "noise"}}))
    scheme, tuner = shown["scheme"], shown["tuner"]
    synthesis = {row["method"]: row["seconds"]["synthesize"] for row in rows}
    painting = ", ".join(f"{seconds:.0f} s ({method})" for method, seconds in synthesis.items())
    updates = " or ".join(str(steps) for steps in sorted({row["recipe"]["tuner"]["steps"] for row in rows}))
    tuning = statistics.mean(row["seconds"]["tune"] for row in rows)
    memory = max(row["peak_memory_bytes"] for row in rows) / 2**30
    return (
        f"Recipe: {shown['images']} images, {shown['calibration_images']} for the ranges; `{scheme['placement']}` "
        f"placement, weights `{scheme['weight_range']}`, activations `{scheme['activation_range']}`; "
        f"{tuner['batch_size']} images an update, {updates} updates, {tuner['optimizer']} {tuner['lr']:g}.\n"
        f"Wall time on one core of a busy machine: images {painting}, tuning {tuning:.0f} s.\n"
        f"Peak memory {memory:.1f} GiB. "
        f"Binomial error of one figure: ± {max(row['standard_error'] for row in rows):.2f}.\n"
        f"Command: `python benchmarks/rows.py benchmarks/{plan}.toml`."
    )


if __name__ == "__main__":
    main()
