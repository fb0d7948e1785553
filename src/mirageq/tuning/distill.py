"""Tuning by distillation: the student learns to answer as the teacher does on synthetic images.

Idea: minimise `T^2 KL(teacher || student)` at temperature T, plus (if wanted) cross-entropy with the labels the images
were made for and the distance of the penultimate features, over weights, biases and BatchNorm scales and shifts.
Reference: Hinton et al. 2015 for the loss; the schedule and weights of IntraQ's second stage.
Differences from the official code: activation ranges are calibrated on the method's own images before tuning; the rate
is one at which the run does not diverge (the official CIFAR runs end in NaN after one to six epochs); a divergence
guard watches, and the gradient can be clipped; the last step counts, never the best on a test set. Steps that learn
(LSQ, `scheme.learned_steps`) begin at the calibrated ranges, not at LSQ's own estimate, at the weights' rate and decay;
their gradient is scaled by the grid's levels where LSQ counts those of one sign.
Cost: `steps` passes of the teacher forward and of the student forward and backward.
Choose it: at 4 bits and more if minutes count, after `reconstruct` to bring its blocks together, or as papers do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mirageq.augment import mixed, random_resized_crop
from mirageq.errors import (
    UserError,
    check_choices,
    check_crop_scale,
    check_fraction,
    check_not_negative,
    check_positive,
)
from mirageq.images import Batch, ImageSource, check_batch
from mirageq.journal import Journal
from mirageq.losses import distillation
from mirageq.paint import cosine
from mirageq.quant import Student
from mirageq.quant.quantizers import keep_positive
from mirageq.seeding import stream
from mirageq.teacher import Teacher
from mirageq.tuning.guard import DivergenceGuard


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Settings of tuning by distillation.

    Attributes:
        steps: updates of the student; 0 leaves the calibrated student as it is.
        batch_size: images of one update.
        optimizer: "sgd" (Nesterov momentum) or "adam".
        lr: peak learning rate.
        schedule: "cosine" to zero, "step" (times `lr_factor` at each of `milestones`), or "constant".
        warmup: fraction of the steps over which the rate rises linearly from zero.
        milestones, lr_factor: fractions of the run at which the "step" schedule lowers the rate, and to what part.
        momentum: of "sgd".
        weight_decay: of both optimizers.
        kd_weight: weight of the distillation term, which already contains T^2 (the paper's alpha, 20).
        temperature: T of both softmaxes.
        ce_weight: weight of the cross-entropy with the images' labels.
        ce_confidence: it counts only images that the teacher gives at least this probability of their label; the others
            teach by their soft labels alone (SynQ).
        feature_weight: weight of the mean squared error of the penultimate features.
        clip_norm: largest gradient norm of an update; 0 does not clip.
        crop_scale: smallest area of the random crops (with mirroring) the images are seen through; 1 shows them whole.
        mix: blend each image with another one of its batch; the teacher answers for the blend (TexQ's fine-tuning). It
            keeps a student from learning a small set by heart. Labels mean nothing then, so `ce_weight` must be 0.
    """

    steps: int = 1000
    batch_size: int = 64
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = 1e-5
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    warmup: float = 0.0
    milestones: tuple[float, ...] = (0.5, 0.75)
    lr_factor: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    kd_weight: float = 20.0
    temperature: float = 20.0
    ce_weight: float = 1.0
    ce_confidence: float = 0.0
    feature_weight: float = 0.0
    clip_norm: float = 0.0
    crop_scale: float = 0.5
    mix: bool = False

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(self, "batch_size", "lr", "temperature", "lr_factor")
        check_not_negative(self, "steps", "momentum", "weight_decay", "clip_norm")
        check_not_negative(self, "kd_weight", "ce_weight", "feature_weight")
        check_crop_scale(self.crop_scale)
        check_fraction(self, "warmup", "ce_confidence")
        if self.mix and self.ce_weight:
            raise UserError(f"Mixed images have no label to learn: mix needs ce_weight = 0; got {self.ce_weight}.")

    def check(self, student: Student, images: int | None) -> None:
        """Raise a `UserError` for fewer images than a batch."""
        if self.steps and images is not None:
            check_batch(self.batch_size, images)

    def tune(
        self, teacher: Teacher, student: Student, source: ImageSource, *, seed: int = 0, journal: Journal | None = None
    ) -> None:
        """Tune a calibrated `student` in place on `source`, resuming from the journal's checkpoint if there is one.

        Raises:
            TuningDiverged: the loss kept exploding or turning NaN at ever lower rates.
        """
        if self.steps == 0:
            return
        journal = journal or Journal()
        run = _Run(self, student, source, seed)
        checkpoint = journal.checkpoint("tune")
        if state := checkpoint.load():
            run.load_state_dict(state)
        batches = source.batches(self.batch_size, student)
        with journal.stage("tune", self.steps, start=run.step) as advance:
            while run.step < self.steps:
                terms = run.update(teacher, batches, journal.say)
                if terms is not None:
                    advance(run.step - 1, **terms)
                    checkpoint.offer(run.state_dict)
        checkpoint.save(run.state_dict())

    def rate(self, step: int) -> float:
        """The learning rate of update `step` (0-based)."""
        done = step / self.steps
        rise = min(1.0, (step + 1) / (self.warmup * self.steps)) if self.warmup else 1.0
        if self.schedule == "cosine":
            return rise * cosine(self.lr, 0.0, done)
        passed = sum(done >= milestone for milestone in self.milestones) if self.schedule == "step" else 0
        return self.lr * rise * self.lr_factor**passed

    def loss(self, teacher: Teacher, student: Student, batch: Batch) -> dict[str, Tensor]:
        """The weighted terms on one batch."""
        with torch.no_grad():
            if self.feature_weight:
                seen = teacher.observe(batch.images)
                target, target_features = seen.logits, seen.features
            else:
                target = teacher(batch.images)
        logits, features = student.observe(batch.images)
        terms = {"kd": self.kd_weight * distillation(logits, target, self.temperature)}
        if self.ce_weight:
            terms["ce"] = self.ce_weight * confident_cross_entropy(logits, target, batch.labels, self.ce_confidence)
        if self.feature_weight:
            terms["feature"] = self.feature_weight * F.mse_loss(features, target_features)
        return terms


