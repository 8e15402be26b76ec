r"""Exact log-likelihood: the probability-flow ODE, integrated with its divergence.

    dx/dt = f(x, t) - g(t)^2/2 score(x, t),    x(t_min) = x
    log p(x) = log p_T(x(t_max)) + int_{t_min}^{t_max} div (dx/dt) dt
             = prior             + delta

The divergence of the drift is taken in closed form and that of the score by reverse-mode
differentiation; :mod:`~scoresde.path` gives the coordinates of adaptive methods,
:mod:`~scoresde.likelihood.quadrature` the sum along a grid. The result is the density of the data
smoothed by the noise at ``t_min``, and says what is not known of it.

Sources: Score-Based Generative Modeling through Stochastic Differential Equations (Song et al.,
2021), https://arxiv.org/abs/2011.13456; FFJORD: Free-form Continuous Dynamics for Scalable
Reversible Generative Models (Grathwohl et al., 2019), https://arxiv.org/abs/1810.01367.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import grids
from ..conditions import check_used
from ..model import evaluating, per_sample
from ..precision import name_of, supported, tolerance
from ..sde.base import GaussianSDE
from ..solvers.base import Solver
from ..solvers.runge_kutta import first_of
from . import budget
from .budget import Account
from .integrate import MAX_NFE
from .result import LogProb
from .solve import Problem, Way, divergence_of
from .terminal import Terminal


def log_prob(
    score: Any,
    x: Tensor,
    *,
    divergence: str = "hutchinson",
    probes: int = 1,
    noise: str = "rademacher",
    method: str | dict[str, Any] | Solver = "dopri5",
    steps: int | None = None,
    grid: str | dict[str, Any] | grids.Grid | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    t_min: float | None = None,
    t_max: float | None = None,
    seed: int = 0,
    start_index: int = 0,
    max_nfe: int = MAX_NFE,
    terminal: Terminal | None = None,
    solver_error: bool = False,
    target_stderr: float | None = None,
    refine: int = 1,
    differentiable: bool | str = False,
    progress: Callable[[float, float, int], None] | None = None,
    **cond: Any,
) -> LogProb:
    r"""Log-likelihood of ``x`` under the probability-flow ODE of a score.

        log p(x) = log p_T(x_T) + int div (f - g^2/2 score) dt

    One evaluation of the score (and one vector-Jacobian product a probe) a stage of the method; on
    a grid, products at its points alone. Each sample takes steps of its own, and leaves the batch
    when it has arrived: its result does not depend on its neighbours beyond rounding.

    Args:
        score: ``score(x, t, **cond)`` that carries its ``.sde``.
        x: data in model range, floating point, shape ``(B, *shape)``; float64 is kept.
        divergence: ``"hutchinson"``, ``"exact"`` (D products), or ``"auto"``: exact up to 32
            dimensions.
        probes: Hutchinson probes a sample, fixed during the solve; two or more give their error.
        noise: distribution of the probes, ``"rademacher"``, ``"gaussian"`` or ``"walsh"``
            (:func:`~scoresde.likelihood.divergence.walsh`). Along a grid their signs turn from
            point to point, and most of their error cancels.
        method: ``"dopri5"``, ``"bosh3"``, or ``"dop853"`` for tolerances below 1e-6; ``"euler"``,
            ``"midpoint"``, ``"heun2"``, ``"heun3"``, ``"rk4"`` with ``steps``; and, with one step
            for the whole batch, ``"torchdiffeq-dopri5"``, ``"torchdiffeq-dopri8"``,
            ``"torchdiffeq-bosh3"``, ``"torchdiffeq-adaptive_heun"`` (the worst sample decides),
            ``"scipy-rk45"``, ``"scipy-dop853"`` (the mean of the batch decides). Or a solver of
            :mod:`scoresde.solvers` that follows the ODE along a grid, its name or its section,
            with ``steps``: ``{"name": "unipc", "points": 2}`` costs one evaluation a step.
        steps: number of steps of a fixed-step method.
        grid: of a solver's steps, its name or its section; equal steps in log-SNR if None.
        rtol: relative tolerance of a step, of the state (root mean square over a sample) and of
            the nats a dimension; not below 1e-6 for a float32 state.
        atol: absolute tolerance, likewise.
        t_min: start, >= the trained ``sde.t_min``; default ``sde.t_min_likelihood``.
        t_max: end; default ``sde.t_max``. An earlier end needs a ``terminal`` to fit it.
        seed: key of the probes.
        start_index: index of the first sample: a sample's probes do not depend on its batch.
        max_nfe: evaluations that a sample may take in one solve; with a target, in all.
        terminal: None for the prior ``N(0, prior_std^2)``, or ``(mean, spread)`` of the data in
            model range, ``mean`` broadcastable to ``shape`` and ``spread`` standard deviations
            likewise, or the covariance ``(D, D)``: then the Gaussian of those moments at
            ``t_max``, which removes most of the prior's mismatch.
        solver_error: whether to estimate what the steps leave, by a second solve with half the
            steps or ten times the tolerance.
        target_stderr: standard error in nats to reach for each sample: steps and probes are then
            added where they pay, from those given here on, until it is met or ``max_nfe`` is
            spent.
        refine: factor on the steps, or for each doubling a tenth of the tolerance, with the probes
            as they are unrefined: the difference is what the steps leave.
        differentiable: True for a result that carries gradients with respect to ``x`` and the
            parameters of the score, by backpropagation through the steps, ``"adjoint"`` by
            the adjoint ODE, solved by torchdiffeq: constant memory, and much slower.
        progress: called as ``progress(fraction, t, nfe)`` about each step, with the mean fraction
            of the way that the samples have gone, the time there, and the most evaluations spent.
        cond: passed to the score; of tensors, one value a sample.

    Returns:
        A :class:`LogProb`. A sample whose solve is given up has ``converged=False``, nan in place
        of its likelihood, and as ``latent`` the state that was reached; a message says why.

    Raises:
        ValueError: integer or non-finite ``x``, times outside the trained ones, or an unknown or
            unfitting option.
    """
    sde, x = score.sde, _checked(x, keep_graph=bool(differentiable))
    if refine < 1:
        raise ValueError(f"refine must be at least 1, got {refine}")
    way = Way(method, steps, grid, rtol, atol, max_nfe)
    if steps is None:
        way = replace(way, rtol=tolerance(rtol, x.dtype), atol=tolerance(atol, x.dtype))
    way = way.refined(refine, x.dtype)
    way.chosen()  # refuses what does not fit before anything is spent
    t_min = sde.t_min_likelihood if t_min is None else float(t_min)
    t_max = sde.t_max if t_max is None else float(t_max)
    _check_times(sde, t_min, t_max)
    if terminal is None and t_max < sde.t_max:
        warnings.warn(
            f"the prior belongs to t_max={sde.t_max:g}, not to {t_max:g}: log_prob is the density "
            "only with terminal=(mean, spread)",
            stacklevel=2,
        )
    divergence = divergence_of(divergence, x)
    budget.check(target_stderr, probes, way)
    started = time.perf_counter()
    cond = per_sample(cond, x)
    check_used(score, cond, x)
    with evaluating(score):
        problem = Problem(
            score, x, cond, t_min, t_max, terminal, divergence, noise, seed,
            start_index,
        )  # fmt: skip
        if differentiable:
            if solver_error or target_stderr is not None:
                raise ValueError(
                    "a differentiable likelihood is one solve: leave out solver_error and "
                    "target_stderr"
                )
            account = budget.with_gradients(problem, way, probes, differentiable)
        else:
            # Tensors made under inference_mode carry no graph, whatever enable_grad says.
            with torch.inference_mode(False), torch.no_grad():
                problem = problem.cloned()
                account = budget.spend(problem, way, probes, solver_error, target_stderr, progress)
    return _result(problem, account, time.perf_counter() - started)


def _result(problem: Problem, account: Account, seconds: float) -> LogProb:
    """What an account comes to."""
    x, failures = problem.x, account.failures
    converged = torch.ones(len(x), dtype=torch.bool, device=x.device)
    converged[list(failures)] = False
    message = account.message
    if failures:
        item, reason = first_of(failures)
        where = f"t={float(account.t[item]):.6g}, nfe={int(account.nfe[item])}"
        message = f"{reason} (item {item}, {where}, {name_of(x.dtype)})"
    lost = ~converged

    def known(values: Tensor) -> Tensor:
        return values.masked_fill(lost, float("nan"))

    scaler = getattr(problem.score, "scaler", None)
    return LogProb(
        log_prob=known(account.log_prob),
        prior=known(account.prior),
        delta=known(account.delta),
        log_det=0.0 if scaler is None else scaler.log_det(tuple(x.shape[1:])),
        stderr=known(account.stderr),
        stderr_probes=known(account.stderr_probes),
        stderr_dequantization=known(torch.zeros_like(account.prior)),
        stderr_solver=known(account.stderr_solver),
        freedom=account.freedom,
        estimates=account.estimates,
        latent=account.latent,
        nfe=account.nfe.to(x.device),
        converged=converged,
        message=message,
        seconds=seconds,
        divergence=problem.divergence,
        probes=int(account.probes.max()),
        noise=problem.noise,
        t_min=problem.t_min,
        t_max=problem.t_max,
        seed=problem.seed,
        start_index=problem.start_index,
        weights=getattr(problem.score, "weights", None),
        **account.way.described(),
    )


def _checked(x: Tensor, keep_graph: bool) -> Tensor:
    """``x`` as float32 or float64, refused where it cannot have a density."""
    if not x.is_floating_point():
        raise ValueError(
            f"x has dtype {x.dtype}, a density needs floating point: take integer data to model "
            "range first, by scaler.encode(x), or see data_log_prob"
        )
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"x must have shape (B, *shape) and not be empty, got {tuple(x.shape)}")
    finite = x.flatten(1).isfinite().all(1)
    if not bool(finite.all()):
        raise ValueError(f"item {int((~finite).nonzero()[0])} of x is not finite")
    x = x if keep_graph else x.detach()
    return x.to(supported(torch.promote_types(x.dtype, torch.float32), x.device))


def _check_times(sde: GaussianSDE, t_min: float, t_max: float) -> None:
    if t_min < sde.t_min:
        raise ValueError(
            f"t_min={t_min:g} is below the trained t_min={sde.t_min:g} of {type(sde).__name__}"
        )
    if not t_min < t_max <= sde.t_max:
        raise ValueError(
            f"the likelihood needs t_min < t_max <= {sde.t_max:g}, "
            f"got t_min={t_min:g}, t_max={t_max:g}"
        )
