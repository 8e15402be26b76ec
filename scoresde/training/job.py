"""From a configuration to everything that a training run needs, checked before anything starts."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import given as given_room
from .. import nets, parameterization, sde
from ..checkpoint import describe_model
from ..conditions import check_used
from ..config import (
    ConfigError,
    build,
    check_sections,
    construct,
    describe,
    merge,
    names,
    resolve,
    unknown,
)
from ..data import DataConfig, DataError, Dataset, Scaler, Source, open_splits
from ..data.sources import choose_workers
from ..model import ScoreModel, evaluating
from ..sde.terminal import Remains, auto_beta_max, auto_sigma_max, remains
from . import augment as augment_room
from . import objectives
from .augment import Augmentation
from .augment import check as check_augmentation
from .settings import LikelihoodConfig, SamplingConfig, TrainingConfig
from .track import check as check_tracker

DEFAULT: dict[str, dict[str, Any]] = {
    "sde": {"name": "vp"},
    "parameterization": {},
    "net": {"preset": "tiny"},
    "given": {},
    "data": {"source": "digits"},
    "objective": {},
    "training": {},
    "sampling": {},
    "likelihood": {},
}


PROBE = 5000
"""Items that are looked at for the moments of the data."""


@dataclass
class Job:
    """A training run, ready to go."""

    folder: Path
    config: dict[str, Any]
    model: ScoreModel
    objective: Any
    training: TrainingConfig
    sampling: SamplingConfig
    likelihood: LikelihoodConfig
    train: Source
    heldout: Dataset
    left: Remains
    device: torch.device
    augment: Augmentation | None = None
    dequantize: bool = True

    @property
    def conditional(self) -> bool:
        """Whether the network takes the labels, or the vectors, of the data."""
        return getattr(self.model.net, "num_classes", None) is not None

    @property
    def whole(self) -> bool:
        """Whether a loss is that of an item as a whole, and not told for each dimension."""
        return getattr(self.objective, "whole", False)

    @property
    def dims(self) -> int:
        """What the loss of an item is divided by: its dimensions, or 1."""
        return 1 if self.whole else math.prod(self.train.shape)

    @property
    def fused(self) -> bool:
        """Whether the optimizer's step is one kernel, which can be told on the device to skip."""
        return self.device.type != "mps"


def prepare(config: Mapping[str, Any], folder: Path, device: torch.device) -> Job:
    """Data, model and objective that ``config`` (sections over :data:`DEFAULT`) describes.

    Raises:
        ConfigError, DataError: one line; nothing has been written.
    """
    check_sections(config)
    config = merge(DEFAULT, config)
    training = construct(TrainingConfig, config["training"], "training")
    sampling = construct(SamplingConfig, config["sampling"], "sampling")
    likelihood = construct(LikelihoodConfig, config["likelihood"], "likelihood")
    data = construct(DataConfig, config["data"], "data")
    cls: Any = resolve(str(config["sde"].get("name", "vp")), sde, "sde")
    objective_section = chosen_objective(config["objective"], cls.default_objective)
    augment = build(data.augment, augment_room, "augment")
    check_tracker(training.track)
    if training.precision == "float16" and device.type != "cuda":
        raise ConfigError(f"training.precision float16 needs CUDA; the device is {device}")

    train, heldout = open_splits(data)
    objective = build_objective(objective_section, train)
    if training.compile and objective.twice:
        raise ConfigError("training.compile cannot be had with objective second-order")
    training = with_workers(training, train)
    seen = probed(train)
    scaler = Scaler.fit(train, data.scaler)
    probe = scaler.encode(seen, dequantize=False).double()
    mean, variance = probe.mean(0), probe.var(0, unbiased=False)
    section = resolve_auto(config["sde"], probe, mean, variance)
    process = build({"name": config["sde"].get("name", "vp"), **section}, sde, "sde")

    section = dict(config["parameterization"])
    section.setdefault("name", cls.default_parameterization)
    section.setdefault("sigma_data", round(float(probe.std()), 4))
    predicts = build(section, parameterization, "parameterization")

    given = build(config["given"], given_room, "given") if config["given"] else None
    if given is not None:
        try_given(given, train.shape)
    with torch.random.fork_rng([]):  # layers draw their weights from torch's global generator
        torch.manual_seed(training.seed)
        net = build_net(config["net"], train.shape, given)
    classes = getattr(net, "num_classes", None)
    if classes is not None and classes != (train.num_classes or train.vectors):
        have = f"{train.num_classes} classes" if train.num_classes else "no labels"
        have = f"vectors of {train.vectors} entries" if train.vectors else have
        if have == "no labels" and (train.size is None or data.stream):
            have += " (those of a stream are used where data.classes says how many classes)"
        raise ConfigError(f"net.num_classes is {classes}, but the data have {have}")
    if classes is None and getattr(objective, "drop", 0.0) > 0:
        raise ConfigError(
            f"objective.drop={objective.drop} drops labels, but the network takes none: "
            "set net.num_classes"
        )
    check_augmentation(augment, net, train.shape)
    model = ScoreModel(net, process, predicts, shape=train.shape, scaler=scaler, given=given)

    resolved = {
        **describe_model(model),
        "data": _fields(data),
        "objective": describe(objective),
        "training": _fields(training),
        "sampling": _fields(sampling),
        "likelihood": _fields(likelihood),
    }
    left = remains(process, mean, variance)
    model.to(device)
    try_network(model, classes, device, objective.variance)
    return Job(
        folder, resolved, model, objective, training, sampling, likelihood,
        train, heldout, left, device, augment, data.dequantize,
    )  # fmt: skip


