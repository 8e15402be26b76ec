r"""The error of denoising over all noise levels, and the density that it gives by itself.

With ``lam = log(alpha/sigma)`` and ``e(lam) = E|eps - eps_hat|^2`` under ``x_t = alpha x + sigma
eps``, the score being exact, pointwise

    -log p(x) = D/2 log(2 pi e) - 1/2 int_0^inf [D/(1 + snr) - mmse(x, snr)] d snr
              = -log N(x; m, c^2) + int [e(lam) - e_N(lam)] d lam,      1/2 mmse d snr = e d lam

where ``e_N`` is the error of the score of data ``N(m, c^2)``, known in closed form: the first line
is ``m = 0, c = 1``. No divergence is needed. Only the difference is integrated by Monte Carlo, at
the same noise for both: it vanishes at both ends, and most of the noise cancels in it. Below
``t_min`` it falls as ``sigma^2/alpha^2`` for a smooth density, above ``t_max`` as
``alpha^2/sigma^2``: each tail is half the value at its end, and what is left is of second order.

The estimate is the log-density where the score is exact. For any other it is no bound at a point;
its mean over the data errs by the integral of ``E|eps_hat - eps_hat_exact|^2``, to the low side.

Source: Information-Theoretic Diffusion (Kong, Brekelmans & Ver Steeg, 2023), equation 9,
https://arxiv.org/abs/2302.03792.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model import evaluating
from .bound import checked
from .errors import (
    Errors,
    Progress,
    Reference,
    fractions,
    interval,
    mean_stderr,
    spread,
    stratified_stderr,
)


@dataclass(frozen=True)
class DenoisingLogProb:
    """A log-density by denoising alone, in nats, and how it was obtained.

    Attributes:
        log_prob: ``reference - integral - tails``, shape ``(B,)``.
        reference: log-density of the Gaussian reference, ``(B,)``.
        integral: of the difference of errors over the log-SNR, ``(B,)``.
        tails: what is beyond ``t_max`` and ``t_min``, from the values there, ``(B, 2)``.
        stderr: standard error over the noise and the times, slightly too large; nan if ``terms``
            or ``draws`` is 1, ``(B,)``.
        nfe: evaluations of the score.
        seconds: wall-clock time.
        terms: evaluations inside; ``draws`` those at each end.
        times: density of the times.
        t_min: least noise evaluated; ``t_max`` the most.
        seed: key of the noise; ``start_index`` the index of the first sample.
        weights: which weights the score carries, None if it does not say.
    """

    log_prob: Tensor
    reference: Tensor
    integral: Tensor
    tails: Tensor
    stderr: Tensor
    nfe: int
    seconds: float
    terms: int
    draws: int
    times: str
    t_min: float
    t_max: float
    seed: int
    start_index: int
    weights: str | None


def denoising_log_prob(
    score: Any,
    x: Tensor,
    *,
    terms: int = 64,
    draws: int = 2,
    times: str = "importance",
    reference: tuple[Any, Any] = (0.0, 1.0),
    t_min: float | None = None,
    seed: int = 0,
    start_index: int = 0,
    progress: Progress | None = None,
    **cond: Any,
) -> DenoisingLogProb:
    r"""Log-density of ``x`` from denoising errors alone, without a divergence.

        log p(x) = log N(x; m, c^2) - int E[|eps - eps_hat|^2 - |eps - eps_hat_N|^2] d lam

    Unbiased for an exact score up to the tails, which are of the order ``(sigma/alpha)^4`` at
    ``t_min`` relative to the square of the finest scale of the density, and ``(alpha/sigma)^4``
    at ``t_max``. Data on points have no density: the integral then grows with the log-SNR.

    Args:
        score: ``score(x, t, **cond)`` that carries its ``.sde``.
        x: data in model range, floating point, ``(B, *shape)``.
        terms: evaluations inside, one in each of as many strata, two or more for a ``stderr``.
        draws: evaluations at each end, likewise.
        times: ``"importance"`` (uniform in log-SNR), ``"logistic"`` (denser where signal and
            noise are alike), ``"uniform"`` (in ``t``).
        reference: ``(mean, std)`` of a Gaussian, each broadcastable to an item; any is correct,
            and the data's own moments leave the least noise.
        t_min: least noise; default ``sde.t_min_likelihood``.
        seed: key of the noise.
        start_index: index of the first sample: its noise does not depend on its batch.
        progress: called as ``progress(fraction, t, nfe)`` before each evaluation inside.
        cond: passed to the score; of tensors, one value a sample.

    Raises:
        ValueError: an unknown option, or a time outside the trained ones.
    """
    sde, x = score.sde, checked(x, None)
    start, end = interval(sde, terms, draws, times, t_min)
    began = time.perf_counter()
    with torch.no_grad(), evaluating(score):
        errors = Errors(score, x, Reference(*reference), seed, start_index, cond)
        points = spread(sde, fractions(x, terms, seed, start_index), times, start, end)
        values = errors.along(points, terms + 2 * draws, progress)
        ends = [errors.at(sde, t, draws, i * draws) / 2 for i, t in enumerate((end, start))]
        assert errors.reference is not None
        base = errors.reference.log_prob(x)
    tails = torch.stack([e.mean(1) for e in ends], 1)
    parts = [stratified_stderr(values), *(mean_stderr(e) for e in ends)]
    integral = values.mean(1)
    return DenoisingLogProb(
        log_prob=base - integral - tails.sum(1),
        reference=base,
        integral=integral,
        tails=tails,
        stderr=torch.stack(parts).square().sum(0).sqrt(),
        nfe=errors.nfe,
        seconds=time.perf_counter() - began,
        terms=terms,
        draws=draws,
        times=times,
        t_min=start,
        t_max=end,
        seed=seed,
        start_index=start_index,
        weights=getattr(score, "weights", None),
    )
