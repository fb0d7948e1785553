"""Fill a results file: networks x methods x bits x seeds under one recipe, cell by cell, resumable.

    python benchmarks/rows.py benchmarks/cifar10.toml [--only TEXT ...]

Each cell is what `mirageq quantize NETWORK --recipe RECIPE --method METHOD --bits BITS --seed SEED` computes, and then
`mirageq evaluate`; the images of a (network, method, seed) are made once and serve every bit-width. A finished cell is
a line of `benchmarks/results/NAME.jsonl` and is not computed again; delete the line to repeat it.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from mirageq import recipe
from mirageq.data import open_images
from mirageq.evaluate import accuracy
from mirageq.images import SyntheticSet
from mirageq.journal import Journal
from mirageq.run import NetworkChoice, Run, load_teacher

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "shared" / "data"
sys.path.insert(0, str(HERE.parent))
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="compute the cells whose label contains all of these")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"), help="where images are kept")
    options = parser.parse_args()
    plan = recipe.read(str(options.plan))
    results = HERE / "results" / f"{options.plan.stem}.jsonl"
    results.parent.mkdir(exist_ok=True)
    done = {json.loads(line)["label"] for line in results.read_text().splitlines()} if results.exists() else set()
    for cell in cells(plan):
        if cell["label"] not in done and all(text in cell["label"] for text in options.only):
            console.rule(cell["label"])
            row = compute(plan, cell, options.work / plan.get("images_of", options.plan.stem))
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            console.print(
                f"{row['label']}: {row['top1']:.2f} (full precision {row['full_precision']:.2f})", highlight=False
            )


def cells(plan: recipe.Table) -> list[recipe.Table]:
    """Every combination; `label` names it. A plan's `variants` are named lists of settings for the same images."""
    variants = plan.get("variants", {"": []})
    combinations = [
        {
            "network": network,
            "method": method,
            "bits": bits,
            "seed": seed,
            "label": f"{network} {method} {bits} seed{seed}",
        }
        for network in plan["networks"]
        for seed in plan["seeds"]
        for method in plan["methods"]
        for bits in plan["bits"]
    ]
    return [
        {**cell, "variant": name, "label": f"{cell['label']} {name}".strip()}
        for cell in combinations
        for name in variants
    ]


def compute(plan: recipe.Table, cell: recipe.Table, work: Path) -> recipe.Table:
    choice = NetworkChoice(name=f"py:{HERE / 'networks.py'}:{cell['network']}")
    teacher = load_teacher(choice)
    table = {**recipe.read(plan["recipe"]), "method": method_table(plan, cell["method"])}
    table = recipe.set_bits(table, cell["bits"])
    images = work / f"{cell['network']}-{cell['method']}-seed{cell['seed']}"
    started = time.perf_counter()
    if not (images / "synthetic.safetensors").exists():
        paint(table, images, choice, cell["seed"], teacher)
    synthesis = json.loads((images / "seconds.json").read_text())
    stored = {"name": "mirageq.methods.stored:Stored", "path": str(images / "synthetic.safetensors")}
    with tempfile.TemporaryDirectory() as folder:
        table = recipe.assign({**table, "method": stored}, plan.get("variants", {}).get(cell["variant"], []))
        run = Run.create(Path(folder) / "run", choice, recipe.build(table), cell["seed"], teacher)
        result = run.execute(teacher, console)
        record = run.record
    data = open_images(DATA / plan["data"], teacher.image_shape)
    tuned = accuracy(result.student, data, teacher.mean, teacher.std)
    return {
        **cell,
        "full_precision": full_precision(plan["data"], choice),
        "top1": tuned.top1,
        "top5": tuned.top5,
        "standard_error": tuned.standard_error,
        "count": tuned.count,
        "recipe": {**recipe.describe(recipe.build(table)), "method": method_table(plan, cell["method"])},
        "network_sha256": record["network"]["sha256"],
        "images_sha256": record["images"]["sha256"],
        "versions": record["versions"],
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout.strip(),
        "seconds": {**record["seconds"], "synthesize": synthesis, "wall": time.perf_counter() - started},
        "peak_memory_bytes": record["peak_memory_bytes"],
        "size": record["student"]["total_bytes"],
    }


@functools.cache
def full_precision(data: str, choice: NetworkChoice) -> float:
    """Top-1 of the network as it is."""
    teacher = load_teacher(choice)
    return accuracy(teacher, open_images(DATA / data, teacher.image_shape), teacher.mean, teacher.std).top1


def paint(table: recipe.Table, folder: Path, choice: NetworkChoice, seed: int, teacher) -> None:
    """Make the images of a (network, method, seed) once, resuming what an interrupted call left."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted, started = recipe.build(table), time.perf_counter()
    source = wanted.method.synthesize(teacher, wanted.images, seed=seed, journal=Journal(folder, console))
    if not (folder / "synthetic.safetensors").exists():
        sample = source.sample(wanted.images)
        SyntheticSet(sample.images, sample.labels).save(folder / "synthetic.safetensors")
    (folder / "seconds.json").write_text(json.dumps(time.perf_counter() - started))


def method_table(plan: recipe.Table, method: str) -> recipe.Table:
    """The method's section; a relative `path` in it is one of the measurement files."""
    section = {"name": method, **plan["methods"][method]}
    return {**section, "path": str(DATA / section["path"])} if "path" in section else section


if __name__ == "__main__":
    main()
