"""The commands that compute: images, runs, comparisons."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace

from rich.markup import escape

from mirageq import recipe
from mirageq.cli.options import device_name, network_choice, recipe_table, refuse
from mirageq.cli.printing import console, show_comparisons, summarise
from mirageq.compare import PROTOCOL, Comparison
from mirageq.errors import UserError
from mirageq.folders import alone, check_folder
from mirageq.models import load_teacher
from mirageq.parallel import Setting, fill_in_parallel
from mirageq.plan import Plan
from mirageq.run import Run, machine
from mirageq.teacher import Teacher

BEGINNING = ("image_shape", "mean", "std", "recipe", "method", "set", "bits", "count", "images", "seed", "out")
"""The options that say how a run begins."""


def quantize(options: argparse.Namespace, only_images: bool = False) -> None:
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
    summarise(run)


def synthesize(options: argparse.Namespace) -> None:
    quantize(options, only_images=True)


def _begin(options: argparse.Namespace, only_images: bool) -> tuple[Run, Teacher]:
    if not options.model or not options.out:
        raise UserError("A run needs a MODEL and --out FOLDER, or --resume FOLDER.")
    if not (options.recipe or options.method or getattr(options, "images", None)):
        raise UserError(
            "Say how: --recipe squant (8 bits, in seconds), another recipe (see: mirageq recipes), or --method NAME."
        )
    wanted = recipe.build(recipe_table(options))
    check_folder(options.out)
    choice = network_choice(options)
    teacher = load_teacher(choice, device_name(options))
    return Run.create(options.out, choice, wanted, options.seed or 0, teacher, only_images=only_images), teacher


def _resume(options: argparse.Namespace) -> tuple[Run, Teacher]:
    refuse(options, f"{options.resume} goes on as it was begun", *BEGINNING)
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
    teacher = load_teacher(found, device_name(options))
    run.record["machine"] = machine(teacher.device)
    run.record["network"] |= asdict(found.known(teacher))  # written once the run is finished
    return run, teacher


def compare(options: argparse.Namespace) -> None:
    from mirageq.data import open_images

    given = {"network": options.model, "data": options.data and str(options.data), "recipe": options.recipe}
    plan = Plan.asked(options.plan, options.methods, given | {"bits": options.bits, "seeds": options.seeds})
    wanted = plan.check(options.only)
    if not (plan.network and plan.data and options.out):
        raise UserError("A comparison needs a MODEL, --data and --out FOLDER.")
    options.model = plan.network
    choice, device = network_choice(options), device_name(options)
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
