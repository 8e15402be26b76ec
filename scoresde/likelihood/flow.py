r"""Exact log-likelihood: the probability-flow ODE, integrated with its divergence.

    dx/dt = f(x, t) - g(t)^2/2 score(x, t),    x(t_min) = x
    log p(x) = log p_T(x(t_max)) + int_{t_min}^{t_max} div (dx/dt) dt
             = prior             + delta

The divergence of the drift is taken in closed form and that of the score by reverse-mode
differentiation; :mod:`~scoresde.likelihood.path` gives the coordinates of the integration. The
result is the density of the data smoothed by the noise at ``t_min``.

Sources: Score-Based Generative Modeling through Stochastic Differential Equations (Song et al.,
2021), https://arxiv.org/abs/2011.13456; FFJORD: Free-form Continuous Dynamics for Scalable
Reversible Generative Models (Grathwohl et al., 2019), https://arxiv.org/abs/1810.01367.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import grids
from ..config import describe, unknown
from ..model import evaluating, per_sample
from ..path import Path
from ..precision import name_of, supported
from ..sde.base import GaussianSDE
from ..solvers.base import Solver
from ..solvers.runge_kutta import first_of
from . import stepped
from .along import Along
from .divergence import EXACT_DIMS, Field, draw_probes, exact, hutchinson
from .field import Divergence, Flow
from .integrate import MAX_NFE, carry


@dataclass(frozen=True)
class LogProb:
    """Log-likelihoods in nats with their parts, and how they were obtained.

    Attributes:
        log_prob: ``prior + delta``, shape ``(B,)``; nan where the solve did not end.
        prior: log-density of the latent under the terminal distribution, ``(B,)``.
        delta: integral of the divergence, ``(B,)``.
        stderr: standard error of ``log_prob`` over the probes, ``(B,)``; 0 if the divergence is
            exact, nan with one probe, which tells nothing of its own error.
        latent: the state at ``t_max`` (where the solve stopped, if early), ``(B, *shape)``.
        nfe: evaluations of the score for each sample, int64, ``(B,)``.
        converged: whether a sample reached ``t_max`` within tolerance (for fixed steps: reached
            it) with finite values, bool, ``(B,)``.
        message: where and why the first sample that did not converge stopped; else empty.
        seconds: wall-clock time.
        divergence: ``"exact"`` or ``"hutchinson"``.
        probes: probes a sample, 0 if exact.
        noise: distribution of the probes.
        method: the ODE method, or name of the solver; ``steps`` its fixed steps, None if adaptive.
        solver: name and fields of a solver of the package; None for the other methods.
        grid: name and fields of its grid.
        rtol: relative tolerance, of the state and of nats a dimension.
        atol: absolute tolerance, likewise.
        t_min: where the integral starts: the density is that of the data with this much noise.
        t_max: where it ends.
        seed: key of the probes; ``start_index`` the index of the first sample.
        weights: which weights the score carries (``"ema"``, ``"raw"``), None if it does not say.
    """

    log_prob: Tensor
    prior: Tensor
    delta: Tensor
    stderr: Tensor
    latent: Tensor
    nfe: Tensor
    converged: Tensor
    message: str
    seconds: float
    divergence: str
    probes: int
    noise: str
    method: str
    steps: int | None
    rtol: float
    atol: float
    t_min: float
    t_max: float
    seed: int
    start_index: int
    weights: str | None
    solver: dict[str, Any] | None = None
    grid: dict[str, Any] | None = None


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
    terminal: tuple[Tensor, Tensor] | None = None,
    progress: Callable[[float, float, int], None] | None = None,
    **cond: Any,
) -> LogProb:
    r"""Log-likelihood of ``x`` under the probability-flow ODE of a score.

        log p(x) = log p_T(x_T) + int div (f - g^2/2 score) dt

    One evaluation of the score (and one vector-Jacobian product a probe) a stage of the method.
    Each sample takes steps of its own, and leaves the batch when it has arrived: its result does
    not depend on its neighbours beyond rounding.

    Args:
        score: ``score(x, t, **cond)`` that carries its ``.sde``.
        x: data in model range, floating point, shape ``(B, *shape)``; float64 is kept.
        divergence: ``"hutchinson"``, ``"exact"`` (D products), or ``"auto"``: exact up to 32
            dimensions.
        probes: Hutchinson probes a sample, fixed during the solve; two or more give ``stderr``.
        noise: distribution of the probes, ``"rademacher"`` or ``"gaussian"``.
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
        max_nfe: evaluations that a sample may take.
        terminal: None for the prior ``N(0, prior_std^2)``, or ``(mean, std)`` of the data in model
            range, each broadcastable to ``shape``: then ``N(alpha_T mean, alpha_T^2 std^2 +
            sigma_T^2)``, which removes most of the prior's mismatch.
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
    sde, x = score.sde, _checked(x)
    chosen = stepped.choose(method, steps, grid, max_nfe)
    t_min = sde.t_min_likelihood if t_min is None else float(t_min)
    t_max = sde.t_max if t_max is None else float(t_max)
    _check_times(sde, t_min, t_max)
    if divergence == "auto":
        divergence = "exact" if x[0].numel() <= EXACT_DIMS else "hutchinson"
    started = time.perf_counter()
    # Tensors made under inference_mode carry no graph, whatever enable_grad says.
    with torch.inference_mode(False), torch.no_grad(), evaluating(score):
        x, cond = x.clone(), per_sample(cond, x)
        if chosen is None:
            estimate, count = _estimator(divergence, x, probes, noise, seed, start_index)
            flow = Flow(score, Path(sde, t_min, t_max), estimate, tuple(x.shape), cond)
            latent, deltas, nfe, failures, t = carry(
                flow, x, count, str(method), rtol=rtol, atol=atol, steps=steps, max_nfe=max_nfe,
                report=progress,
            )  # fmt: skip
        else:
            assert steps is not None
            solver, places = chosen
            times = places(sde, steps, t_max, t_min).flip(0)
            along = Along(score, x, divergence, probes, seed, start_index, noise)
            count = max(along.probes, 1)
            latent, deltas, nfe, failures, t = stepped.integrate(
                solver, along, x, times, progress, cond
            )
        delta = deltas.mean(1)
        prior = _terminal_log_prob(sde, latent, t_max, terminal)
        total = prior + delta
        stderr = torch.zeros_like(total)
        if divergence == "hutchinson":
            stderr = deltas.std(1) / count**0.5 if count > 1 else torch.full_like(total, math.nan)
        for item in (~total.isfinite()).nonzero()[:, 0].tolist():
            failures.setdefault(item, "the log-likelihood is not finite")
        converged = torch.ones(len(x), dtype=torch.bool, device=x.device)
        converged[list(failures)] = False
        total, prior, delta, stderr = (
            v.masked_fill(~converged, math.nan) for v in (total, prior, delta, stderr)
        )
    section, rule = (None, None) if chosen is None else map(describe, chosen)
    message = ""
    if failures:
        item, reason = first_of(failures)
        where = f"t={float(t[item]):.6g}, nfe={int(nfe[item])}, {name_of(x.dtype)}"
        message = f"{reason} (item {item}, {where})"
    return LogProb(
        log_prob=total,
        prior=prior,
        delta=delta,
        stderr=stderr,
        latent=latent,
        nfe=nfe.to(x.device),
        converged=converged,
        message=message,
        seconds=time.perf_counter() - started,
        divergence=divergence,
        probes=count if divergence == "hutchinson" else 0,
        noise=noise,
        method=str(method) if section is None else section["name"],
        steps=steps,
        rtol=rtol,
        atol=atol,
        t_min=t_min,
        t_max=t_max,
        seed=seed,
        start_index=start_index,
        weights=getattr(score, "weights", None),
        solver=section,
        grid=rule,
    )


