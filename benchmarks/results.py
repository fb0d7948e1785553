"""Write `benchmarks/RESULTS.md` from the comparisons in `benchmarks/results/`: python benchmarks/results.py

`RESULTS.in.md` is the text; a line `{{accuracy NAME}}`, `{{images NAME}}` or `{{protocol NAME}}` stands for a table or
the protocol of the comparison in `results/NAME`, `{{picture NAME FILE}}` for one of its pictures, and `{{packs}}` and
`{{exports}}` for what `packs.py` and `export_speed.py` measured.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from mirageq.compare import Comparison
from mirageq.tables import accuracy_table, image_table

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def main() -> None:
    text = (HERE / "RESULTS.in.md").read_text()
    (HERE / "RESULTS.md").write_text(re.sub(r"\{\{(\w+) ?([^}]*)\}\}", lambda found: fill(*found.groups()), text))


def fill(what: str, argument: str) -> str:
    if what == "picture":
        name, file = argument.split()
        return f"![{file} of {name}](results/{name}/{file})"
    if what in ("packs", "exports"):
        rows = [json.loads(line) for line in (RESULTS / f"{what}.jsonl").read_text().splitlines()]
        return packs(rows) if what == "packs" else exports(rows)
    comparison = Comparison.open(RESULTS / argument)
    if what == "protocol":
        return comparison.protocol.sentences()
    table = {"accuracy": accuracy_table, "images": image_table}[what]
    return table(comparison.rows())


def packs(rows: list[dict]) -> str:
    """Networks x tools against the source of the calibration images: top-1."""
    lines = [
        "| network | tool | full precision | noise | IntraQ | real | IntraQ minus real |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for network in dict.fromkeys(row["network"] for row in rows):
        ours = {(row["tool"], row["images_from"]): row["top1"] for row in rows if row["network"] == network}
        for tool in dict.fromkeys(tool for tool, source in ours if source):
            noise, intraq, real = (ours[tool, source] for source in ("noise", "intraq", "real"))
            figures = (ours["full precision", ""], noise, intraq, real, intraq - real)
            lines.append(f"| {network} | {tool} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")
    return "\n".join(lines)


def exports(rows: list[dict]) -> str:
    """Networks x bits x runtimes: agreement with the student, latency, sizes."""
    lines = [
        "| network | bits | runtime | same class | same logits | in float64 | ms | in float | faster | MB | in float |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        for proof in row["verifications"]:
            shares = " | ".join(f"{proof[name]:.1f} %" for name in ("agreement", "exact", "float_agreement"))
            speedup = proof["float_milliseconds"] / proof["milliseconds"]
            bits = row["bits"] + (", tuned" if row.get("tuned") else "")
            lines.append(
                f"| {row['network']} | {bits} | {proof['runtime']} | {shares} | {proof['milliseconds']:.2f} | "
                f"{proof['float_milliseconds']:.2f} | {speedup:.2f} | {row['file_bytes'] / 1e6:.2f} | "
                f"{row['float_file_bytes'] / 1e6:.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
