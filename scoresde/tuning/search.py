r"""The search for the points of a tuned grid, by gradients through the steps of a solver.

For trajectories with known ends the points ``lam_i`` (log-SNR, increasing, fixed ends) minimise

    log (E |e|^2)^(1/2) + log E |e|,    e = Phi(x*_T; lam) - x*_0,
    lam_i = lam_0 + (lam_N - lam_0) sum_{j<=i} softmax(theta)_j

by stochastic gradients. Where trajectories part between modes the error has a heavy tail: a few of
them make up the mean square, the others the mean distance, and both count. Trajectories are drawn
in proportion to their error, and reweighted, so that the mean is still theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..sde.base import select
from ..solvers.base import Solver

LOOKS = 8
"""Times that the error of all trajectories is measured during a descent."""
Tell = Callable[[str, float], None]


@dataclass(frozen=True)
class Search:
    """Trajectories with known ends, and the solver whose points are sought.

    Args:
        score: ``score(x, t, **cond)`` that carries its ``sde``.
        method: deterministic solver that steps along a grid.
        x: starts ``(N, *shape)``.
        ends: where they end, ``(N, *shape)``.
        cond: conditions, one value a trajectory.
        batch: trajectories of one step of the descent.
    """

    score: Any
    method: Solver
    x: Tensor
    ends: Tensor
    cond: dict[str, Any]
    batch: int

    def squares(self, times: Tensor, rows: Tensor) -> Tensor:
        """Mean square error of some trajectories, ``(len(rows),)``, differentiable in ``times``.

        The solver's own steps, without the guards and the account of its loop.
        """
        reverse = self.method.reverse(self.score, **select(self.cond, rows))
        x = self.x[rows]
        state = self.method.init(reverse, x, times, None)
        for t, s in pairwise(times.unbind()):
            x, state = self.method.step(reverse, x, t, s, None, state)
        return (x - self.ends[rows]).flatten(1).square().mean(1)

    @torch.no_grad()
    def errors(self, times: Tensor) -> Tensor:
        """Mean square error of every trajectory, float64 on the CPU."""
        every = torch.arange(len(self.x), device=self.x.device)
        parts = [self.squares(times, rows) for rows in every.split(max(self.batch, 256))]
        return torch.cat(parts).cpu().double()

    def descend(
        self, times: Tensor, iterations: int, rate: float, seed: int, tell: Tell
    ) -> tuple[Tensor, Tensor]:
        """The best points met on the way from those given, and their errors.

        Args:
            times: decreasing, ``(steps + 1,)``; the first to be looked at.
            iterations: of Adam, of step size ``rate`` that falls to zero.
            rate: in the logarithms of the steps' lengths.
            seed: of the choice of batches.
            tell: called with ``"tuning"`` and the fraction done.
        """
        sde = self.score.sde
        ladder = sde.log_snr(times)
        theta = ladder.diff().log().requires_grad_()
        optimizer = torch.optim.Adam([theta], lr=rate, betas=(0.9, 0.98))
        generator = torch.Generator().manual_seed(seed)
        best, errors = times, self.errors(times)
        known = errors
        for i in range(iterations):
            if i % max(1, iterations // LOOKS) == 0:
                sizes = known.nan_to_num(0).sqrt()
            tell("tuning", i / iterations)
            optimizer.param_groups[0]["lr"] = rate / 2 * (1 + math.cos(math.pi * i / iterations))
            rows, weight = draw(sizes, self.batch, generator)
            squares = self.squares(points(sde, ladder, theta), rows.to(self.x.device))
            loss = criterion(squares, weight.to(self.x))
            if not bool(loss.isfinite()):
                break
            (theta.grad,) = torch.autograd.grad(loss, theta)  # and none of a network's weights
            torch.nn.utils.clip_grad_norm_([theta], 1.0)
            optimizer.step()
            if (i + 1) % max(1, iterations // LOOKS) == 0 or i + 1 == iterations:
                found = points(sde, ladder, theta).detach()
                found[0], found[-1] = times[0], times[-1]
                known = self.errors(found)
                if criterion(known) < criterion(errors):  # never true of what is not finite
                    best, errors = found, known
        return best, errors


def draw(sizes: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows drawn mostly in proportion to their sizes, and weights that keep means unbiased."""
    chance = sizes + sizes.mean() + torch.finfo(sizes.dtype).tiny
    chance = chance / chance.sum()
    rows = torch.multinomial(chance, count, replacement=True, generator=generator)
    return rows, 1 / (chance[rows] * len(sizes))


def criterion(squares: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """What the search minimises: the mean square is made by the few, the mean distance by all."""
    distance = (squares + torch.finfo(squares.dtype).tiny).sqrt()
    return (weight * squares).mean().log() / 2 + (weight * distance).mean().log()


def rms(squares: Tensor) -> float:
    """Root of the mean of squared errors."""
    return float(squares.mean().sqrt())


def points(sde: Any, ladder: Tensor, theta: Tensor) -> Tensor:
    """Decreasing times of the steps whose lengths in log-SNR are as ``exp(theta)``.

    Differentiable for every process, by ``dt/d log_snr = -2 sigma^2/g^2``.
    """
    share = torch.softmax(theta, 0).cumsum(0)
    inner = ladder[0] + (ladder[-1] - ladder[0]) * share[:-1]
    lam = torch.cat([ladder[:1], inner, ladder[-1:]])
    t = sde.time(lam.detach())
    return t - 2 * (sde.sigma(t) / sde.diffusion(t)) ** 2 * (lam - lam.detach())
