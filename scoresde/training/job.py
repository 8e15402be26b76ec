"""From a configuration to everything that a training run needs, checked before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .. import grids, nets, parameterization, sde, solvers
from ..checkpoint import describe_model
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
from ..data import DataConfig, Dataset, Scaler, load_splits
from ..likelihood.integrate import MAX_NFE
from ..likelihood.stepped import choose
from ..model import ScoreModel, evaluating
from ..sde.terminal import Remains, auto_beta_max, auto_sigma_max, remains
from .objective import DSM

DEFAULT: dict[str, dict[str, Any]] = {
    "sde": {"name": "vp"},
    "parameterization": {},
    "net": {"preset": "tiny"},
    "data": {"source": "digits"},
    "objective": {},
    "training": {},
    "sampling": {},
    "likelihood": {},
}


@dataclass(frozen=True)
class TrainingConfig:
    """How a network is trained.

    Args:
        batch_size: items a step.
        lr: peak learning rate of Adam.
        warmup: steps over which the learning rate rises from zero.
        decay: course of the learning rate after that, over the run: constant or cosine to zero.
        clip: largest norm of the gradient, 0 for none.
        ema: decay of the average of the weights.
        steps: length of the run in steps.
        epochs: length of the run in passes over the data.
        minutes: length of the run in minutes; the first bound that is met ends the run.
        precision: dtype of the network's arithmetic.
        compile: whether to compile the network (torch.compile).
        checkpoint_every: steps between checkpoints.
        keep: number of checkpoints kept.
        evaluations: times that held-out loss and samples are made over the run.
        seed: seed of weights, batches and noise.
    """

    batch_size: int = 128
    lr: float = 2e-3
    warmup: int = 100
    decay: Literal["constant", "cosine"] = "cosine"
    clip: float = 1.0
    ema: float = 0.999
    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    checkpoint_every: int = 1000
    keep: int = 2
    evaluations: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("batch_size", "checkpoint_every", "keep"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        for key in ("steps", "epochs", "minutes"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ValueError(f"{key} must be positive, got {value}")
        for key in ("warmup", "clip", "evaluations"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} must not be negative, got {getattr(self, key)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")

    @property
    def bounded(self) -> bool:
        """Whether the run has an end."""
        return any(v is not None for v in (self.steps, self.epochs, self.minutes))


@dataclass(frozen=True)
class SamplingConfig:
    """How a run draws its own pictures: a quick solver that serves every process."""

    solver: Any = "vabm"
    steps: int | None = None
    grid: Any = None
    count: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        solver = build(self.solver, solvers, "sampling.solver")
        chooses = solver is not None and solver.default_steps is None
        if chooses and (self.steps is not None or self.grid is not None):
            raise ValueError("the solver chooses its own steps: leave out steps and grid")
        build(self.grid, grids, "sampling.grid")


@dataclass(frozen=True)
class LikelihoodConfig:
    """How a run evaluates the likelihood of held-out items.

    Args:
        items: number of held-out items, 0 for none.
        draws: dequantisation draws an item, for discrete data.
        divergence: ``hutchinson``, ``exact`` or ``auto``.
        probes: probes of the Hutchinson estimator.
        method: ODE method, or the name or section of a solver.
        steps: of a method with fixed steps.
        grid: of a solver's steps, its name or its section.
        rtol: relative tolerance of an adaptive method.
        atol: absolute tolerance of an adaptive method.
        seed: seed of dequantisation and probes.
    """

    items: int = 128
    draws: int = 1
    divergence: str = "auto"
    probes: int = 1
    method: Any = "dopri5"
    steps: int | None = None
    grid: Any = None
    rtol: float = 1e-5
    atol: float = 1e-5
    seed: int = 0

    def __post_init__(self) -> None:
        choose(self.method, self.steps, self.grid, MAX_NFE)
        if self.divergence not in ("auto", "exact", "hutchinson"):
            raise unknown("divergence", self.divergence, ("auto", "exact", "hutchinson"))
        if self.items < 0 or self.draws < 1 or self.probes < 1:
            raise ValueError("items must be at least 0, draws and probes at least 1")
        if not (self.rtol > 0 and self.atol > 0):
            raise ValueError(f"rtol and atol must be positive, got {self.rtol} and {self.atol}")


@dataclass
class Job:
    """A training run, ready to go."""

    folder: Path
    config: dict[str, Any]
    model: ScoreModel
    objective: DSM
    training: TrainingConfig
    sampling: SamplingConfig
    likelihood: LikelihoodConfig
    train: Dataset
    heldout: Dataset
    left: Remains
    device: torch.device

    @property
    def conditional(self) -> bool:
        """Whether the network takes the labels of the data."""
        return getattr(self.model.net, "num_classes", None) is not None


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
    objective = construct(DSM, {**cls.default_objective, **config["objective"]}, "objective")

    train, heldout = load_splits(data)
    scaler = Scaler.fit(train, data.scaler)
    probe = scaler.encode(train.x[:5000], dequantize=False).double()
    mean, variance = probe.mean(0), probe.var(0, unbiased=False)
    section = resolve_auto(config["sde"], probe, mean, variance)
    process = build({"name": config["sde"].get("name", "vp"), **section}, sde, "sde")

    section = dict(config["parameterization"])
    section.setdefault("name", cls.default_parameterization)
    section.setdefault("sigma_data", round(float(probe.std()), 4))
    predicts = build(section, parameterization, "parameterization")

    with torch.random.fork_rng([]):  # layers draw their weights from torch's global generator
        torch.manual_seed(training.seed)
        net = build_net(config["net"], train.shape)
    classes = getattr(net, "num_classes", None)
    if classes is not None and classes != train.num_classes:
        have = f"{train.num_classes} classes" if train.num_classes else "no labels"
        raise ConfigError(f"net.num_classes is {classes}, but the data have {have}")
    model = ScoreModel(net, process, predicts, shape=train.shape, scaler=scaler)

    resolved = {
        **describe_model(model),
        "data": _fields(data),
        "objective": _fields(objective),
        "training": _fields(training),
        "sampling": _fields(sampling),
        "likelihood": _fields(likelihood),
    }
    left = remains(process, mean, variance)
    model.to(device)
    try_network(model, classes, device)
    return Job(
        folder, resolved, model, objective, training, sampling, likelihood,
        train, heldout, left, device,
    )  # fmt: skip


def try_network(model: ScoreModel, classes: int | None, device: torch.device) -> None:
    """Evaluates the network once on noise, at both ends of its times.

    Raises:
        ConfigError: if it does not take such items and conditions, or gives nothing to train.
    """
    sde, shape = model.sde, model.shape or ()
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    t = torch.tensor([sde.t_min, sde.t_max], device=device)
    cond = {} if classes is None else {"y": torch.arange(2, device=device) % classes}
    try:
        with torch.no_grad(), evaluating(model):
            eps, v = model.noise_and_variance(x, t, **cond)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"net does not take the data: {str(error).splitlines()[0]}") from error
    if v is not None:
        raise ConfigError("net.out_channels: nothing here trains a variance; leave it out")
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


def build_net(section: Mapping[str, Any], shape: tuple[int, ...]) -> Any:
    """The network of a section, with its preset filled in, for items of ``shape``."""
    values = dict(section)
    name = values.pop("name", "mlp" if len(shape) == 1 else "unet")
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