def confident_cross_entropy(logits: Tensor, teacher: Tensor, labels: Tensor, confidence: float) -> Tensor:
    """Cross-entropy of logits (N, classes) with labels (N,), summed over images the teacher is sure of, divided by N.

    Sure: it gives the label a probability of at least `confidence` (SynQ, Kim et al., ICLR 2025).
    """
    sure = teacher.float().softmax(1).gather(1, labels[:, None]).squeeze(1) >= confidence
    return (F.cross_entropy(logits.float(), labels, reduction="none") * sure).mean()


class _Run:
    """The moving parts of one tuning run: student, optimizer, position, randomness, guard."""

    def __init__(self, settings: Distill, student: Student, source: ImageSource, seed: int) -> None:
        self.settings, self.student, self.source = settings, student, source
        parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self.optimizer: torch.optim.Optimizer
        if settings.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(
                parameters,
                lr=settings.lr,
                momentum=settings.momentum,
                nesterov=settings.momentum > 0,
                weight_decay=settings.weight_decay,
            )
        else:
            self.optimizer = torch.optim.Adam(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        self.generator = stream(seed, "tune")
        self.guard = DivergenceGuard()
        self.step = 0
        self._keep()

    def update(self, teacher: Teacher, batches: Iterator[Batch], say: Callable[[str], None]) -> dict[str, float] | None:
        """One step; None if the guard took the student back to its last good state instead."""
        settings = self.settings
        batch = self._prepare(next(batches), teacher.device)
        terms = settings.loss(teacher, self.student, batch)
        total = torch.stack(list(terms.values())).sum()
        if self.guard.alarmed_by(float(total.detach())):
            say(self.guard.back_off(self.step, float(total.detach()), settings.lr))
            self._restore()
            return None
        if self.guard.calm(self.step):  # the state whose loss was just measured, not the one after the next update
            self._keep()
        rate = settings.rate(self.step) * self.guard.lr_scale
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        total.backward()
        if settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), settings.clip_norm)
        self.optimizer.step()
        keep_positive(self.student)
        self.step += 1
        return {**{name: float(term.detach()) for name, term in terms.items()}, "lr": rate}

    def state_dict(self) -> dict[str, Any]:
        return {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "source": self.source.state_dict(),
            "generator": self.generator.get_state(),
            "guard": self.guard.state_dict(),
            "step": self.step,
            "good": self._good,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.source.load_state_dict(state["source"])
        self.generator.set_state(state["generator"])
        self.guard.load_state_dict(state["guard"])
        self.step, self._good = state["step"], state["good"]

    def _prepare(self, batch: Batch, device: torch.device) -> Batch:
        images, labels = batch.images.to(device), batch.labels.to(device)
        if self.settings.crop_scale < 1:
            images = random_resized_crop(images, self.generator, scale=(self.settings.crop_scale, 1.0))
        if self.settings.mix:
            images = mixed(images, self.generator)
        return Batch(images, labels)

    def _keep(self) -> None:
        self._good = copy.deepcopy(
            {"student": self.student.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        )

    def _restore(self) -> None:
        self.student.load_state_dict(self._good["student"])
        self.optimizer.load_state_dict(copy.deepcopy(self._good["optimizer"]))
        self.step = self._good["step"]