def with_workers(training: TrainingConfig, train: Source) -> TrainingConfig:
    """The settings, with the number of processes that read the data chosen if it is not said."""
    if training.workers is not None:
        return training
    return replace(training, workers=choose_workers(train, local_world()))


def probed(train: Source) -> Tensor:
    """Some items, looked at before anything is made for them, ``(n, *shape)``.

    Raises:
        DataError: if values of them are not finite.
    """
    seen = train.probe(PROBE)
    if not bool(seen.isfinite().all()):
        raise DataError(
            f"{train.name}: among the {len(seen)} items looked at first are values that are not "
            "finite; remove or replace them"
        )
    return seen


def local_world() -> int:
    """How many processes train on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def chosen_objective(section: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """The section of the objective; denoising score matching goes by the process's defaults."""
    if section.get("name", "dsm") == "dsm":
        return {"name": "dsm", **usual, **section}
    return dict(section)


def build_objective(section: Mapping[str, Any], train: Source) -> Any:
    """The objective of a section, for what is trained on."""
    objective = build(section, objectives, "objective")
    if isinstance(objective, objectives.Hybrid) and "levels" not in section:
        return replace(objective, levels=train.levels)
    return objective


def try_network(
    model: ScoreModel, classes: int | None, device: torch.device, variance: bool = False
) -> None:
    """Evaluates the network once on noise, at both ends of its times.

    Args:
        model: the untrained model.
        classes: of its network, None without a condition.
        device: where it is.
        variance: whether the objective trains a variance.

    Raises:
        ConfigError: if it does not take such items and conditions, or gives nothing to train.
    """
    sde, shape = model.sde, model.shape or ()
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    t = torch.tensor([sde.t_min, sde.t_max], device=device)
    cond = {} if classes is None else {"y": torch.arange(2, device=device) % classes}
    if model.given is not None:
        cond["image"] = model.given.draw(x, torch.Generator(device).manual_seed(0))
    try:
        with torch.no_grad(), evaluating(model):
            eps, v = model.noise_and_variance(x, t, **cond)
            check_used(model, cond, x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"net does not take the data: {str(error).splitlines()[0]}") from error
    if (v is not None) != variance:
        raise ConfigError(
            "net.out_channels: objective hybrid alone trains a variance; leave it out"
            if v is not None
            else "objective hybrid trains a variance: set net.out_channels to twice the channels"
        )
    if not bool(eps.isfinite().all()):
        raise ConfigError(
            "net gives no finite output: does parameterization.label suit net.embedding?"
        )


def resolve_auto(
    section: Mapping[str, Any], x: Tensor, mean: Tensor, variance: Tensor
) -> dict[str, Any]:
    """The sde section with each value ``auto`` replaced by one that fits the data."""
    name = section.get("name", "vp")
    fields = {k: v for k, v in section.items() if k != "name"}
    fixed = {k: v for k, v in fields.items() if v != "auto"}
    for key in fields.keys() - fixed.keys():
        if key == "sigma_max":
            fields[key] = round(auto_sigma_max(x), 3)
        elif key == "beta_max":

            def make(value: float) -> Any:
                return build({"name": name, **fixed, "beta_max": value}, sde, "sde")

            fields[key] = round(auto_beta_max(make, mean, variance), 3)
        else:
            raise ConfigError(f"sde.{key} cannot be auto; only sigma_max and beta_max can")
    return fields


def try_given(given: Any, shape: tuple[int, ...]) -> None:
    """Makes the image of one item, as it will be made of all.

    Raises:
        ConfigError: if such items have none.
    """
    try:
        image = given.draw(torch.zeros(1, *shape), torch.Generator())
        wrong = tuple(image.shape) != (1, given.channels(shape), *shape[1:])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"given {describe(given)['name']!r} does not suit items of shape {tuple(shape)}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if wrong:
        raise ConfigError(f"given makes an image of shape {tuple(image.shape[1:])}")


def build_net(section: Mapping[str, Any], shape: tuple[int, ...], given: Any = None) -> Any:
    """The network of a section, with its preset filled in, for items of ``shape``.

    Where it is ``given`` an image of each item, its input is as wide as that takes.
    """
    values = dict(section)
    name = values.pop("name", "mlp" if len(shape) == 1 else "unet")
    if given is not None:
        taking = [key for key, cls in names(nets).items() if hasattr(cls, "image_channels")]
        if name in names(nets) and name not in taking:
            raise ConfigError(f"the network {name} takes no image, which given needs; accepted: "
                              f"{', '.join(sorted(taking))}")  # fmt: skip
        values["image_channels"] = given.channels(shape)
    preset = values.pop("preset", None)
    if preset is not None:
        presets = getattr(names(nets).get(name), "presets", {})
        if preset not in presets:
            raise unknown(f"preset of {name}", preset, presets)
        values = {**presets[preset], **values}
    values.pop("shape", None)
    return build({"name": name, **values}, nets, "net", shape=tuple(shape))


def _fields(section: Any) -> dict[str, Any]:
    described = describe(section)
    described.pop("name")
    return described
