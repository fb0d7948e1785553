"""The command line: parsing and printing, nothing else."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from mirageq import recipe, reference
from mirageq.arguments import MODEL, parser
from mirageq.compare import PROTOCOL, Comparison
from mirageq.errors import UserError
from mirageq.folders import RECORD, alone, check_folder, resuming
from mirageq.models import NetworkChoice, load_teacher
from mirageq.parallel import Setting, fill_in_parallel
from mirageq.plan import Plan
from mirageq.run import Run, machine
from mirageq.show import show_comparisons, show_run, summarise
from mirageq.tables import describe
from mirageq.teacher import Teacher

INTERRUPTED = 130
BEGINNING = ["image_shape", "mean", "std", "recipe", "method", "set", "bits"]
BEGINNING += ["count", "images", "seed", "out"]
"""The options that say how a run begins."""

console = Console()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 2 a user's error, 130 interrupted."""
    options = parser(COMMANDS).parse_args(arguments)
    try:
        options.command(options)
    except UserError as error:
        print(f"mirageq: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"mirageq: {error.strerror or error}{where}. {_how_to_continue(options)}".rstrip(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nmirageq: interrupted. {_how_to_continue(options)}".rstrip(), file=sys.stderr)
        return INTERRUPTED
    return 0


def _how_to_continue(options: argparse.Namespace) -> str:
    out = getattr(options, "out", None)
    if out and (out / RECORD).exists():
        return f"Continue with: {resuming(out)}"
    if out and (out / PROTOCOL).exists():
        return f"{len(Comparison.open(out).rows())} cells in {out} are finished; the same command continues."
    return ""


def _quantize(options: argparse.Namespace, only_images: bool = False) -> None:
    if options.resume:
        run, teacher = _resume(options)
    else:
        run, teacher = _begin(options, only_images)
    kind, scheme = run.record["recipe"], run.recipe.scheme
    then = (
        ""
        if run.record["only_images"]
        else f", {scheme.bits} ({scheme.placement}), {kind['tuner'].get('steps', 0)} steps"
    )
    console.print(
        f"[bold]{escape(run.choice.name)}[/]: {kind['images']} images by {kind['method']['name']}{then}, "
        f"seed {run.seed}",
        highlight=False,
    )
    run.execute(teacher, console)
    summarise(run, console)


def _synthesize(options: argparse.Namespace) -> None:
    _quantize(options, only_images=True)


def _begin(options: argparse.Namespace, only_images: bool) -> tuple[Run, Teacher]:
    if not options.model or not options.out:
        raise UserError("A run needs a MODEL and --out FOLDER, or --resume FOLDER.")
    if not (options.recipe or options.method or getattr(options, "images", None)):
        raise UserError(
            "Say how: --recipe squant (8 bits, in seconds), another recipe (see: mirageq recipes), or --method NAME."
        )
    wanted = recipe.build(_recipe_table(options))
    check_folder(options.out)
    choice = _choice(options)
    teacher = load_teacher(choice, _device(options))
    return Run.create(options.out, choice, wanted, options.seed or 0, teacher, only_images=only_images), teacher


def _resume(options: argparse.Namespace) -> tuple[Run, Teacher]:
    _refuse(options, f"{options.resume} goes on as it was begun", *BEGINNING)
    run = Run.open(options.resume)
    options.out = run.folder
    if run.finished:
        raise UserError(f"{run.folder} is finished already; see it with: mirageq show {run.folder}")
    found = replace(
        run.choice,
        name=options.model or run.choice.name,
        checkpoint=str(options.checkpoint) if options.checkpoint else None if options.model else run.choice.checkpoint,
    )
    if options.device == "auto" and run.record.get("machine", {}).get("device") == "cpu":  # as it was begun
        options.device = "cpu"
    teacher = load_teacher(found, _device(options))
    run.record["machine"] = machine(teacher.device)
    run.record["network"] |= asdict(found.known(teacher))  # written once the run is finished
    return run, teacher


def _evaluate(options: argparse.Namespace) -> None:
    from mirageq.data import open_images
    from mirageq.evaluate import Classifier, accuracy

    if not options.data:
        raise UserError("Measuring needs labelled images: --data FOLDER_OR_FILE.")
    folder = Path(options.model)
    if not folder.exists() and ":" not in options.model:
        raise UserError(f"There is no run {folder}; give the folder of one, or {MODEL}.")
    run = Run.open(folder) if folder.is_dir() else None
    if run:
        _refuse(options, f"{folder} knows its network", "checkpoint", "image_shape")
    choice = _normalised(run, options) if run else _choice(options)
    teacher = load_teacher(choice, _device(options))
    data = open_images(options.data, teacher.image_shape, resize=options.resize, limit=options.limit)
    networks: dict[str, Classifier] = {"full precision": teacher}
    if run:
        networks[f"{run.scheme.bits} {run.record['recipe']['method']['name']}"] = run.student(teacher)
    for name, network in networks.items():
        print(f"{name:>20}: {accuracy(network, data, teacher.mean, teacher.std, device=str(teacher.device))}")


