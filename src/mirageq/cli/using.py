"""The commands that use what is finished: measure it, deliver it, hand its images over, show it."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from mirageq.cli.arguments import MODEL
from mirageq.cli.options import device_name, network_choice, normalised, refuse
from mirageq.cli.printing import console, show_comparisons, show_run
from mirageq.compare import PROTOCOL, Comparison
from mirageq.errors import UserError
from mirageq.folders import RECORD
from mirageq.models import load_teacher
from mirageq.run import Run
from mirageq.tables import describe
from mirageq.teacher import Teacher


def evaluate(options: argparse.Namespace) -> None:
    from mirageq.data import open_images
    from mirageq.evaluate import Classifier, accuracy

    if not options.data:
        raise UserError("Measuring needs labelled images: --data FOLDER_OR_FILE.")
    folder = Path(options.model)
    if not folder.exists() and ":" not in options.model:
        raise UserError(f"There is no run {folder}; give the folder of one, or {MODEL}.")
    run = Run.open(folder) if folder.is_dir() else None
    if run:
        refuse(options, f"{folder} knows its network", "checkpoint", "image_shape")
    choice = normalised(run, options) if run else network_choice(options)
    teacher = load_teacher(choice, device_name(options))
    data = open_images(options.data, teacher.image_shape, resize=options.resize, limit=options.limit)
    networks: dict[str, Classifier] = {"full precision": teacher}
    if run:
        networks[f"{run.scheme.bits} {run.record['recipe']['method']['name']}"] = run.student(teacher)
    for name, network in networks.items():
        print(f"{name:>20}: {accuracy(network, data, teacher.mean, teacher.std, device=str(teacher.device))}")


def export(options: argparse.Namespace) -> None:
    from mirageq.export import deliver

    if options.resize and not options.data:
        raise UserError("--resize scales the labelled images of --data; give both, or leave it out.")
    run = Run.open(options.run)
    teacher = load_teacher(normalised(run, options))
    student = run.student(teacher)
    if options.out.exists():
        raise UserError(f"{options.out} exists already; give another name.")
    delivery = deliver(
        student,
        teacher,
        _proving_images(options, run, teacher),
        options.out,
        profile=options.profile,
        pack_weights=options.pack_weights,
        runtimes=options.runtimes,
        threads=options.threads,
    )
    for line in describe(delivery):
        console.print(line, highlight=False, markup=False)


def _proving_images(options: argparse.Namespace, run: Run, teacher: Teacher) -> Tensor:
    """Labelled images if the user gave some, else the run's own, at the network's size; as many as there are."""
    if options.data:
        from mirageq.data import open_images
        from mirageq.methods.real import Real

        there = open_images(options.data, teacher.image_shape, resize=options.resize).count
        source = Real(path=str(options.data), resize=options.resize).synthesize(teacher, min(options.images, there))
    else:
        source = run.images()
    images = F.interpolate(source.sample(options.images).images, teacher.image_shape[1:])
    if len(images) < options.images:
        console.print(f"There are {len(images)} images to prove it on, and not {options.images}; --data gives others.")
    return images


def pack(options: argparse.Namespace) -> None:
    from mirageq.export.adapters import check_copies, write_folder, write_numpy
    from mirageq.export.pack import open_pack, write_pack

    run = Run.open(options.run)
    images = run.images()
    check_copies(options.out, options.folder, options.numpy, channels=images.images.shape[1])
    made_by = {
        "network": run.choice.name,
        "network_sha256": run.record["network"]["sha256"],
        "method": run.record["recipe"]["method"]["name"],
        "seed": run.seed,
    }
    teacher = load_teacher(normalised(run, options))
    manifest = write_pack(images.sample(options.count or len(images)), teacher, options.out, made_by)
    pack = open_pack(options.out)
    if options.numpy:
        write_numpy(pack, options.numpy)
    if options.folder:
        write_folder(pack, options.folder)
    print(
        f"wrote {manifest.count} images to {options.out}; {100 * manifest.clipped:.2f} % of their values were clipped"
    )


def show(options: argparse.Namespace) -> None:
    first = options.folder[0]
    if (first / RECORD).exists() or not (first / PROTOCOL).exists():
        if len(options.folder) > 1:
            raise UserError("Runs are shown one at a time; several folders are comparisons, for one table.")
        show_run(Run.open(first))
    else:
        show_comparisons([Comparison.open(folder) for folder in options.folder])
