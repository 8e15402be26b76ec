r"""Variational bounds of the reverse SDE in continuous time, by denoising errors alone.

Two densities are bounded, of one model: the reverse SDE from the prior down to ``s = t_min``.

    data:      p(x) = int p_s(x_s) p(x | x_s) dx_s           (Kingma et al., 2021)
      -log p(x) <= KL(q(x_T | x) | prior) + int E|eps - eps_hat|^2 d lam + E[-log p(x | x_s)]
    smoothed:  p_s(x), ``x`` being the state at ``s``        (Song et al., 2021; Huang et al.)
      -log p_s(x) <= E[-log prior(x_T)] + 1/2 int E[g^2 |s - grad log q|^2
                                                    - g^2 |grad log q|^2 - 2 div f] dt

with ``lam = log(alpha/sigma)``, ``q(x_t | x)`` started at the data in the first and at ``s`` in
the second, and a decoder of mean ``x_0_hat(x_s)`` and variance ``sigma_s^2/alpha_s^2``.
The first is the mean of the second over ``q(x_s | x)`` plus ``E log q(x_s | x) - log p(x | x_s)``,
and does not depend on the process between its ends. With the exact score both are tight up to the
prior and the decoder; the mean gap over data is otherwise ``1/2 int g^2 E|s - grad log p_t|^2 dt``
more. :func:`~scoresde.log_prob` is of the ODE, and no bound of these relates the two.

Sources: Variational Diffusion Models (Kingma et al., 2021), https://arxiv.org/abs/2107.00630;
Maximum Likelihood Training of Score-Based Diffusion Models (Song et al., 2021),
https://arxiv.org/abs/2101.09258; A Variational Perspective on Diffusion-Based Generative Models
and Score Matching (Huang et al., 2021), https://arxiv.org/abs/2106.02808.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import unknown
from ..model import evaluating
from ..sde.base import GaussianSDE
from .bound import WIDTH, checked, log_mass
from .errors import (
    ENDS,
    Errors,
    Points,
    Progress,
    Reference,
    fractions,
    interval,
    mean_stderr,
    spread,
    stratified_stderr,
)

DENSITIES = ("data", "smoothed")

TAU = 1.25
"""Standard deviations of the noise in half a bin where discrete data are decoded: of models that
were trained on dequantised data the bound is about least there (within 0.03 bits/dim)."""


@dataclass(frozen=True)
class ELBO:
    """A bound on ``-log p(x)`` with its parts, and how they were obtained.

    Attributes:
        total: ``prior + diffusion + reconstruction``, shape ``(B,)``, in ``unit``.
        prior: ``KL(q(x_T | x) | prior)`` of the data, ``E[-log prior(x_T)]`` of the state at
            ``t_min``; exact, ``(B,)``.
        diffusion: the integral over time, ``(B,)``.
        reconstruction: ``E[-log p(x | x_s)]`` of the data, 0 of the state at ``t_min``, ``(B,)``.
        stderr: standard error of ``total`` over times and noise, slightly too large; nan if
            ``terms`` or ``draws`` is 1, ``(B,)``.
        values: the estimates of which ``diffusion`` is the mean, ``(B, terms)``.
        t: their times, ``(B, terms)``.
        unit: ``"bits/dim"`` for discrete data, ``"nats"`` for continuous.
        density: ``"data"`` or ``"smoothed"``: of which this is a bound.
        nfe: evaluations of the score, ``terms + draws``, or ``terms`` without a decoder.
        seconds: wall-clock time.
        terms: evaluations of the integrand; ``draws`` those of the decoder.
        times: density of the times.
        t_min: where the decoder takes over; ``t_max`` where the prior does.
        levels: levels of discrete data, None for continuous.
        seed: key of the noise; ``start_index`` the index of the first sample.
        weights: which weights the score carries, None if it does not say.
    """

    total: Tensor
    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor
    stderr: Tensor
    values: Tensor
    t: Tensor
    unit: str
    density: str
    nfe: int
    seconds: float
    terms: int
    draws: int
    times: str
    t_min: float
    t_max: float
    levels: int | None
    seed: int
    start_index: int
    weights: str | None


def elbo(
    score: Any,
    x0: Tensor,
    *,
    levels: int | None = 256,
    density: str = "data",
    terms: int = 64,
    draws: int = 2,
    times: str = "importance",
    reference: tuple[Any, Any] | None = None,
    t_min: float | None = None,
    seed: int = 0,
    start_index: int = 0,
    progress: Progress | None = None,
    **cond: Any,
) -> ELBO:
    """A bound on ``-log p(x0)`` under the reverse SDE of a score, in continuous time.

    The times are stratified, one independent draw in each of ``terms`` strata, and every term has
    noise of its own. For continuous data the errors of a Gaussian reference at the same noise are
    subtracted, and their integral added in closed form.

    Args:
        score: ``score(x, t, **cond)`` that carries its ``.sde``.
        x0: data in model range, shape ``(B, *shape)``. Discrete data lie on the centres of the
            bins, ``2 (k + 1/2)/levels - 1``: ``scaler.encode(x, dequantize=False)``. For
            ``density="smoothed"`` the state at ``t_min``.
        levels: number of discrete levels: the decoder then integrates its Gaussian over each
            bin, the two outermost being open, and the result is in bits/dim. None for continuous
            data: the decoder is a Gaussian density, and the result is in nats.
        density: ``"data"``: of ``x0`` behind the decoder; ``"smoothed"``: of the state at
            ``t_min``, without one.
        terms: evaluations of the integrand, two or more for a ``stderr``.
        draws: evaluations of the decoder, likewise.
        times: ``"importance"`` (uniform in log-SNR), ``"logistic"`` (denser where signal and
            noise are alike: less noise for smooth data, far more for images on levels),
            ``"uniform"`` (in ``t``: seldom sees little noise, and then a large value).
        reference: ``(mean, std)`` of the Gaussian whose errors are subtracted, each broadcastable
            to an item; any gives the same mean. Default (0, 1) for continuous data, and nothing
            for discrete, whose score tells the noise where a smooth density does not.
        t_min: start; default ``sde.t_min_likelihood``, but for discrete data the time at which
            half a bin is :data:`TAU` standard deviations of the noise, if that is later.
        seed: key of the noise.
        start_index: index of the first sample: its noise does not depend on its batch.
        progress: called as ``progress(fraction, t, nfe)`` before each evaluation of the integrand.
        cond: passed to the score; of tensors, one value a sample.

    Raises:
        ValueError: data that are not on the bins, a time outside the trained ones, or an unknown
            option.
    """
    sde, x = score.sde, checked(x0, levels)
    if t_min is None and levels is not None:
        t_min = max(sde.t_min_likelihood, float(sde.time(math.log(TAU * 2 * levels / WIDTH))))
    start, end = interval(sde, terms, draws, times, t_min)
    smoothed = _is_smoothed(density, levels, times)
    chosen = Reference(*reference) if reference else Reference() if levels is None else None
    began = time.perf_counter()
    with torch.no_grad(), evaluating(score):
        errors = Errors(score, x, chosen, seed, start_index, cond)
        u = fractions(x, terms, seed, start_index)
        points = spread(sde, u, times, start, end, after=smoothed)
        budget = terms if smoothed else terms + draws
        values = errors.along(points, budget, progress)
        if smoothed:
            prior, base = _cross_entropy(sde, x, start), _carried(sde, errors, start)
            decoder = torch.zeros_like(prior)[:, None].expand(-1, 2)
        else:
            prior, base = _kl(sde, x), _closed_form(sde, errors, start)
            decoder = _decoder(sde, errors, start, draws, levels)
    values = values + base[:, None]
    diffusion, reconstruction = values.mean(1), decoder.mean(1)
    stderr = torch.hypot(stratified_stderr(values), mean_stderr(decoder))
    unit = 1.0 if levels is None else 1 / (x[0].numel() * math.log(2))
    return ELBO(
        total=(prior + diffusion + reconstruction) * unit,
        prior=prior * unit,
        diffusion=diffusion * unit,
        reconstruction=reconstruction * unit,
        stderr=stderr * unit,
        values=values * unit,
        t=points.t,
        unit="nats" if levels is None else "bits/dim",
        density=density,
        nfe=errors.nfe,
        seconds=time.perf_counter() - began,
        terms=terms,
        draws=0 if smoothed else draws,
        times=times,
        t_min=start,
        t_max=end,
        levels=levels,
        seed=seed,
        start_index=start_index,
        weights=getattr(score, "weights", None),
    )


def _is_smoothed(density: str, levels: int | None, times: str) -> bool:
    """Whether the bound is on the density at ``t_min``, after a check that it can be."""
    if density not in DENSITIES:
        raise unknown("density", density, DENSITIES)
    if density == "smoothed" and levels is not None:
        raise ValueError("density='smoothed' is of a continuous state: give levels=None")
    if density == "smoothed" and times == "uniform":
        raise ValueError(
            "density='smoothed' at uniform times has no finite variance: "
            "take times='importance' or 'logistic'"
        )
    return density == "smoothed"


def _kl(sde: GaussianSDE, x: Tensor) -> Tensor:
    """``KL(N(alpha_T x, sigma_T^2) | N(0, tau^2))``, ``(B,)``."""
    tau, alpha = sde.prior_std, float(sde.alpha(sde.t_max))
    ratio = (float(sde.sigma(sde.t_max)) / tau) ** 2
    power = (alpha / tau * x).flatten(1).square()
    return (power + (ratio - 1 - math.log(ratio))).sum(1) / 2


def _cross_entropy(sde: GaussianSDE, x: Tensor, start: float) -> Tensor:
    """``E[-log N(x_T; 0, tau^2)]`` of ``x_T = a x + v eps``, ``(B,)``."""
    a, v = (float(c) for c in sde.transition(sde.t_max, start))
    return -sde.prior_log_prob(a * x) + x[0].numel() * (v / sde.prior_std) ** 2 / 2


def _closed_form(sde: GaussianSDE, errors: Errors, start: float) -> Tensor:
    """Integral of the reference's error from ``t_max`` to ``start``, ``(B,)``; 0 if none."""
    if errors.reference is None:
        return torch.zeros_like(errors.x.flatten(1)[:, 0])
    first, last = (float(sde.log_snr(t)) for t in (start, sde.t_max))
    return errors.reference.error(errors.x, first) - errors.reference.error(errors.x, last)


