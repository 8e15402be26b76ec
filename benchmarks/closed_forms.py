"""Every process and solver against closed forms: scores, likelihoods, convergence orders.

    python benchmarks/closed_forms.py

Prints three tables in Markdown. All in float64 on the CPU. The order of a multistep method is that
of its steps once it has a history: its first states are the exact ones, as many as it looks back.
What its own start, of order one, leaves of that order stands behind a slash where it differs by
0.1 or more.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

import scoresde as sd
from scoresde import grids, solvers
from scoresde.bench.convergence import GaussianData, flow, order, trajectory_error
from scoresde.noise import KeyedNoise

PROCESSES = {
    "vp": sd.VP(),
    "subvp": sd.SubVP(),
    "ve": sd.VE(),
    "cosine": sd.Cosine(),
    "edm": sd.EDM(),
    "linear": sd.Linear(),
    "ddpm": sd.DDPM(),
}
DETERMINISTIC = {
    "euler (eta=0)": solvers.EulerMaruyama(eta=0.0),
    "ddim": solvers.DDIM(),
    "heun": solvers.Heun(),
    "dpm-2s": solvers.DPM2S(),
    "dpm-3s": solvers.DPM3S(),
    "dpmpp-2s": solvers.DPMpp2S(),
    "dpmpp-2m": solvers.DPMpp2M(),
    "dpmpp-3m": solvers.DPMpp3M(),
    "dpmpp-3m (published)": solvers.DPMpp3M(form="published"),
    **{f"unipc ({p} points, bh1)": solvers.UniPC(points=p, line="bh1") for p in (1, 2, 3, 4)},
    **{f"unipc ({p} points, bh2)": solvers.UniPC(points=p, line="bh2") for p in (1, 2)},
    **{f"lms ({p} points)": solvers.LMS(points=p) for p in (2, 3, 4)},
    **{f"vab ({p} points)": solvers.VAB(points=p) for p in (2, 3, 4)},
    **{f"vabm ({p} points)": solvers.VABM(points=p) for p in (1, 2, 3, 4)},
    **{f"deis ({p} points)": solvers.DEIS(points=p) for p in (2, 3, 4)},
    "pndm": solvers.PNDM(),
    "edm (no churn)": solvers.EDM(),
    **{f"rk ({m})": solvers.ExplicitRK(m) for m in ("midpoint", "heun2", "ralston3", "rk4")},
}
STOCHASTIC = {
    "euler-maruyama": solvers.EulerMaruyama(),
    "reverse-diffusion": solvers.ReverseDiffusion(),
    "ancestral (small)": solvers.Ancestral(),
    "ancestral (large)": solvers.Ancestral("large"),
    "ddim (eta=0.5)": solvers.DDIM(eta=0.5),
    "sde-dpmpp-2m (1 point)": solvers.SDEDPMpp2M(points=1),
    "sde-dpmpp-2m": solvers.SDEDPMpp2M(),
    "sa": solvers.SASolver(),
    "edm (churn=20)": solvers.EDM(churn=20.0),
}


def mixture(dims: int, modes: int = 5) -> sd.GaussianMixture:
    """A mixture of about zero mean and unit variance."""
    generator = torch.Generator().manual_seed(dims)
    means = torch.randn(modes, dims, generator=generator, dtype=torch.float64)
    means = 0.9 * (means - means.mean(0))
    stds = 0.15 + 0.4 * torch.rand(modes, dims, generator=generator, dtype=torch.float64)
    return sd.GaussianMixture(torch.ones(modes), means, stds)


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error relative to the largest value."""
    return float((found.double() - exact).abs().max() / exact.abs().max())


def score_row(sde: sd.GaussianSDE) -> list[str]:
    """Score against autograd, drift and diffusion against differences, float32, inverse."""
    data = mixture(4)
    t = torch.logspace(-5, 0, 40, dtype=torch.float64) * sde.t_max
    t = t[t > sde.t_min][:-1]
    worst = 0.0
    for time in t:
        x = sde.perturb(data.sample(64), time, torch.randn(64, 4, dtype=torch.float64))
        x.requires_grad_()
        (exact,) = torch.autograd.grad(data.log_prob(x, sde, time).sum(), x)
        worst = max(worst, relative(data.score(sde)(x.detach(), time), exact))
    h = 1e-5 * t
    slope = (sde.log_alpha(t + h) - sde.log_alpha(t - h)) / (2 * h)
    growth = (sde.sigma(t + h) ** 2 - sde.sigma(t - h) ** 2) / (2 * h)
    g2 = growth - 2 * slope * sde.sigma(t) ** 2
    drift = float((sde.drift_rate(t) - slope).abs().max() / sde.drift_rate(t).abs().max().clamp(1))
    diffusion = float((sde.diffusion(t) ** 2 / g2 - 1).abs().max())
    single = float((sde.sigma(t.float()).double() / sde.sigma(t) - 1).abs().max())
    inverse = float((sde.time(sde.log_snr(t)) / t - 1).abs().max())
    return [f"{v:.1e}" for v in (worst, drift, diffusion, single, inverse)]


