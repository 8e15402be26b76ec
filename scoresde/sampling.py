"""Sampling: prior, grid, solver, a last denoising, and an account of how it was done."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import grids, solvers
from .brownian import BrownianPath
from .conditions import check_used
from .config import ConfigError, build, describe
from .likelihood.along import Along, check_density
from .model import Cost, evaluating, home, per_sample
from .noise import KeyedNoise
from .precision import supported
from .samples import Samples, join
from .sde.base import SDE, as_time
from .solvers.base import Callback, Solver
from .thresholding import Threshold
from .tuning.files import recall, tuned_solver


@torch.inference_mode(False)  # whose tensors carry no graph, which a density needs
@torch.no_grad()
def sample(
    score: Any,
    shape: tuple[int, ...] | None = None,
    *,
    solver: str | dict[str, Any] | Solver | None = None,
    steps: int | None = None,
    grid: str | dict[str, Any] | grids.Grid | None = None,
    seed: int = 0,
    x_T: Tensor | None = None,
    t_start: float | None = None,
    t_end: float | None = None,
    denoise: bool | None = None,
    threshold: str | Mapping[str, Any] | None = None,
    log_prob: bool = False,
    divergence: str = "hutchinson",
    probes: int = 1,
    start_index: int = 0,
    brownian: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    **cond: Any,
) -> Samples:
    """Runs the reversed process from the prior, or from ``x_T``, down to ``t_end``.

    Noise is keyed by ``seed`` and by the index of the sample, so a sample does not depend on the
    batch that it is drawn in, unless the solver's steps do (``ode`` and ``ode-scipy`` if told to
    take the batch ``together``).

    Args:
        score: ``score(x, t, **cond)`` that carries its ``sde``; a module is put into evaluation
            mode meanwhile.
        shape: ``(B, *item)``; not needed beside ``x_T``.
        solver: solver, its name or its section; if None that of a tuned grid, and for any other
            ``score.sde.default_solver``. The multistep methods take their last steps with all of
            their points, or with fewer and fewer if their ``lower_last=True`` (False by default).
        steps: number of steps; the solver's own number if None.
        grid: grid, its name, its section, or the path of a file of tuned grids; the solver's own
            if None. ``"tuned"`` stands for the points that ``scoresde tune`` saved with the model
            for this solver and step count.
        seed: seed of the prior's and of the solver's noise.
        x_T: state at ``t_start``, shape ``(B, *item)``, instead of a draw from the prior. A
            stochastic solver's noise is the same with either.
        t_start: time of the state to start from, ``t_max`` if None.
        t_end: time to stop at, ``sde.t_min_sampling`` if None, not below ``sde.t_min``.
        denoise: whether to end with ``E[x_0 | x]``, one more evaluation; by default True,
            but False with ``log_prob``, since the density is that of the state.
        threshold: whether denoised data are kept in ``[-1, 1]``: None (the default) leaves them,
            ``"static"`` clamps, ``"dynamic"`` scales by a quantile as well, and a mapping gives
            the fields of :class:`scoresde.Threshold`.
        log_prob: whether to integrate the log-densities of the samples along with them, by a
            deterministic solver; an evaluation then has a vector-Jacobian product a probe as well.
        divergence: ``"hutchinson"``, ``"exact"`` (D products), or ``"auto"``: exact up to 32
            dimensions.
        probes: Hutchinson probes a sample, those of :func:`scoresde.log_prob` for the same seed.
        start_index: index of the first sample, for a batch out of a longer series.
        brownian: whether the steps' noise is that of one Brownian path a sample (see
            :mod:`scoresde.brownian`): then more steps, or another solver of the reverse SDE, come
            closer to one end point. Other draws stay as they are: the prior's, Langevin's, and
            the churn of ``edm``, which belong to no step of the reverse SDE.
        device: device of the state; by default that of the score.
        dtype: float32 or float64, of the state; by default that of ``x_T`` or of the score.
        callback: called as ``callback(step, t, x)`` after each step.
        progress: whether to show a bar after two seconds.
        cond: conditions, one value a sample, given to the score at each call.

    Raises:
        ValueError: for a shape, time, step count, dtype or condition that does not fit, for a
            condition that a network does not depend on (each is asked once), or for ``log_prob``
            with a stochastic solver, a threshold, a denoised end or a later start, or for a path
            of a process without a log-SNR.
        ConfigError: for an unknown solver, grid, threshold or divergence.
    """
    began = time.perf_counter()
    sde: SDE = score.sde
    method = solver_of(score, solver, steps, grid)
    start, end = _interval(sde, t_start, t_end, x_T is None)
    if log_prob:
        check_density(method, sde, start, denoise, threshold)
    denoise = not log_prob if denoise is None else denoise
    places, times = place(score, method, steps, grid, start, end)
    brownian = brownian or method.brownian
    if brownian and not hasattr(sde, "log_snr"):
        raise ValueError(f"a Brownian path needs a process with a log-SNR, not {sde!r}")
    noise = BrownianPath(seed, start_index) if brownian else KeyedNoise(seed, start_index)
    x = first = initial(score, sde, noise, shape, x_T, device, dtype)
    led, cond = Threshold.of(score, threshold), per_sample(cond, x)
    check_used(score, cond, x)
    clipped = led.section if isinstance(led, Threshold) else None
    along = None
    if log_prob:
        along = led = Along(score, x, divergence, probes, seed, start_index)
        x, cond = along.open(x), {**cond, **along.cond}
        callback = along.showing(callback)
    reverse, moves = method.reverse(led, **cond), len(method.route(times)) - 1
    with evaluating(score), reporting(callback, progress, moves) as report:
        solution = method.integrate(reverse, x, times, noise, report)
        x, converged, message = solution.x, solution.converged, solution.message
        t = as_time(solution.t, x)
        if denoise:
            x = method.denoise(reverse, x, t)
            if not bool(x.isfinite().all()) and converged:
                converged, message = False, f"non-finite after denoising at t={float(t.max()):.6g}"
    density: dict[str, Any] = {}
    if along is not None:
        x, density = along.data(x), along.density(first, start, solution, end)
    return Samples(
        x=x,
        nfe=reverse.nfe if solution.nfe is None else reverse.nfe + solution.nfe,
        cost=Cost(reverse.forwards, reverse.products) if solution.nfe is None else None,
        seconds=time.perf_counter() - began,
        converged=converged,
        message=message,
        solver=describe(method),
        grid=None if places is None else describe(places),
        steps=None if places is None else len(times) - 1,
        seed=seed,
        t_start=start,
        t_end=float(t.max()),
        weights=getattr(score, "weights", None),
        rounds=None if solution.rounds is None else solution.rounds + reverse.nfe,
        denoised=denoise,
        threshold=clipped,
        **density,
        brownian=brownian,
    )


def pick(section: Any, package: Any, kind: str, base: type) -> Any:
    """The object that ``section`` names, of the wanted kind."""
    chosen = build(section, package, kind)
    if not isinstance(chosen, base):
        raise ConfigError(f"{kind} must be a name, a section or a {base.__name__}, got {chosen!r}")
    return chosen


def solver_of(score: Any, solver: Any, steps: int | None, grid: Any) -> Solver:
    """The solver that is asked for, or that suits the grid or else the process."""
    if solver is None:
        places = None if grid is None else grids.grid_of(grid)
        if isinstance(places, grids.Tuned) and not places.log_snr:
            solver = tuned_solver(score, places, steps)
        else:
            solver = score.sde.default_solver
    chosen: Solver = pick(solver, solvers, "solver", Solver)
    return chosen


def _interval(
    sde: SDE, t_start: float | None, t_end: float | None, from_prior: bool
) -> tuple[float, float]:
    """The two ends, checked against the trained times."""
    start = sde.t_max if t_start is None else float(t_start)
    end = sde.t_min_sampling if t_end is None else float(t_end)
    if not end >= sde.t_min:
        raise ValueError(f"t_end={end:g} is below the trained t_min={sde.t_min:g}")
    if not start <= sde.t_max:
        raise ValueError(f"t_start={start:g} is above the trained t_max={sde.t_max:g}")
    if not end < start:
        raise ValueError(f"sampling needs t_end < t_start, got t_end={end:g}, t_start={start:g}")
    if from_prior and start < sde.t_max:
        raise ValueError(
            f"t_start={start:g} needs x_T, a state at that time: "
            f"the prior belongs to t_max={sde.t_max:g}"
        )
    return start, end


def place(
    score: Any, method: Solver, steps: int | None, grid: Any, start: float, end: float
) -> tuple[grids.Grid | None, Tensor]:
    """The grid and its times; no grid and the two ends for a solver that chooses its steps."""
    sde = score.sde
    if method.default_steps is None or method.default_grid is None:
        if steps is not None or grid is not None:
            name = describe(method)["name"]
            raise ValueError(
                f"solver {name!r} chooses its own steps: leave out steps and grid, "
                "and set its tolerances"
            )
        return None, torch.tensor([start, end], dtype=torch.float64)
    places = grids.grid_of(method.default_grid if grid is None else grid)
    if isinstance(places, grids.Tuned):
        places = recall(score, places, method, steps)
        steps = len(places.log_snr) - 1 if steps is None else steps
    count = method.default_steps if steps is None else steps
    if not method.stochastic:
        _warn_of_few(sde, method, count, places)
    return places, places(sde, count, start, end)


def _warn_of_few(sde: Any, method: Solver, steps: int, grid: grids.Grid) -> None:
    """Warns of a deterministic solver with too few steps for the networks of a process (VE)."""
    nfe = steps * method.nfe_per_step + 1
    if grid.for_few_steps:
        few, has, needs = nfe < sde.ode_min_nfe, f"{nfe} evaluations", f"{sde.ode_min_nfe} or more"
    else:
        few, has = (
            steps < sde.ode_min_steps,
            f"{steps} step{'s' * (steps > 1)} on the grid {describe(grid)['name']!r}",
        )
        needs = f"the grid 'karras' with {sde.ode_min_nfe} evaluations, {sde.ode_min_steps} steps"
    if few:
        warnings.warn(
            f"{has} of the deterministic {describe(method)['name']!r} give noisy samples from "
            f"trained {type(sde).__name__} models: take {needs}, or the solver "
            f"{sde.default_solver!r}",
            stacklevel=6,  # the caller of sample(), through the two wrappers around it
        )


def initial(
    score: Any,
    sde: SDE,
    noise: KeyedNoise,
    shape: tuple[int, ...] | None,
    x_T: Tensor | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """The state to start from; afterwards ``noise`` stands at the solver's first draw."""
    own_device, own_dtype = home(score)
    if x_T is not None:
        if not (isinstance(score, nn.Module) or hasattr(score, "device")):
            own_device = x_T.device
        own_dtype = x_T.dtype if x_T.dtype in _DTYPES else own_dtype
    dtype = own_dtype if dtype is None else dtype
    if dtype not in _DTYPES:
        raise ValueError(f"the state is kept in float32 or float64, got dtype={dtype}")
    shape = shape if x_T is None else tuple(x_T.shape)
    if shape is None:
        raise ValueError("sample needs a shape (B, *item) or a state x_T")
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"sample needs a shape (B, *item) without empty axes, got {tuple(shape)}")
    device = device or own_device
    dtype = supported(dtype, device)
    if x_T is None:
        x = sde.prior_sample(tuple(shape), noise, device=device, dtype=dtype)
    else:
        x = x_T.detach().to(device, dtype)
    noise.draw = max(noise.draw, 1)  # the first draw is the prior's, used or not
    return x


_DTYPES = (torch.float32, torch.float64)


@contextmanager
def reporting(
    callback: Callback | None, progress: bool, steps: int, what: str = "sampling"
) -> Iterator[Callback | None]:
    """The callback, with a bar beside it if wanted."""
    if not progress:
        yield callback
        return
    from tqdm import tqdm

    # A solver that chooses its steps does not know their number.
    with tqdm(total=steps if steps > 1 else None, desc=what, delay=2, leave=False) as bar:

        def report(step: int, t: float, x: Tensor) -> None:
            bar.set_postfix(t=f"{t:.4g}", refresh=False)
            bar.update()
            if callback is not None:
                callback(step, t, x)

        yield report


__all__ = ["Samples", "join", "sample"]