def _carried(sde: GaussianSDE, errors: Errors, start: float) -> Tensor:
    """The integral of the smoothed bound for the reference and its exact score, ``(B,)``.

    There it is tight at every ``x``: ``-log N_s(x) + E[log N_T(x_T)]``, and so holds ``div f``.
    """
    x, reference = errors.x, errors.reference
    assert reference is not None
    ends = [(float(sde.alpha(t)), float(sde.sigma(t))) for t in (start, sde.t_max)]
    a, v = (float(c) for c in sde.transition(sde.t_max, start))
    variance = ends[1][0] ** 2 * reference.std**2 + ends[1][1] ** 2
    spread_out = (v**2 / variance).sum() / 2
    return reference.log_prob(a * x, *ends[1]) - spread_out - reference.log_prob(x, *ends[0])


def _decoder(
    sde: GaussianSDE, errors: Errors, start: float, draws: int, levels: int | None
) -> Tensor:
    """Estimates of ``E[-log p(x | x_s)]``, mass of the bin or density, ``(B, draws)``."""
    q = math.exp(-float(sde.log_snr(start)))
    x, dims = errors.x, errors.x[0].numel()
    if levels is None:
        # (x - x_0_hat)/q = eps_hat - eps. The mean of the reference's square is known.
        assert errors.reference is not None
        w = 1 / (1 + (q / errors.reference.std) ** 2)
        distance = ((x - errors.reference.mean) / errors.reference.std) ** 2
        mean = (w**2 + w * (1 - w) * distance).flatten(1).sum(1)
        constant = dims * (math.log(q) + math.log(2 * math.pi) / 2)
        return constant + (mean[:, None] + errors.at(sde, start, draws)) / 2
    one = torch.full((len(x),), start, dtype=torch.float64)
    alpha, sigma, unit = sde.alpha(one), sde.sigma(one), torch.ones_like(one)
    column = Points(one, alpha, sigma, alpha, sigma, unit, unit)
    half, last = WIDTH / (2 * levels) / q, WIDTH / 2 - WIDTH / levels
    values = []
    for draw in range(draws):
        eps, eps_hat, _ = errors.noises(column, ENDS + draw)
        low = (eps_hat - eps - half).masked_fill(x < -last, -math.inf)
        high = (eps_hat - eps + half).masked_fill(x > last, math.inf)
        values.append(-log_mass(low, high).flatten(1).sum(1))
    return torch.stack(values, 1)
