"""Agreement, latency and size of exported files: python benchmarks/export_speed.py NETWORK [NETWORK ...]

Each network, at W8A8 and W4A4 (first and last layer at 8 bits), is calibrated on 64 real or random images, exported,
and compared on 500 images with its student, and in turns with its full-precision file for latency at batch 1. Networks
without measured weights (`timm:resnet18`) are random: their latency is real, their agreement harder than a trained
network's. Tuned students, which comparisons and runs keep, are exported instead by `--students FILE ...`. Rows go to
benchmarks/results/exports.jsonl.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from mirageq import Scheme, Teacher, models
from mirageq.export import deliver
from mirageq.export.emit import PROFILES
from mirageq.methods.real import Real
from mirageq.models import NetworkChoice, load_teacher
from mirageq.quant import Student, convert
from mirageq.storage import load_student

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "shared" / "data"
FILES = {"cifar10": "cifar10_test.npz", "imagenet": "imagenet_val1300_227.parquet"}
FILES["imagenette"] = "imagenette_val1000_224.parquet"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4])
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--students", nargs="+", type=Path, metavar="FILE", help="of the (one) network, tuned")
    options = parser.parse_args()
    for name in options.networks:
        teacher, images = network_and_images(name, options.count)
        tuned = [load_student(file, teacher) for file in options.students or []]
        for student in tuned or [calibrated(teacher, bits, images[:64]) for bits in options.bits]:
            for runtime in options.runtimes:
                row = {"network": name, "bits": student.scheme.bits, "threads": options.threads, "tuned": bool(tuned)}
                row |= measure(student, teacher, images, runtime, options.threads)
                print(json.dumps(row, indent=1), flush=True)
                with (HERE / "results" / "exports.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")


def calibrated(teacher: Teacher, bits: int, images: torch.Tensor) -> Student:
    """A student that has seen images, and was not tuned."""
    scheme = Scheme(
        weight_bits=bits,
        activation_bits=bits,
        placement="deploy",
        first_last_bits=8,
        weight_range="mse",
        activation_range="mse",
    )
    student = convert(teacher.network, scheme)
    student.calibrate(images.split(16))
    return student


def measure(student, teacher, images, runtime: str, threads: int) -> dict:
    """The figures of the file made for a runtime."""
    (profile,) = (name for name, profile in PROFILES.items() if profile.runtime == runtime)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        delivery = deliver(student, teacher, images, path, profile=profile, runtimes=[runtime], threads=threads)
    return {key: value for key, value in asdict(delivery).items() if key != "path"}


def network_and_images(name: str, count: int):
    """The teacher, and real images for it where there are some."""
    if name.startswith("timm:"):
        torch.manual_seed(0)
        teacher = Teacher.wrap(models.import_timm().create_model(name.partition(":")[2]).eval(), (3, 224, 224))
        return teacher, torch.randn(count, 3, 224, 224)
    teacher = load_teacher(NetworkChoice(name=f"py:{HERE / 'networks.py'}:{name}"))
    file = DATA / FILES[name.partition("_")[0]]
    return teacher, Real(path=str(file)).synthesize(teacher, count).sample(count).images


if __name__ == "__main__":
    main()
