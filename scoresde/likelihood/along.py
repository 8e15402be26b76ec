r"""Samples with their log-density in one solve: the divergence is one more coordinate.

With ``u = x/alpha`` and ``q = sigma/alpha`` the probability-flow ODE is ``du = eps dq``, and the
volume that it carries along grows by ``d log det/dq = div_u eps = alpha div_x eps``. A state
``y = (x, l)`` with the noise ``(eps, eps_l)`` therefore solves the same ODE in all coordinates:
every deterministic solver takes ``l`` along to its own order, without knowing. What data of unit
variance would give is taken out, in closed form, which keeps ``l`` small:

    eps_l = alpha (div_x eps / D - sigma/h^2),    h^2 = alpha^2 + sigma^2,    l(t_start) = 0
    log det(dx_t/dx_start) = D (log h_t/h_start + l_t/alpha_t)
    log p(x_t) = log p_T(x_start) - log det

Sources: Score-Based Generative Modeling through Stochastic Differential Equations (Song et al.,
2021), https://arxiv.org/abs/2011.13456; FFJORD: Free-form Continuous Dynamics for Scalable
Reversible Generative Models (Grathwohl et al., 2019), https://arxiv.org/abs/1810.01367.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..config import describe, unknown
from ..model import Score
from ..sde.base import SDE, as_time, match
from ..solvers.base import Callback, Solution, Solver
from .divergence import EXACT_DIMS, draw_probes, exact, hutchinson

DIVERGENCES = ("auto", "exact", "hutchinson")


class Along(Score):
    """Score of ``y = (x, l)``, shape ``(B, D + k)``, with ``k`` estimates of the divergence.

    Args:
        score: ``score(x, t, **cond)`` that carries its ``sde``, differentiable in ``x``.
        x: the batch to start from, ``(B, *shape)``.
        divergence: ``"exact"``, ``"hutchinson"``, or ``"auto"``: exact up to 32 dimensions.
        probes: Hutchinson probes a sample, those of :func:`scoresde.log_prob` for the same seed.
        seed: key of the probes.
        start_index: index of the first sample.
        noise: distribution of the probes, ``"rademacher"`` or ``"gaussian"``.

    Raises:
        ValueError: an unknown divergence or noise, or no probe.
    """

    def __init__(
        self,
        score: Any,
        x: Tensor,
        divergence: str = "hutchinson",
        probes: int = 1,
        seed: int = 0,
        start_index: int = 0,
        noise: str = "rademacher",
    ) -> None:
        if divergence not in DIVERGENCES:
            raise unknown("divergence", divergence, DIVERGENCES)
        self.sde, self._score = score.sde, score
        self.shape, self.dims = tuple(x.shape[1:]), x[0].numel()
        if divergence == "auto":
            divergence = "exact" if self.dims <= EXACT_DIMS else "hutchinson"
        self.divergence = divergence
        self.probes = probes if divergence == "hutchinson" else 0
        self.cond: dict[str, Any] = {}
        """What the reversed process must be given besides the score's own conditions."""
        if self.probes or divergence == "hutchinson":
            drawn = draw_probes(x, probes, noise, seed, start_index)
            self.cond["probes"] = drawn.transpose(0, 1)  # one row a sample

    def __call__(
        self, y: Tensor, t: float | Tensor, /, *, probes: Tensor | None = None, **cond: Any
    ) -> Tensor:
        """``(score, alpha (div score/D + 1/h^2))``, one evaluation; ``probes (B, k, *shape)``."""
        x, t = self.data(y), as_time(t, y)
        beside = t.reshape(-1, *(1,) * (x.ndim - 1)) if t.ndim else t

        def field(x: Tensor) -> Tensor:
            return self._score(x, beside, **cond)

        if probes is None:
            value, div = exact(field, x)
        else:
            value, div = hutchinson(field, x, probes.transpose(0, 1))
        alpha = self.sde.alpha(t)
        unit = alpha / (alpha**2 + self.sde.sigma(t) ** 2)
        grown = match(alpha, y) * (div / self.dims) + match(unit, y)
        return torch.cat([value.flatten(1), grown], 1).to(y.dtype)

    def open(self, x: Tensor) -> Tensor:
        """``y`` at the start, ``(B, D + k)``."""
        return torch.cat([x.flatten(1), x.new_zeros(len(x), self.probes or 1)], 1)

    def data(self, y: Tensor) -> Tensor:
        """``x`` of ``y``, ``(B, *shape)``."""
        return y[:, : self.dims].reshape(-1, *self.shape)

    def showing(self, callback: Callback | None) -> Callback | None:
        """The callback, shown the data without what is carried beside them."""
        if callback is None:
            return None
        return lambda step, t, y: callback(step, t, self.data(y))

    def log_det(self, y: Tensor, start: float, t: Tensor) -> Tensor:
        """``log det(dx_t/dx_start)`` by each estimate, ``(B, k)``."""
        h, h_start = (torch.hypot(self.sde.alpha(s), self.sde.sigma(s)) for s in (t, start))
        grown = y[:, self.dims :] / match(self.sde.alpha(t), y) + match((h / h_start).log(), y)
        return self.dims * grown

    def density(self, x: Tensor, start: float, solution: Solution, end: float) -> dict[str, Any]:
        """The fields of :class:`scoresde.Samples` that tell of densities.

        Args:
            x: state at ``start``, ``(B, *shape)``, of the density of the prior.
            start: time of the prior.
            solution: where the solver arrived, its state ``(B, D + k)``.
            end: the time that it should have reached: elsewhere the density is nan.
        """
        y, t = solution.x, as_time(solution.t, solution.x)
        values = self.sde.prior_log_prob(x)[:, None] - self.log_det(y, start, t)
        values = values.masked_fill((t > end).to(y.device), math.nan)
        if self.divergence == "exact":
            stderr = torch.zeros_like(values[:, 0]).masked_fill(values[:, 0].isnan(), math.nan)
        elif self.probes == 1:
            stderr = torch.full_like(values[:, 0], math.nan)
        else:
            stderr = values.std(1) / math.sqrt(self.probes)
        return {
            "log_prob": values.mean(1),
            "log_prob_stderr": stderr,
            "divergence": self.divergence,
            "probes": self.probes,
        }

    def error_norm(self, error: Tensor, alpha: Tensor | None = None) -> Tensor:
        """Size ``(B,)`` of errors ``(B, D + k)``: RMS of the state, or the largest of nats.

        An error of ``l/alpha``, in nats a dimension, stays to the end, however large ``q``.
        """
        size, nats = error[:, : self.dims].square().mean(1).sqrt(), error[:, self.dims :]
        largest = nats.abs().amax(1)
        return torch.maximum(size, largest if alpha is None else largest / alpha.to(largest))


def check_density(
    method: Solver, sde: SDE, start: float, denoise: bool | None, threshold: Any
) -> None:
    """Refuses what has no density, or another than that of the ODE.

    Raises:
        ValueError: a stochastic solver, a denoised end, a threshold, or a start after the prior.
    """
    if method.stochastic:
        raise ValueError(
            f"log_prob needs a deterministic solver, and {describe(method)['name']!r} draws "
            "noise: take heun, dpmpp-3m, runge-kutta or another of the ODE"
        )
    if denoise:
        raise ValueError(
            "log_prob is the density of the state at t_end: leave out denoise, or give False"
        )
    if threshold is not None:
        raise ValueError("log_prob is the density of the ODE itself: leave out threshold")
    if start < sde.t_max:
        raise ValueError(
            f"log_prob needs t_start={sde.t_max:g}, where the prior is known, got {start:g}"
        )