def likelihood_row(sde: sd.GaussianSDE) -> list[str]:
    """Error of the default solve against the density at t_min, and evaluations."""
    cells = []
    for dims in (2, 16):
        data = mixture(dims)
        x = data.sample(256, torch.Generator().manual_seed(0))
        mean, covariance = data.moments()
        terminal = (mean, covariance.diagonal().sqrt())
        for settings in ({}, {"terminal": terminal}):
            out = sd.log_prob(data.score(sde), x, divergence="exact", **settings)
            error = out.log_prob - data.log_prob(x, sde, sde.t_min_likelihood)
            cells.append(f"{float(error.mean()) / dims / 0.6931:+.1e}")
        cells.append(f"{float(out.nfe.double().mean()):.0f} to {int(out.nfe.max())}")
    return cells


def started_error(
    solver: solvers.Solver, score, x: Tensor, times: Tensor, reference: Tensor, memory: int
) -> float:
    """Root mean square error of a run whose first states, ``memory`` of them, are exact."""
    reverse = solver.reverse(score)
    state = solver.init(reverse, x, times, None)
    for i, (t, s) in enumerate(pairwise(times.unbind())):
        y, state = solver.step(reverse, x, t, s, None, state)
        x = flow(score, x, float(t), float(s), 1e-13) if i < memory else y
        if i < memory and hasattr(state, "before"):
            state = replace(state, before=None)  # what is exact needs no correction
    return float((x - reference).square().mean().sqrt())


def order_rows(sde: sd.GaussianSDE) -> list[str]:
    """Measured orders: of the trajectory for ODE solvers, weak for stochastic ones."""
    data = mixture(2)
    score = data.score(sde)
    start, end = sde.t_max, sde.t_min_sampling
    x = sde.prior_sample((32, 2), KeyedNoise(1), dtype=torch.float64)
    reference = flow(score, x, start, end, 1e-13)
    grid = grids.LogSNR()
    cells = []
    for solver in DETERMINISTIC.values():
        times = [grid(sde, n, start, end) for n in (400, 800)]
        alone = order(*(trajectory_error(solver, score, x, t, reference) for t in times))
        memory = max(getattr(solver, "points", 0), getattr(solver, "corrector", 0)) - 1
        if memory < 2:
            cells.append(f"{alone:.2f}")
            continue
        found = order(*(started_error(solver, score, x, t, reference, memory) for t in times))
        cells.append(f"{found:.2f}" + f" / {alone:.2f}" * (abs(found - alone) >= 0.1))
    covariance = torch.tensor([[0.3856, -0.4608], [-0.4608, 0.6544]])
    gaussian = GaussianData(torch.tensor([0.5, -0.3]), covariance)
    for solver in STOCHASTIC.values():
        errors = [gaussian.weak_error(solver, sde, grid(sde, n, start, end)) for n in (400, 800)]
        cells.append(f"{order(*errors):.2f}")
    return cells


def order_table() -> None:
    """Prints declared and measured orders, a row a solver."""
    columns = [order_rows(sde) for sde in PROCESSES.values()]
    print("\nMeasured orders, 400 to 800 steps\n")
    print("| solver | declared | " + " | ".join(PROCESSES) + " |")
    print("|---" * (len(PROCESSES) + 2) + "|")
    named = {**DETERMINISTIC, **STOCHASTIC}
    for (name, solver), *cells in zip(named.items(), *columns, strict=True):
        print(f"| {name} | {solver.order:g} | " + " | ".join(cells) + " |")


def table(title: str, header: list[str], row) -> None:
    """Prints a Markdown table with a row a process."""
    print(f"\n{title}\n\n| process | " + " | ".join(header) + " |")
    print("|---" * (len(header) + 1) + "|")
    for name, sde in PROCESSES.items():
        print(f"| {name} | " + " | ".join(row(sde)) + " |", flush=True)


def main() -> None:
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, float64, CPU")
    table(
        "Largest relative errors",
        ["score vs autograd", "drift vs differences", "g^2 vs differences", "sigma in float32",
         "time(log_snr(t))"],
        score_row,
    )  # fmt: skip
    table(
        "Likelihood, exact divergence, default settings: mean error in bits/dim",
        ["2-D", "2-D, terminal moments", "NFE", "16-D", "16-D, terminal moments", "NFE"],
        likelihood_row,
    )
    order_table()


if __name__ == "__main__":
    main()
