"""Our methods that sample posteriors, as they come, each within a number of passes.

A pass is an evaluation of the score or a product with its Jacobian.
"""

from __future__ import annotations

from typing import Any

import torch
from posterior_problems import Problem, f64
from torch import Tensor

import scoresde as sd
from scoresde.config import build
from scoresde.inverse import methods
from scoresde.model import cost
from scoresde.solvers.base import Solver

SDE = sd.VP()
OURS = ["dps", "pgdm", "tmpd", "mmps", "diffpir", "smc", "replacement", "repaint", "ddrm"]


class Precisions(sd.Score):
    """The score of a mixture by matrix products of its precisions ``P_k``, which is faster.

        log p(k | x) ~ h_k.x - x.P_k x/2 + const,    score = sum_k p(k | x) (h_k - P_k x)

    In float64, and where variances stay above 1e-8, the digits that are lost do not matter.
    """

    def __init__(self, mixture: Any) -> None:
        self.exact, self.mixture, self.sde = mixture.score(SDE), mixture, SDE
        self.shape, self.dtype = mixture.shape, f64
        self.axes = getattr(mixture, "axes", None)

    def __call__(self, x: Tensor, t: float | Tensor) -> Tensor:
        """At one time for all samples."""
        if isinstance(t, Tensor) and t.ndim:
            return self.exact(x, t)
        flat = x.flatten(1)
        means, variances = (v[0] for v in self.mixture._marginal(x, SDE, t))
        log_weights = self.mixture.weights.log() - variances.log().sum(1) / 2
        precisions = 1 / variances
        if self.axes is None:
            h = means * precisions
            square = flat**2 @ precisions.T
        else:
            matrices = self.axes * precisions[:, None] @ self.axes.mT
            h = (matrices @ means[:, :, None])[:, :, 0]
            turned = (flat @ matrices.reshape(-1, flat.shape[1]).T).reshape(len(x), *means.shape)
            square = torch.einsum("bkd,bd->bk", turned, flat)
        share = torch.softmax(flat @ h.T - square / 2 + log_weights - (means * h).sum(1) / 2, 1)
        if self.axes is None:
            pulled = flat * (share @ precisions)
        else:
            pulled = torch.einsum("bk,bkd->bd", share, turned)
        return (share @ h - pulled).reshape(x.shape)


def ours(name: str, problem: Problem, y: Tensor, n: int, budget: int, seed: int) -> tuple:
    """``n`` samples of each measurement by at most ``budget`` passes: ``(x, passes, steps)``.

    Raises:
        ValueError: if the budget pays for no step.
    """
    score = Precisions(problem.mixture)
    common = {"noise_std": problem.noise_std, "seed": seed}
    if name == "smc":
        steps = budget // 2
        out = sd.inverse.smc(
            score, problem.operator, y, particles=n, draws=len(y), steps=steps, **common
        )
        return out.sample(n), sum(out.cost), steps
    steps = _steps(name, score, problem, y, budget)
    out = sd.inverse.solve(score, problem.operator, y, method=name, draws=n, steps=steps, **common)
    return out.x, sum(out.cost), steps


def _steps(name: str, score: Any, problem: Problem, y: Tensor, budget: int) -> int:
    """The most steps, with the denoising at the end, that a budget pays for."""
    given = {"operator": problem.operator, "y": y[:1], "noise_std": problem.noise_std}
    cls = build({"name": name, **given}, methods, "method") if name in SOLVERS else None
    if cls is not None:
        own = getattr(cls, "within", None)
        return own(budget) if own else (budget - 1) // cls.nfe_per_step
    led = SCORES[name](score, **given)
    solver = build(led.default_solver, sd.solvers, "solver")
    assert isinstance(solver, Solver)
    calls = budget // sum(cost(led, torch.tensor(0.5, dtype=f64)))
    steps = (calls - 1) // solver.nfe_per_step
    if steps < 1:
        raise ValueError(f"{name} needs more than {budget} passes")
    return steps


SOLVERS = ("replacement", "repaint", "ddrm")
SCORES: dict[str, Any] = {
    "dps": methods.DPS,
    "pgdm": methods.PGDM,
    "tmpd": methods.TMPD,
    "mmps": methods.MMPS,
    "diffpir": methods.DiffPIR,
}
