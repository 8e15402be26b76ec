"""A run that trains a classifier of noisy items: its job, and what is looked at on the way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import parameterization, sde
from ..checkpoint import CLASSIFIER
from ..classifier import NoisyClassifier, describe_classifier
from ..config import ConfigError, build, check_sections, construct, describe, merge
from ..data import DataConfig, Dataset, Scaler, Source, open_splits
from ..data.dataset import spread
from ..files import write_json
from ..model import evaluating
from ..noise import step_seed
from ..sde.terminal import remains
from . import augment as augment_room
from . import cross_entropy
from .accuracy import Examination, examine
from .augment import check as check_augmentation
from .job import Job, _fields, build_net, probed, resolve_auto, with_workers
from .report import save_loss_curve
from .settings import LikelihoodConfig, SamplingConfig, TrainingConfig
from .track import check as check_tracker
from .trainer import Trainer

FINAL = 2048
"""Held-out items that are looked at in the end, at each noise level."""
SECTIONS = ("sde", "parameterization", "net", "data", "objective", "training")
DEFAULT: dict[str, dict[str, Any]] = {
    "sde": {"name": "vp"},
    "parameterization": {"name": "eps"},
    "net": {"preset": "tiny"},
    "data": {"source": "digits"},
    "objective": {"name": "cross-entropy"},
    "training": {"lr": 2e-3, "warmup": 20, "weight_decay": 0.05},
}


class HeldoutClasses:
    """The held-out items of a run, seen through the averaged weights of its classifier.

    Args:
        trainer: the run.
        limit: at most so many items are looked at.
    """

    def __init__(self, trainer: Trainer, limit: int = 512) -> None:
        self.job, self.learner = trainer.job, trainer.learner
        self.limit = limit

    def items(self, limit: int, stream: int = 12) -> tuple[Tensor, Tensor, torch.Generator]:
        """Held-out items in model range and their classes, the same at every call."""
        held, job = self.job.heldout, self.job
        index = spread(len(held), limit)  # they may lie class by class
        seed = step_seed(job.training.seed, 0, stream)
        generator = torch.Generator(job.device).manual_seed(seed)
        assert held.y is not None
        x0, cond = self.learner.prepared(held.x[index], held.y[index], generator)
        return x0, cond["y"], generator

    @torch.no_grad()
    def loss(self) -> float:
        """The objective on held-out items."""
        x0, y, generator = self.items(self.limit)
        averaged: Any = self.learner.averaged
        with evaluating(averaged):
            losses = [
                self.job.objective(averaged, part, y=of, generator=generator)
                for part, of in zip(x0.split(256), y.split(256), strict=True)
            ]
        return float(torch.cat(losses).mean())

    def examination(self, limit: int | None = None, progress: Any = None) -> Examination:
        """How the averaged weights do, clean and, unless all is clean, by noise level."""
        x0, y, _ = self.items(limit or self.limit)
        bins = {"bins": 0} if self.job.objective.clean == 1 else {}
        seed = self.job.training.seed
        return examine(self.learner.averaged, x0, y, seed=seed, progress=progress, **bins)


class ClassifierTrainer(Trainer):
    """The trainer of a classifier: another look at the held-out items, and no samples."""

    def _heldout(self) -> HeldoutClasses:
        return HeldoutClasses(self)

    def evaluate(self) -> None:
        """Held-out loss, accuracy and calibration by noise level, of the averaged weights."""
        self.look()
        if not self.world.main and not self.job.training.shard:
            return
        loss, found = self.heldout.loss(), self.heldout.examination()
        if self.world.main:
            row = {
                "loss": loss,
                "accuracy": found.clean.accuracy,
                "accuracy_by_log_snr": [level.accuracy for level in found.noisy],
                "calibration_by_log_snr": [level.calibration for level in found.noisy],
            }
            said = f", accuracy of clean items {found.clean.accuracy:.1%}"
            self.watch.heldout(self, row, more=said)


class Alike(NamedTuple):
    """What a classifier has of the score model that it is to guide, besides the process."""

    name: str
    scaler: Scaler | None
    shape: tuple[int, ...] | None = None


def prepare_classifier(
    config: Mapping[str, Any],
    folder: Path,
    device: torch.device,
    *,
    like: Alike | None = None,
) -> Job:
    """Data, classifier and objective that ``config`` (sections over :data:`DEFAULT`) describes.

    Args:
        config: the sections.
        folder: of the run.
        device: where it trains.
        like: what the score model has that the classifier is to guide; None without one.

    Raises:
        ConfigError, DataError: one line; nothing has been written.
    """
    check_sections(config, SECTIONS)
    config = merge(DEFAULT, config)
    training = construct(TrainingConfig, config["training"], "training")
    data = construct(DataConfig, config["data"], "data")
    objective = build({"name": "cross-entropy", **config["objective"]}, cross_entropy, "objective")
    augment = build(data.augment, augment_room, "augment")
    check_tracker(training.track)
    if training.precision == "float16" and device.type != "cuda":
        raise ConfigError(f"training.precision float16 needs CUDA; the device is {device}")

    train, heldout = _labelled(data)
    if like is not None and like.shape is not None and tuple(like.shape) != tuple(train.shape):
        raise ConfigError(
            f"{like.name} is of items of shape {tuple(like.shape)}, {train.name} of "
            f"{tuple(train.shape)}"
        )
    training = with_workers(training, train)
    seen = probed(train)
    scaler = like.scaler if like is not None else None
    scaler = scaler or Scaler.fit(train, data.scaler)
    probe = scaler.encode(seen, dequantize=False).double()
    mean, variance = probe.mean(0), probe.var(0, unbiased=False)
    section = resolve_auto(config["sde"], probe, mean, variance)
    process = build({"name": config["sde"].get("name", "vp"), **section}, sde, "sde")
    section = dict(config["parameterization"])
    section.setdefault("sigma_data", round(float(probe.std()), 4))
    inputs = build({"name": "eps", **section}, parameterization, "parameterization")

    section = {"name": "mlp-classifier" if len(train.shape) == 1 else "adm-classifier"}
    section |= {**config["net"], "num_classes": train.num_classes}
    with torch.random.fork_rng([]):  # layers draw their weights from torch's global generator
        torch.manual_seed(training.seed)
        net = build_net(section, train.shape)
    check_augmentation(augment, net, train.shape)
    model = NoisyClassifier(
        net, process, inputs, shape=tuple(train.shape), scaler=scaler,
        num_classes=train.num_classes, class_names=train.class_names,
    )  # fmt: skip
    model.to(device)
    try_classifier(model, device)
    described = describe_classifier(model)
    described[CLASSIFIER]["like"] = None if like is None else like.name
    resolved = {
        **described,
        "data": _fields(data),
        "objective": describe(objective),
        "training": _fields(training),
    }
    carried: Any = model  # the trainer asks of it what it asks of a score model
    return Job(
        folder, resolved, carried, objective, training, SamplingConfig(), LikelihoodConfig(),
        train, heldout, remains(process, mean, variance), device, augment, data.dequantize,
    )  # fmt: skip


def _labelled(data: DataConfig) -> tuple[Source, Dataset]:
    """Items with classes to train on, and others held out.

    Raises:
        ConfigError: for data without classes.
    """
    train, heldout = open_splits(data)
    if train.num_classes is None:
        have = f"vectors of {train.vectors} entries" if train.vectors else "no labels"
        if have == "no labels" and (train.size is None or data.stream):
            have += " (those of a stream are used where data.classes says how many classes)"
        raise ConfigError(f"a classifier needs classes, but {train.name} has {have}")
    if isinstance(train, Dataset) and torch.equal(train.x, heldout.x):  # one split, given twice
        train, heldout = train.split(data.heldout, data.seed)
    return train, heldout


def try_classifier(model: NoisyClassifier, device: torch.device) -> None:
    """Evaluates the network once on noise, at both ends of its times.

    Raises:
        ConfigError: if it does not take such items, or gives no logits of their classes.
    """
    x = torch.randn(2, *(model.shape or ()), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([model.sde.t_min, model.sde.t_max], device=device)
    try:
        with torch.no_grad(), evaluating(model):
            log_p = model(x.to(device), t)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"net does not take the data: {str(error).splitlines()[0]}") from error
    if not bool(log_p.isfinite().all()):
        raise ConfigError(
            "net gives no finite output: does parameterization.label suit net.embedding?"
        )


def finish_classifier(
    trainer: ClassifierTrainer, figures: Mapping[str, Any], progress: Any = None
) -> dict[str, Any]:
    """Examines a trained classifier, writes ``loss.png`` and ``report.json``; the report.

    Args:
        trainer: the run, at its end.
        figures: what else the report says.
        progress: told of items done.
    """
    found = trainer.heldout.examination(FINAL, progress)
    report = {**figures, "heldout": found.summary()}
    if trainer.world.main:
        save_loss_curve(trainer.job)
        write_json(trainer.job.folder / "report.json", report)
    return report
