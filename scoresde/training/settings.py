"""The sections of a configuration that say how a run trains, draws and evaluates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from .. import grids, solvers
from ..config import build, unknown
from ..likelihood.integrate import MAX_NFE
from ..likelihood.stepped import choose
from .ema import LONGEST


@dataclass(frozen=True)
class TrainingConfig:
    """How a network is trained.

    Args:
        batch_size: items a step, over all processes.
        accumulate: parts in which a process goes through its items of a step, to save memory.
        lr: peak learning rate of Adam.
        warmup: steps over which the learning rate rises from zero.
        decay: course of the learning rate after that, over the run: constant or cosine to zero.
        betas: decays of the moments of Adam.
        weight_decay: decoupled decay of the weights (AdamW).
        clip: largest norm of the gradient, 0 for none.
        ema: decay of the average of the weights, which is warmed up.
        half_lives: further averages by their half-lives, in items.
        lengths: further averages by the relative length of their power function (EDM2); their
            snapshots give an average of any length after training.
        snapshots: snapshots of those averages over the run.
        steps: length of the run in steps.
        epochs: length of the run in passes over the data.
        minutes: length of the run in minutes; the first bound that is met ends the run.
        precision: dtype of the network's arithmetic; float16 with a scaled loss.
        compile: whether to compile the network (torch.compile).
        shard: whether processes share the weights and the optimizer's state (FSDP2), for a
            network that does not fit one device.
        workers: processes that read the data, where they are not held in memory; None chooses.
        patience: steps in a row that may be skipped as not finite.
        track: where figures and pictures go besides the logs: auto (TensorBoard if installed),
            tensorboard, wandb or none.
        log_every: steps between rows of the log, at which the device is waited for.
        checkpoint_every: steps between checkpoints.
        keep: number of checkpoints kept.
        evaluations: times that held-out loss and samples are made over the run.
        seed: seed of weights, batches and noise.
    """

    batch_size: int = 128
    accumulate: int = 1
    lr: float = 2e-3
    warmup: int = 100
    decay: Literal["constant", "cosine"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.999
    half_lives: tuple[float, ...] = ()
    lengths: tuple[float, ...] = ()
    snapshots: int = 16
    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False
    shard: bool = False
    workers: int | None = None
    patience: int = 10
    track: Literal["auto", "tensorboard", "wandb", "none"] = "auto"
    log_every: int = 20
    checkpoint_every: int = 1000
    keep: int = 2
    evaluations: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for key in (
            "batch_size", "accumulate", "log_every", "checkpoint_every", "keep", "patience",
            "snapshots",
        ):  # fmt: skip
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        for key in ("steps", "epochs", "minutes"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ValueError(f"{key} must be positive, got {value}")
        for key in ("warmup", "clip", "evaluations", "workers", "weight_decay"):
            if (getattr(self, key) or 0) < 0:
                raise ValueError(f"{key} must not be negative, got {getattr(self, key)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
        if not all(v > 0 for v in self.half_lives):
            raise ValueError(f"half_lives must be positive, got {list(self.half_lives)}")
        if not all(0 < v < LONGEST for v in self.lengths):
            raise ValueError(f"lengths must be in (0, {LONGEST:.4g}), got {list(self.lengths)}")
        if not all(0 <= v < 1 for v in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {list(self.betas)}")

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
