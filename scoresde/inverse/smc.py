r"""Twisted sequential Monte Carlo: particles that come to be draws of the exact posterior.

A chain of kernels ``p(x_s | x_t)`` leads from the prior to the data. Particles follow a proposal
``q`` that has been told of the measurement, and are weighed for the difference,

    w_s = p(x_s | x_t) psi(x_s) / (q(x_s | x_t) psi(x_t)),    psi(x_0) = p(y | x_0)

so that, whatever the twists ``psi > 0`` and proposals, weighted means converge to those under
``p(x_0 | y)`` of the chain at the rate ``1/sqrt(particles)``, and the product of mean weights has
the mean ``p(y)``. The better the twists, the fewer the particles; the more steps, the closer the
chain is to the data. Where weights have become unequal, particles are chosen anew by them.

Sources: Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (Wu et al.,
2023), https://arxiv.org/abs/2306.17775; Sequential Monte Carlo Samplers (Del Moral et al., 2006),
https://doi.org/10.1111/j.1467-9868.2006.00553.x.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..conditions import check_used
from ..config import ConfigError, describe, unknown
from ..grids import Grid, grid_of
from ..model import Cost, cost, evaluating, home
from ..noise import KeyedNoise, step_seed
from ..precision import supported, widest
from ..sampling import reporting
from ..sde.base import GaussianSDE, select
from ..solvers.base import Callback
from .linear_twists import Full, Isotropic
from .measured import Denoised, scale_of
from .operator import Operator, check_noise
from .particles import STREAM, Particles, Runs, lost_message, scheme
from .problem import Problem, item_of, one_each, problem_of
from .twist import Blind, Gradient, Step, Twist, View

FEW = 11
"""Steps below which kernels of order 1 on the logistic grid come closer."""
TWISTS = ("dps", "smoothed", "pgdm", "mmps", "none")
FULL = 8
"""Dimensions up to which ``"mmps"`` takes the whole covariance: a product each."""


@torch.inference_mode(False)
@torch.no_grad()
def smc(
    score: Any,
    likelihood: Operator | Callable[..., Tensor],
    y: Tensor | None = None,
    /,
    noise_std: float = 0.0,
    *,
    particles: int = 64,
    draws: int = 1,
    steps: int = 100,
    grid: str | dict[str, Any] | Grid | None = None,
    twist: str | Twist | Callable[[Tensor, Tensor], Tensor] | None = None,
    order: int | None = None,
    sigma_data: float | None = None,
    resample: str = "systematic",
    threshold: float = 0.5,
    seed: int = 0,
    start_index: int = 0,
    shape: tuple[int, ...] | None = None,
    t_end: float | None = None,
    batch: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    **cond: Any,
) -> Particles:
    """Runs ``draws`` independent sets of particles from the prior down to the data.

    Noise is keyed by ``seed``, run and particle: a run is independent of the others beside it.

    Args:
        score: ``score(x, t, **cond)`` that carries its ``sde``, differentiable in ``x``.
        likelihood: an operator ``A`` of ``y = A x_0 + noise_std e``; or any function, ``x_0 ->
            log p(y | x_0)`` (or ``x_0, y -> ...`` if ``y`` is given), ``(B, *shape)`` to ``(B,)``,
            differentiable unless the twist is ``"none"``.
        y: the measurement, ``(1, *out)``, or one a run, ``(draws, *out)``; a function is given it
            as one a particle.
        noise_std: of the measurement, in model range; 0 only with ``"mmps"`` and ``"pgdm"``.
        particles: of one run.
        draws: number of runs.
        steps: kernels, of which each evaluates the score once for each particle.
        grid: where they lie between ``t_max`` and ``t_end``; ``"logsnr"``, or ``"logistic"`` below
            11 steps, if None.
        twist: how particles look ahead. ``"mmps"`` (default for operators): as the covariance of
            the score says, all of it up to 8 dimensions, one product of it beyond; ``"pgdm"``:
            data seen through noise spread alike in all directions; ``"smoothed"`` (default for
            functions, best in few dimensions): the mean likelihood of 16 such data; ``"dps"``:
            the likelihood of the denoised data, which is far too sure of itself while there is
            noise; a function ``(x0_hat, t) -> log psi``; ``"none"``: particles of the prior,
            weighed at the end.
        order: of the kernels of the chain: 2 leads their means on by the step before, and is taken
            from 11 steps on if None. ``"mmps"`` up to 8 dimensions has kernels of its own, with
            the moments of the exact ones.
        sigma_data: standard deviation of the data in model range; that of the model's
            parameterization if None, and 1 if it has none.
        resample: ``"systematic"``, ``"stratified"`` or ``"multinomial"``.
        threshold: share of effective particles below which a run is resampled; 0 for never.
        seed: of all noise.
        start_index: index of the first run, of a longer series.
        shape: of an item; needed where neither operator nor score know it.
        t_end: time from which the last kernel leads to the data; ``sde.t_min_sampling`` if None.
        batch: most particles in one evaluation of the score, against memory; all if None.
        device: of the particles; that of the score if None.
        dtype: float32 or float64.
        callback: called as ``callback(step, t, x)`` with all particles of all runs in one axis.
        progress: whether to show a bar after two seconds.
        cond: conditions, one value a run or one for all, or plain values.

    Raises:
        ConfigError: for an unknown twist, resampling or grid, or a twist that does not fit.
        ValueError: for a number out of range, a measurement or items that do not fit, or a
            condition that a network does not depend on.
    """
    began = time.perf_counter()
    few = steps < FEW
    order = (1 if few else 2) if order is None else order
    grid = ("logistic" if few else "logsnr") if grid is None else grid
    _check(particles, draws, steps, threshold, order, noise_std, batch)
    sde: GaussianSDE = score.sde
    scale = scale_of(score, sigma_data, "smc")
    own_device, own_dtype = home(score)
    device, dtype = torch.device(device or own_device), dtype or own_dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"smc keeps particles in float32 or float64, got dtype={dtype}")
    dtype = supported(dtype, device)
    like = torch.zeros((1, *item_of(score, likelihood, shape)), device=device, dtype=dtype)
    problem = problem_of(likelihood, y, noise_std, draws, particles, like)
    usual = twist is None
    if twist is None:
        twist = "mmps" if problem.operator is not None else "smoothed"
    looking = _twist(twist, problem, like)
    if usual and few and isinstance(looking, Full) and like[0].numel() > 2:
        looking = Isotropic(1)  # steps are worth more than their whole covariance
    places, rule = grid_of(grid), scheme(resample)
    end = sde.t_min_sampling if t_end is None else float(t_end)
    times = places(sde, steps - 1, sde.t_max, end).unbind()
    cond = {name: one_each(value, draws, particles, name, like) for name, value in cond.items()}
    look = _Look(score, looking, problem, cond, scale, batch)
    noise = KeyedNoise(seed, start_index * particles)
    uniforms = KeyedNoise(step_seed(seed, 0, STREAM), start_index)
    x = sde.prior_sample((draws * particles, *like.shape[1:]), noise, device=device, dtype=dtype)
    check_used(score, cond, x)
    noise.draw = max(noise.draw, 1)  # the first draw is the prior's, used or not
    runs = Runs(draws, particles, like)
    factor, back, before = torch.zeros_like(x.flatten(1)[:, 0]), None, None
    with evaluating(score), reporting(callback, progress, steps, "smc") as report:
        for i, t in enumerate(times):
            s = None if i + 1 == steps else times[i + 1]
            view = look(x, t, s is None)
            runs.weigh(view.log_twist + factor)
            u = uniforms.uniform((draws, particles), device, widest(device))
            kept = runs.select(rule(u, particles), threshold)
            x, view = x[kept], view.rows(kept)
            step = Step.between(sde, t, s, before)
            z = noise.normal(tuple(x.shape), device, dtype)
            x, ratio = looking.move(
                problem, view, x, step, z, None if back is None else back[kept]
            )
            factor, before = ratio - view.log_twist, t
            back = view.x0 if order == 2 else None
            if report is not None:
                report(i + 1, 0.0 if s is None else float(s), x)
        runs.weigh(problem.likelihood(x) + factor if not looking.linear else ratio)
    finite = x.flatten(1).isfinite().all(1).reshape(draws, particles)
    lost = (~(finite | (runs.log_weights == -math.inf)).all(1)) | ~runs.log_evidence.isfinite()
    return Particles(
        x=x.reshape(draws, particles, *x.shape[1:]),
        log_weights=runs.log_weights,
        log_evidence=runs.log_evidence,
        ess=torch.stack(runs.ess),
        resampled=runs.resampled,
        nfe=steps,
        cost=look.cost,
        seconds=time.perf_counter() - began,
        converged=not bool(lost.any()),
        message=lost_message(lost, start_index),
        solver={
            "name": "smc",
            "twist": twist if isinstance(twist, str) else type(looking).__name__.lower(),
            "particles": particles,
            "resample": resample,
            "threshold": threshold,
            "order": order,
        },
        grid=describe(places),
        steps=steps,
        seed=seed,
        start_index=start_index,
        t_start=sde.t_max,
        t_end=end,
        weights=getattr(score, "weights", None),
    )


class _Look:
    """Views of all particles, in parts of the score's batch, with a count of what they cost."""

    def __init__(
        self,
        score: Any,
        twist: Twist,
        problem: Problem,
        cond: dict[str, Any],
        scale: float,
        batch: int | None,
    ) -> None:
        self.score, self.twist, self.problem, self.cond = score, twist, problem, cond
        self.scale, self.batch, self.cost = scale, batch, Cost(0, 0)

    def __call__(self, x: Tensor, t: Tensor, last: bool) -> View:
        """At ``x (B, *shape)`` and ``t``; ``last`` before the kernel that leads to the data."""
        products = self.twist.products(last)
        parts = []
        for first in range(0, len(x), self.batch or len(x)):
            part = slice(first, first + (self.batch or len(x)))
            cond = select(self.cond, part)
            at = Denoised(self.score, x[part], t, cond, self.scale, products > 0)
            parts.append(self.twist.look(self.problem.rows(part), at, t, last))
        forwards, own = cost(self.score, t)
        self.cost = Cost(
            self.cost.forwards + forwards,
            self.cost.products + own + products * (forwards + 2 * own),
        )
        return View(*(torch.cat(p) for p in zip(*parts, strict=True)))


