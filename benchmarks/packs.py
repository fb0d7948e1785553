"""Do other tools calibrate as well on a pack of synthetic images as on real ones?

    python benchmarks/packs.py imagenet_efficientnet_lite0 --images RUN_IMAGES.safetensors

Each network is quantized to 8 bits by `onnxruntime.quantization.quantize_static` (its default min-max ranges, and its
percentile ranges) and by `nncf.quantize` (OpenVINO), fed with 64 images: IntraQ's, Gaussian noise, and real ones.
Rows go to benchmarks/results/packs.jsonl.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nncf
import numpy as np
import openvino
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from mirageq import Noise
from mirageq.data import open_images
from mirageq.evaluate import accuracy
from mirageq.export import export_teacher
from mirageq.export.adapters import nncf_dataset, onnxruntime_reader
from mirageq.export.pack import open_pack, write_pack
from mirageq.export.verify import open_file
from mirageq.images import SyntheticSet
from mirageq.methods.real import Real
from mirageq.models import NetworkChoice, load_teacher

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "shared" / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network")
    parser.add_argument("--images", type=Path, required=True, help="IntraQ's images, from `mirageq synthesize`")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    teacher = load_teacher(NetworkChoice(name=f"py:{HERE / 'networks.py'}:{options.network}"))
    data = open_images(DATA / "imagenet_val1300_227.parquet", teacher.image_shape, limit=options.limit)
    sources = {
        "intraq": SyntheticSet.load(options.images),
        "noise": Noise().synthesize(teacher, options.count),
        "real": Real(path=str(DATA / "imagenet_sample1000_train_256.parquet")).synthesize(teacher, options.count),
    }
    measure = Measure(teacher, data)
    rows = [{"network": options.network, "tool": "full precision", "images_from": "", **measure(teacher)}]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_teacher(teacher, folder / "float.onnx")
        quant_pre_process(folder / "float.onnx", folder / "prepared.onnx", skip_symbolic_shape=True)
        for source, images in sources.items():
            write_pack(images.sample(options.count), teacher, folder / source, {"method": source})
            pack = open_pack(folder / source)
            for tool, quantize in TOOLS.items():
                started = time.perf_counter()
                run = quantize(pack, folder)
                seconds = time.perf_counter() - started
                figures = {"clipped": pack.manifest.clipped, "seconds": round(seconds, 1), **measure(run)}
                rows.append({"network": options.network, "tool": tool, "images_from": source, **figures})
                print(rows[-1], flush=True)
    with (HERE / "results" / "packs.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


class Measure:
    """Top-1 of anything that maps normalised images to logits."""

    def __init__(self, teacher, data) -> None:
        self.teacher, self.data = teacher, data

    def __call__(self, run) -> dict:
        measured = accuracy(run, self.data, self.teacher.mean, self.teacher.std)
        return {"top1": measured.top1, "count": measured.count}


def with_onnxruntime(method: CalibrationMethod, pack, folder: Path):
    quantize_static(
        folder / "prepared.onnx",
        folder / "int8.onnx",
        onnxruntime_reader(pack),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=method,
    )
    return of_tensors(open_file(folder / "int8.onnx", "onnxruntime"))


def with_nncf(pack, folder: Path):
    model = openvino.Core().read_model(folder / "float.onnx")
    quantized = nncf.quantize(model, nncf_dataset(pack), subset_size=len(pack))
    compiled = openvino.Core().compile_model(quantized, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return of_tensors(lambda images: compiled([images])[0])


def of_tensors(run):
    import torch

    return lambda images: torch.from_numpy(np.asarray(run(images.numpy())))


TOOLS: dict[str, Callable] = {  # (pack, folder) -> the quantized network
    "onnxruntime, min-max": partial(with_onnxruntime, CalibrationMethod.MinMax),
    "onnxruntime, percentile": partial(with_onnxruntime, CalibrationMethod.Percentile),
    "nncf": with_nncf,
}


if __name__ == "__main__":
    main()