def _export(options: argparse.Namespace) -> None:
    from mirageq.export import deliver

    if options.resize and not options.data:
        raise UserError("--resize scales the labelled images of --data; give both, or leave it out.")
    run = Run.open(options.run)
    teacher = load_teacher(_normalised(run, options))
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


def _pack(options: argparse.Namespace) -> None:
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
    teacher = load_teacher(_normalised(run, options))
    manifest = write_pack(images.sample(options.count or len(images)), teacher, options.out, made_by)
    pack = open_pack(options.out)
    if options.numpy:
        write_numpy(pack, options.numpy)
    if options.folder:
        write_folder(pack, options.folder)
    print(
        f"wrote {manifest.count} images to {options.out}; {100 * manifest.clipped:.2f} % of their values were clipped"
    )


def _look_up(options: argparse.Namespace) -> None:
    reference.show(options.what, getattr(options, "name", None), console)


def _compare(options: argparse.Namespace) -> None:
    from mirageq.data import open_images

    given = {"network": options.model, "data": options.data and str(options.data), "recipe": options.recipe}
    plan = Plan.asked(options.plan, options.methods, given | {"bits": options.bits, "seeds": options.seeds})
    wanted = plan.check(options.only)
    if not (plan.network and plan.data and options.out):
        raise UserError("A comparison needs a MODEL, --data and --out FOLDER.")
    options.model = plan.network
    choice, device = _choice(options), _device(options)
    teacher = load_teacher(choice, device)
    data = open_images(plan.data, teacher.image_shape, resize=options.resize, limit=options.limit)
    comparison = Comparison.begin(options.out, plan.network, teacher, data, wanted, options.work)
    console.print(comparison.protocol.sentences(), highlight=False)
    with alone(options.out / PROTOCOL):
        try:
            if options.jobs > 1:
                setting = Setting(comparison, plan, choice, device, plan.data, options.resize, options.limit)
                fill_in_parallel(setting, options.jobs, console, options.only)
            else:
                comparison.fill(plan, teacher, data, console, options.only)
        except UserError:
            if comparison.rows():
                show_comparisons([comparison])
            raise
    show_comparisons([comparison])


def _show(options: argparse.Namespace) -> None:
    first = options.folder[0]
    if (first / RECORD).exists() or not (first / PROTOCOL).exists():
        if len(options.folder) > 1:
            raise UserError("Runs are shown one at a time; several folders are comparisons, for one table.")
        show_run(Run.open(first), console)
    else:
        show_comparisons([Comparison.open(folder) for folder in options.folder])


def _recipe_table(options: argparse.Namespace) -> recipe.Table:
    table = recipe.read(options.recipe) if options.recipe else {}
    if options.method:
        named = recipe.section(table, "method").get("name", recipe.UNNAMED["method"]) == options.method
        table["method"] = (recipe.section(table, "method") if named else {}) | {"name": options.method}
    if isinstance(stored := getattr(options, "images", None), Path):
        _refuse(options, "--images takes the images of a run", "method")
        file = Run.open(stored).images_file() if stored.is_dir() else stored
        table["method"] = {"name": "mirageq.methods.stored:Stored", "path": str(file.absolute())}
    if getattr(options, "count", None):
        table["images"] = options.count
    if getattr(options, "bits", None) is not None:
        table = recipe.set_bits(table, options.bits)
    return recipe.assign(table, options.set)


def _choice(options: argparse.Namespace) -> NetworkChoice:
    return NetworkChoice(
        name=options.model,
        checkpoint=str(options.checkpoint) if options.checkpoint else None,
        image_shape=options.image_shape,
        mean=options.mean,
        std=options.std,
    )


def _normalised(run: Run, options: argparse.Namespace) -> NetworkChoice:
    """The run's network, with the normalisation of the command line if there is one."""
    return replace(run.choice, mean=options.mean or run.choice.mean, std=options.std or run.choice.std)


def _refuse(options: argparse.Namespace, why: str, *names: str) -> None:
    """Raise a `UserError` if one of these options was given, which could not count."""
    given = [name for name in names if getattr(options, name, None) not in (None, [])]
    if given:
        told = ", ".join("MODEL" if name == "model" else f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"{why}; leave out {told}.")


def _device(options: argparse.Namespace) -> str:
    if options.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, colon, number = options.device.partition(":")
    if kind not in ("cpu", "cuda") or (colon and not number.isdecimal()):
        raise UserError(f"There is no device '{options.device}'; give cpu, cuda, cuda:1 and so on, or auto.")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise UserError(f"There is no CUDA device for --device {options.device}; use --device cpu.")
    return options.device


COMMANDS = {
    "quantize": _quantize,
    "synthesize": _synthesize,
    "evaluate": _evaluate,
    "compare": _compare,
    "export": _export,
    "pack": _pack,
    "methods": _look_up,
    "tuners": _look_up,
    "scheme": _look_up,
    "recipes": _look_up,
    "show": _show,
}
