r"""Convergence of a solver, measured where the truth is known, without Monte Carlo.

Deterministic methods follow a trajectory: their error is the distance to a tight solution of the
probability-flow ODE in other variables. Stochastic ones sample a law: on Gaussian data with the
exact score every step is affine in state and noise, ``x_s = A x + b + C z``; probing it with
chosen states and noise gives ``A``, ``b`` and ``C``, and with them the exact mean and covariance
of what the scheme samples, whose distance to the marginal is the weak error.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..noise import KeyedNoise
from ..sde.base import GaussianSDE, ScoreFn
from ..solvers.base import Solver


class GivenNoise(KeyedNoise):
    """Noise that is given, not drawn."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__(0)
        self.rows = rows

    def normal(
        self,
        shape: tuple[int, ...],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The given rows."""
        if tuple(shape) != tuple(self.rows.shape):
            raise ValueError(f"noise of shape {tuple(self.rows.shape)} was given, not {shape}")
        return self.rows.to(device, dtype)


class GaussianData:
    """Data ``N(mean, covariance)`` of dimension D in float64, and their score under a process."""

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        self.mean, self.covariance = mean.double(), covariance.double()

    def marginal(self, sde: GaussianSDE, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(D,)`` and covariance ``(D, D)`` of ``p_t``."""
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        eye = torch.eye(len(self.mean), dtype=torch.float64)
        return alpha * self.mean, alpha**2 * self.covariance + sigma**2 * eye

    def score(self, sde: GaussianSDE) -> ScoreFn:
        """``-cov_t^-1 (x - mean_t)``."""

        def score(x: Tensor, t: Tensor) -> Tensor:
            mean, covariance = self.marginal(sde, t)
            return -torch.linalg.solve(covariance, (x - mean).T).T

        return score

    def sampled(self, solver: Solver, sde: GaussianSDE, times: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of what a one-step scheme gives from the exact ``p_t`` at its start.

        Args:
            solver: the scheme; its step draws noise at most once.
            sde: the process.
            times: decreasing, ``(steps + 1,)``.
        """
        reverse = sde.reverse(self.score(sde), eta=solver.eta)
        d = len(self.mean)
        eye = torch.eye(d, dtype=torch.float64)
        probes = torch.cat([torch.zeros(1, d).double(), eye, torch.zeros(d, d).double()])
        noise = GivenNoise(torch.cat([torch.zeros(1 + d, d).double(), eye]))
        mean, covariance = self.marginal(sde, times[0])
        for t, s in pairwise(times):
            out, _ = solver.step(reverse, probes, t, s, noise, None)
            b, a, c = out[0], (out[1 : d + 1] - out[0]).T, (out[d + 1 :] - out[0]).T
            mean, covariance = a @ mean + b, a @ covariance @ a.T + c @ c.T
        return mean, covariance

    def weak_error(self, solver: Solver, sde: GaussianSDE, times: Tensor) -> float:
        """Largest error of mean and covariance in units of the exact standard deviations."""
        mean, covariance = self.sampled(solver, sde, times)
        exact_mean, exact = self.marginal(sde, times[-1])
        factor = torch.linalg.inv(torch.linalg.cholesky(exact))
        return max(
            float((factor @ (mean - exact_mean)).norm()),
            float((factor @ (covariance - exact) @ factor.T).norm()),
        )


def flow(score: Any, x: Tensor, start: float, end: float, tolerance: float = 1e-9) -> Tensor:
    """The probability-flow ODE from ``start`` to ``end``, as ``dy/dk = q eps`` by DOP853.

    ``y = x/alpha`` and ``k = log q``, other variables than any solver here steps in.
    """
    from scipy.integrate import solve_ivp

    sde = score.sde

    def velocity(k: float, y: Any) -> Any:
        t = sde.time(-k)
        eps = score.noise(sde.alpha(t) * torch.from_numpy(y).reshape(x.shape), t)
        return (math.exp(k) * eps).flatten().numpy()

    span = (-float(sde.log_snr(start)), -float(sde.log_snr(end)))
    y = (x / sde.alpha(start)).flatten().numpy()
    out = solve_ivp(velocity, span, y, method="DOP853", rtol=tolerance, atol=tolerance)
    return sde.alpha(end) * torch.from_numpy(out.y[:, -1]).reshape(x.shape)


def trajectory_error(
    solver: Solver, score: Any, x: Tensor, times: Tensor, reference: Tensor
) -> float:
    """Root mean square distance of the solver's end point from the reference."""
    found = solver.integrate(solver.reverse(score), x, times).x
    return float((found - reference).square().mean().sqrt())


def order(coarse: float, fine: float, factor: float = 2.0) -> float:
    """Slope of the error when the number of steps grows by ``factor``."""
    return math.log(coarse / fine) / math.log(factor)