def _check(
    particles: int,
    draws: int,
    steps: int,
    threshold: float,
    order: int,
    noise_std: float,
    batch: int | None,
) -> None:
    """Refuses numbers out of range."""
    for name, value, least in (
        ("particles", particles, 1),
        ("draws", draws, 1),
        ("steps", steps, 2),
        ("batch", 1 if batch is None else batch, 1),
    ):
        if value < least:
            raise ValueError(f"smc needs {name} >= {least}, got {value}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"smc needs a threshold in [0, 1], got {threshold}")
    if order not in (1, 2):
        raise ValueError(f"smc has kernels of order 1 and 2, got order={order}")
    check_noise(noise_std, "smc")


def _twist(twist: Any, problem: Problem, like: Tensor) -> Twist:
    """The twist that was asked for, or that suits what was measured."""
    linear = problem.operator is not None
    if isinstance(twist, str):
        if twist not in TWISTS:
            raise unknown("twist", twist, TWISTS)
        if twist in ("pgdm", "mmps") and not linear:
            raise ConfigError(
                f"the twist {twist!r} is about an operator: take 'dps', 'none' or a function of "
                "(x0_hat, t) for other likelihoods"
            )
    exact = twist in ("pgdm", "mmps") or (isinstance(twist, Twist) and twist.linear)
    if linear and not problem.noise_std and not exact:
        raise ValueError(
            "a measurement without noise is met by the twists 'pgdm' and 'mmps' alone: "
            f"twist={twist!r} needs noise_std > 0"
        )
    if twist == "pgdm":
        return Isotropic()
    if twist == "mmps":
        return Full.of(problem, like) if math.prod(like.shape) <= FULL else Isotropic(1)
    if twist == "none":
        return Blind()
    if twist in ("dps", "smoothed"):
        return Gradient(points=8 if twist == "smoothed" else 0)
    if isinstance(twist, Twist):
        return twist
    if not callable(twist):
        raise unknown("twist", twist, TWISTS)
    return Gradient(twist)
