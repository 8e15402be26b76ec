r"""Convergence of a solver, measured where the truth is known, without Monte Carlo.

Deterministic methods follow a trajectory: their error is the distance to a tight solution of the
probability-flow ODE in other variables. Stochastic ones sample a law: on Gaussian data with the
exact score a scheme is affine in its start and its draws, ``x = A x_T + b + sum_i C_i z_i``; one
run of unit starts and unit draws gives ``A``, ``b`` and ``C``, and with them the exact mean and
covariance of what the scheme samples, whose distance to the marginal is the weak error. Along one
Brownian path they follow a trajectory, too: the distance from a fine solution on the same path is
the strong error, a mean over paths with a standard error.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..brownian import BrownianPath, PathNoise
from ..sde.base import GaussianSDE, ScoreFn
from ..solvers.base import Solver


class UnitNoise(PathNoise):
    """Noise that is one in a single entry of each row: row ``i d + j`` in entry j of draw i."""

    def __init__(self, others: int) -> None:
        super().__init__(0)
        self.others = others
        """Rows that get no noise, before those that do."""

    def normal(
        self,
        shape: tuple[int, ...],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The next draw."""
        rows, d = shape
        noise = torch.zeros(rows, d, device=device, dtype=dtype)
        start = self.others + self.draw * d
        if start < rows:
            noise[start : start + d] = torch.eye(d, device=device, dtype=dtype)
        self.draw += 1
        return noise

    def increment(
        self,
        a: float | Tensor,
        b: float | Tensor,
        shape: tuple[int, ...],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The next draw, whatever the step."""
        return self.normal(shape, device, dtype)


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
        """Mean and covariance of what a scheme gives from the exact ``p_t`` at its start.

        Args:
            solver: the scheme.
            sde: the process.
            times: decreasing, ``(steps + 1,)``.
        """
        reverse = sde.reverse(self.score(sde), eta=solver.eta)
        d = len(self.mean)
        eye, none = torch.eye(d, dtype=torch.float64), torch.zeros(1, d, dtype=torch.float64)
        count = UnitNoise(1)
        solver.integrate(reverse, none, times, count)  # to learn how many draws it makes
        probes = torch.cat([none, eye, none.expand(count.draw * d, d)])
        out = solver.integrate(reverse, probes, times, UnitNoise(1 + d)).x
        b, columns = out[0], (out[1:] - out[0]).T
        a, c = columns[:, :d], columns[:, d:]
        mean, covariance = self.marginal(sde, times[0])
        return a @ mean + b, a @ covariance @ a.T + c @ c.T

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


class StrongError(NamedTuple):
    """Root mean square distance from a reference over paths, and its standard error."""

    rms: float
    stderr: float


def end_on_path(solver: Solver, score: Any, x: Tensor, times: Tensor, seed: int = 0) -> Tensor:
    """Where a solver arrives on the Brownian paths of a seed, one for each row of ``x``."""
    return solver.integrate(solver.reverse(score), x, times, BrownianPath(seed)).x


def strong_error(
    solver: Solver, score: Any, x: Tensor, times: Tensor, reference: Tensor, seed: int = 0
) -> StrongError:
    """Strong error of a stochastic solver at ``times[-1]``, with its Monte Carlo error.

    Args:
        solver: the scheme.
        score: of the process, with its ``sde``.
        x: states at ``times[0]``, ``(B, *shape)``.
        times: decreasing, ``(steps + 1,)``.
        reference: where the same paths end: :func:`end_on_path` of any solver of the same member
            of the reverse family, at so many steps that its own error does not count.
        seed: of the paths.
    """
    squares = (end_on_path(solver, score, x, times, seed) - reference).flatten(1).square().mean(1)
    rms = float(squares.mean().sqrt())
    spread = float(squares.std()) / len(squares) ** 0.5
    return StrongError(rms, spread / (2 * rms) if rms else 0.0)  # d sqrt(m) = dm / (2 sqrt(m))


def order(coarse: float, fine: float, factor: float = 2.0) -> float:
    """Slope of the error when the number of steps grows by ``factor``."""
    return math.log(coarse / fine) / math.log(factor)
