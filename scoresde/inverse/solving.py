"""One entry for all methods: a score, an operator and a measurement to samples of what it was."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import make_dataclass
from typing import Any, get_type_hints

import torch
from torch import Tensor

from ..config import ConfigError, construct, names, resolve, unknown, validate
from ..model import Cost
from ..samples import Samples
from ..sampling import sample
from ..solvers.base import Solver
from . import methods
from .measured import check_items
from .operator import Operator
from .smc import smc

SMC = "smc"
"""The method that is no class: particles, see :func:`~scoresde.inverse.smc`."""


def accepted() -> list[str]:
    """The names of the methods."""
    return sorted([*names(methods), SMC])


def solve(
    score: Any,
    operator: Operator,
    y: Tensor,
    /,
    *,
    noise_std: float = 0.0,
    method: str | Mapping[str, Any] | None = None,
    draws: int = 1,
    solver: str | dict[str, Any] | Solver | None = None,
    steps: int | None = None,
    grid: Any = None,
    seed: int = 0,
    start_index: int = 0,
    threshold: str | Mapping[str, Any] | None = None,
    progress: bool = False,
    device: torch.device | str | None = None,
    **cond: Any,
) -> Samples:
    """Samples of ``p(x_0 | y)`` for ``y = A x_0 + noise_std e``.

    Args:
        score: the score of the data, guided or not.
        operator: the linear map ``A``.
        y: measurements in model range, ``(N, *operator.out)``; given by its place, since a
            condition may be called ``y`` too.
        noise_std: standard deviation of their noise in model range, >= 0.
        method: name of a method, or its section ``{name: mmps, iterations: 3}``; by default
            ``trained`` for a model that was given measurements in training, else ``pgdm``.
        draws: samples for each measurement, >= 1.
        solver: what steps the guided score, or the solver inside of ``replacement`` and
            ``repaint``; by default the method's own choice.
        steps: number of steps; by default the method's.
        grid: where they lie; by default the solver's.
        seed: seed of all noise.
        start_index: index of the first sample, for a batch out of a longer series.
        threshold: whether denoised data are kept in ``[-1, 1]``, see :func:`scoresde.sample`.
        progress: whether to show a bar after two seconds.
        device: device of the state; by default that of the score.
        cond: conditions of the score, one value a measurement or one a sample.

    Returns:
        Samples ``(N draws, *shape)``, those of a measurement in a row.

    Raises:
        ConfigError: for an unknown method or option, or one that does not suit the method.
        ValueError: for a measurement or number that does not fit.
    """
    section: dict[str, Any]
    if not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws must be a whole number >= 1, got {draws}")
    method = default_method(score) if method is None else method
    if not isinstance(method, (str, Mapping)):
        raise ConfigError(f"method must be a name or a section, got {method!r}")
    section = {"name": method} if isinstance(method, str) else dict(method)
    name = section.pop("name", None)
    check_items(score, operator)
    rows = operator.measurements(y).repeat_interleave(draws, 0)
    shape = (len(rows), *operator.shape)
    drawn: dict[str, Any] = {
        "steps": steps, "grid": grid, "seed": seed, "start_index": start_index,
        "threshold": threshold, "progress": progress, "device": device,
    }  # fmt: skip
    if name == SMC:
        if solver is not None or threshold is not None:
            raise ConfigError(
                "method 'smc' is a solver of its own: leave out solver and threshold"
            )
        drawn = {key: value for key, value in drawn.items() if value is not None}
        if drawn.pop("start_index") % draws:
            raise ConfigError(
                "method 'smc' makes the draws of a measurement together: "
                f"start_index={start_index} is no multiple of draws={draws}"
            )
        return particles(
            score, operator, y, noise_std, draws, start_index // draws, section, drawn | cond
        )
    cond = {k: spread(v, len(y), draws) for k, v in cond.items()}
    if name not in accepted():
        raise unknown("method", name, accepted())
    cls: Any = resolve(name, methods, "method")
    given = {"operator": operator, "y": rows, "noise_std": noise_std}
    for key in ("score", *given):
        if key in section:
            raise unknown(f"key method.{key} of {cls.__name__}:", key, options(cls))
    if issubclass(cls, Solver):
        if solver is not None:
            if "solver" not in options(cls):
                raise ConfigError(f"method {name!r} is a solver of its own: leave out solver")
            section["solver"] = solver
        return sample(
            score, shape, solver=construct(cls, section, "method", **given), **drawn, **cond
        )
    # One measurement a sample goes as a condition, which solvers take apart with the others.
    given["y"] = rows[:1]
    chosen: Any = cls.default_solver if solver is None else solver
    if solver is None:
        drawn["steps"] = cls.default_steps if steps is None else steps
        drawn["grid"] = cls.default_grid if grid is None else grid
    if drawn["steps"] is not None:
        section = {**cls.suited(drawn["steps"]), **section}
    led = construct(cls, section, "method", score=score, **given)
    return sample(led, shape, solver=chosen, **drawn, measurement=rows, **cond)


def particles(
    score: Any,
    operator: Operator,
    y: Tensor,
    noise_std: float,
    draws: int,
    first: int,
    section: dict[str, Any],
    settings: dict[str, Any],
) -> Samples:
    """``draws`` samples of one run of particles for each measurement, 64 or as many as draws.

    Args:
        first: index of the first run.
        section: options of :func:`~scoresde.inverse.smc`.
        settings: what else it is told.

    Raises:
        ConfigError: for an option that it does not have.
    """
    known = [name for name in inspect.signature(smc).parameters if name in SMC_OPTIONS]
    for key in section:
        if key not in known:
            raise unknown("key method." + key + " of smc:", key, known)
    hints = get_type_hints(smc)
    kept = make_dataclass("smc", [(name, hints[name]) for name in known])
    section = {"particles": max(64, draws), **validate(kept, section, "method")}
    out = smc(
        score, operator, y, noise_std, draws=len(y), start_index=first, **section, **settings
    )
    share = section["particles"] / draws  # what one sample takes of a run
    spent = Cost(math.ceil(out.cost.forwards * share), math.ceil(out.cost.products * share))
    return Samples(
        x=out.sample(draws), nfe=math.ceil(out.nfe * share), seconds=out.seconds,
        converged=out.converged, message=out.message, solver=out.solver, grid=out.grid,
        steps=out.steps, seed=out.seed, t_start=out.t_start, t_end=out.t_end,
        weights=out.weights, cost=spent,
    )  # fmt: skip


SMC_OPTIONS = (
    "particles", "twist", "order", "sigma_data", "resample", "threshold", "t_end", "batch",
)  # fmt: skip
"""Options of ``smc`` that its section takes."""


def default_method(score: Any) -> dict[str, Any]:
    """The section of the method that suits a score."""
    return {"name": "pgdm" if getattr(score, "given", None) is None else "trained"}


def options(cls: Any) -> list[str]:
    """The options of a method, as its section takes them."""
    fixed = ("self", "score", "operator", "y", "noise_std")
    return [name for name in inspect.signature(cls).parameters if name not in fixed]


def spread(value: Any, count: int, draws: int) -> Any:
    """A condition of ``count`` measurements as one of all samples."""
    if isinstance(value, Tensor) and value.ndim and len(value) == count:
        return value.repeat_interleave(draws, 0)
    return value