def _checked(x: Tensor) -> Tensor:
    """``x`` as float32 or float64, refused where it cannot have a density."""
    if not x.is_floating_point():
        raise ValueError(
            f"x has dtype {x.dtype}, a density needs floating point: "
            "take integer data to model range first, by scaler.encode(x)"
        )
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"x must have shape (B, *shape) and not be empty, got {tuple(x.shape)}")
    finite = x.flatten(1).isfinite().all(1)
    if not bool(finite.all()):
        raise ValueError(f"item {int((~finite).nonzero()[0])} of x is not finite")
    return x.detach().to(supported(torch.promote_types(x.dtype, torch.float32), x.device))


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


def _estimator(
    divergence: str, x: Tensor, probes: int, noise: str, seed: int, start_index: int
) -> tuple[Divergence, int]:
    """The divergence of a field, and how many separate estimates it gives."""
    if divergence == "exact":
        return lambda field, z, rows: exact(field, z), 1
    if divergence == "hutchinson":
        directions = draw_probes(x, probes, noise, seed, start_index)

        def estimate(field: Field, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            here = directions if len(z) == len(x) else directions[:, rows]
            return hutchinson(field, z, here)

        return estimate, probes
    raise unknown("divergence", divergence, ("auto", "exact", "hutchinson"))


def _terminal_log_prob(
    sde: GaussianSDE, z: Tensor, t: float, terminal: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Log-density of the prior, or of the moment-matched Gaussian at ``t``, shape ``(B,)``."""
    if terminal is None:
        return sde.prior_log_prob(z)
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    mean, std = (torch.as_tensor(m, dtype=z.dtype, device=z.device) for m in terminal)
    scale = (alpha**2 * std**2 + sigma**2).sqrt().expand(z.shape[1:])
    residual = (z - alpha * mean) / scale
    log_density = -(residual**2) / 2 - scale.log() - math.log(2 * math.pi) / 2
    return log_density.flatten(1).sum(1)
