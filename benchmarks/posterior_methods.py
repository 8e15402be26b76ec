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


OPTIONS: dict[str, list[dict[str, Any]]] = {
    "dps": [{}, {"reach": 1.0}, {"reach": 4.0}, {"zeta": 0.1}, {"zeta": 0.3}],
    "pgdm": [{}, {"strength": 1.0, "reach": 1.0}, {"reach": 4.0}],
    "tmpd": [{}],
    "mmps": [{}, {"iterations": 1}, {"iterations": 2}, {"iterations": 5}],
    "diffpir": [{}, {"strength": 0.3}, {"strength": 3.0}],
    "smc": [{}, {"twist": "mmps"}, {"twist": "pgdm"}],
    "replacement": [{}],
    "repaint": [{}, {"jump_length": 1, "jump_n_sample": 3}, {"jump_n_sample": 10}],
    "ddrm": [{}, {"eta": 1.0}],
}
"""Values of the main options to try beside the defaults."""
SCORES: dict[str, Any] = {
    "dps": methods.DPS,
    "pgdm": methods.PGDM,
    "tmpd": methods.TMPD,
    "mmps": methods.MMPS,
    "diffpir": methods.DiffPIR,
}


def choices(name: str) -> list[dict[str, Any]]:
    """Sections of a method to try, the default one first."""
    return [{"name": name, **options} for options in OPTIONS[name]]


def said(section: dict[str, Any]) -> str:
    """The options of a section in words."""
    return ", ".join(f"{k}={v}" for k, v in section.items() if k != "name")


def ours(
    section: dict[str, Any], problem: Problem, y: Tensor, n: int, budget: int, seed: int
) -> tuple[Tensor, int, int]:
    """``n`` samples of each measurement by at most ``budget`` passes: ``(x, passes, steps)``.

    Raises:
        ValueError: if the budget pays for no step.
    """
    score = Precisions(problem.mixture)
    common = {"noise_std": problem.noise_std, "seed": seed}
    if section["name"] == "smc":  # one run of particles a measurement
        options = {k: v for k, v in section.items() if k != "name"}

        def run(y: Tensor, particles: int, steps: int) -> Any:
            settings = {"particles": particles, "draws": len(y), "steps": steps}
            return sd.inverse.smc(score, problem.operator, y, **settings, **common, **options)

        for few in (12, 2):  # more steps may be dearer each
            first, second = (sum(run(y[:1], 2, steps).cost) for steps in (few, few + 1))
            steps = few + (budget - first) // (second - first)
            if steps >= few - 1 and steps >= 2 and sum(run(y[:1], 2, steps).cost) <= budget:
                break
        else:
            raise ValueError(f"{section} needs more than {budget} passes")
        out = run(y, n, steps)
        return out.sample(n), sum(out.cost), steps
    steps, grid = _steps(section, score, problem, y, budget)
    out = sd.inverse.solve(
        score, problem.operator, y, method=section, draws=n, steps=steps, grid=grid, **common
    )
    return out.x, sum(out.cost), steps


def _steps(
    section: dict[str, Any], score: Any, problem: Problem, y: Tensor, budget: int
) -> tuple[int, str | None]:
    """The most steps, with the denoising at the end, that a budget pays for; and the grid."""
    given = {"operator": problem.operator, "y": y[:1], "noise_std": problem.noise_std}
    if section["name"] not in SCORES:
        solver = build({**section, **given}, methods, "method")
        own = getattr(solver, "within", None)
        return (own(budget) if own else (budget - 1) // solver.nfe_per_step), None
    options = {k: v for k, v in section.items() if k != "name"}
    led = SCORES[section["name"]](score, **given, **options)
    solver = build(led.default_solver, sd.solvers, "solver")
    calls = budget // sum(cost(led, torch.tensor(0.5, dtype=f64)))
    steps = (calls - 1) // solver.nfe_per_step
    if steps < 1:
        raise ValueError(f"{section} needs more than {budget} passes")
    return steps, getattr(led, "default_grid", None)
