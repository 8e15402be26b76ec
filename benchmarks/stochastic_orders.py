"""Strong and weak orders of the stochastic solvers on mixtures with their exact score.

    python benchmarks/stochastic_orders.py [--paths 512] [--processes vp ve]

Prints three tables in Markdown; float64, CPU, equal steps in log-SNR. *Strong*: root mean square
distance in two dimensions from a fine solution on the same Brownian paths, with Monte Carlo error.
*Weak*: largest error of four expectations in one dimension. A scheme that carries nothing from
step to step maps an expectation back by quadrature, ``u_t(x) = E u_s(step(x, n))`` with
Gauss-Hermite nodes ``n`` and splines in ``x``, down to one integral over the exact marginal at the
start: no Monte Carlo; the error stated is the change when the grid is halved. Schemes that carry
something are compared path by path with one that does not, whose own bias the quadrature tells:
with Monte Carlo error, at fewer steps, where the bias is well above it. *Adaptive*: errors beside
mean evaluations.
"""

from __future__ import annotations

import argparse
import itertools
import math

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

import scoresde as sd
from scoresde import grids, solvers
from scoresde.bench.convergence import end_on_path, order, strong_error
from scoresde.brownian import BrownianPath, PathNoise

PROCESSES = {"vp": sd.VP(), "ve": sd.VE(), "linear": sd.Linear(), "edm": sd.EDM()}
METHODS = ("euler", "srk", "midpoint", "heun", "euler_heun", "reversible_heun")


class Fixed(solvers.AdaptiveSDE):
    """The steps of adaptive-sde along a grid."""

    integrate = solvers.Solver.integrate


SOLVERS = {
    "euler-maruyama": solvers.EulerMaruyama(),
    "reverse-diffusion": solvers.ReverseDiffusion(),
    "ancestral (small)": solvers.Ancestral(),
    "ancestral (large)": solvers.Ancestral("large"),
    "ddim (eta=1)": solvers.DDIM(eta=1.0),
    "sde-dpmpp-2m (1 point)": solvers.SDEDPMpp2M(points=1),
    "sde-dpmpp-2m": solvers.SDEDPMpp2M(),
    "sa (all noise)": solvers.SASolver(q_low=0.0, q_high=math.inf),
    "adaptive-sde (equal steps)": Fixed(),
    **{f"torchsde ({m})": solvers.TorchSDE(m) for m in METHODS},
}
CARRYING = (solvers.SDEDPMpp2M, solvers.SASolver)
STEPS = (40, 160)
CARRIED_STEPS = (20, 80)
FINE = 1280
COMPARED = 160
"""Steps of the scheme that those which carry something are compared with."""


def carries(solver: solvers.Solver) -> bool:
    """Whether a step depends on those before it."""
    if isinstance(solver, solvers.TorchSDE):
        return solver.method == "reversible_heun"
    return isinstance(solver, CARRYING) and solver.points > 1


def mixture(dims: int) -> sd.GaussianMixture:
    """Three modes that overlap; in more dimensions, no path's mode hangs on a rounding."""
    means = torch.tensor([[0.7, 0.3], [-0.6, 0.1], [0.0, -0.4]], dtype=torch.float64)[:, :dims]
    return sd.GaussianMixture([0.3, 0.5, 0.2], means, [0.4, 0.5, 0.7])


def grid(sde: sd.GaussianSDE, steps: int) -> Tensor:
    return grids.LogSNR()(sde, steps, sde.t_max, sde.t_min_sampling)


def features(x: Tensor) -> Tensor:
    """The functions whose expectations are compared, ``(n, 4)`` for ``x (n, 1)``."""
    return torch.cat([torch.sin(x), torch.cos(2 * x), torch.tanh(2 * x), x**2], 1)


class Given(PathNoise):
    """Normals that are told, one tensor a draw of the step."""

    def __init__(self, draws: list[Tensor]) -> None:
        super().__init__(0)
        self.draws = draws

    def normal(self, shape, device=None, dtype=None):
        """The next of them."""
        self.draw += 1
        return self.draws[self.draw - 1].expand(shape)

    def increment(self, a, b, shape, device=None, dtype=None):
        """The next of them."""
        return self.normal(shape)


def expectations(solver: solvers.Solver, sde: sd.GaussianSDE, steps: int, points: int) -> Tensor:
    """Of the features under the scheme's law at the end, from the exact marginal at the start."""
    data = mixture(1)
    reverse, times = solver.reverse(data.score(sde)), grid(sde, steps)
    two = isinstance(solver, solvers.TorchSDE) and solver.method == "srk"
    nodes, weights = np.polynomial.hermite_e.hermegauss(10 if two else 24)
    pairs = list(itertools.product(range(len(nodes)), repeat=2 if two else 1))
    z = torch.from_numpy(nodes)[torch.tensor(pairs)]
    mass = torch.from_numpy(weights / weights.sum())[torch.tensor(pairs)].prod(1)
    place = torch.linspace(-9, 9, points, dtype=torch.float64)  # in standard deviations
    draws = [column.repeat(points)[:, None] for column in z.T]

    def size(t: Tensor) -> Tensor:
        return torch.hypot(sde.alpha(t), sde.sigma(t))

    value = features(place[:, None] * size(times[-1]))
    for t, s in reversed(list(itertools.pairwise(times.unbind()))):
        x = (place * size(t)).repeat_interleave(len(mass))[:, None]
        state = solver.init(reverse, x, times, Given(draws))
        moved, _ = solver.step(reverse, x, t, s, Given(draws), state)
        at = (moved / size(s)).clamp(-9, 9)[:, 0].numpy()
        ahead = torch.from_numpy(CubicSpline(place.numpy(), value.numpy())(at))
        value = (ahead.reshape(points, len(mass), -1) * mass[:, None]).sum(1)
    x = place[:, None] * size(times[0])
    density = data.log_prob(x, sde, times[0]).exp()[:, None]
    return torch.trapezoid(density * value, x, dim=0)


def exact(sde: sd.GaussianSDE) -> Tensor:
    """Expectations under the marginal at the end."""
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)[:, None]
    density = mixture(1).log_prob(x, sde, sde.t_min_sampling).exp()[:, None]
    return torch.trapezoid(density * features(x), x, dim=0)


def weak(solver: solvers.Solver, sde: sd.GaussianSDE, steps: int, paths: dict) -> tuple:
    """Largest error of the expectations, and how far it is known."""
    if not carries(solver):
        points = 401 if isinstance(solver, solvers.TorchSDE) else 801
        truth = exact(sde)
        error, rough = (
            float((expectations(solver, sde, steps, n) - truth).abs().max())
            for n in (points, points // 2 + 1)
        )
        return error, abs(error - rough)
    score = mixture(1).score(sde)
    found = end_on_path(solver, score, paths["x"], grid(sde, steps))
    change = features(found) - features(paths["end"])
    bias = (change.mean(0) + paths["bias"]).abs()
    worst = int(bias.argmax())
    return float(bias[worst]), float(change.std(0)[worst]) / len(change) ** 0.5


def paths_of(sde: sd.GaussianSDE, dims: int, count: int, steps: int = FINE) -> dict:
    """Starts from the exact marginal, and where improved Euler takes them."""
    noise = BrownianPath(1)
    x0 = mixture(dims).sample(count, torch.Generator().manual_seed(0))
    x = sde.perturb(x0, sde.t_max, noise.normal(tuple(x0.shape), dtype=torch.float64))
    return {"x": x, "end": end_on_path(Fixed(), mixture(dims).score(sde), x, grid(sde, steps))}


def row(
    name: str, declared: float | str, errors: list[tuple[float, float]], steps: tuple = STEPS
) -> None:
    (coarse, a), (fine, b) = errors
    more = "" if steps == STEPS else " ({} steps)"
    cells = [f"{v:.2e} ± {e:.0e}{more.format(n)}" for (v, e), n in zip(errors, steps, strict=True)]
    doubt = math.hypot(a / coarse, b / fine) / math.log(steps[1] / steps[0])
    slope = order(coarse, fine, steps[1] / steps[0])
    print(f"| {name} | {declared} | {' | '.join(cells)} | {slope:.2f} ± {doubt:.2f} |", flush=True)


def head(title: str, columns: list[str]) -> None:
    print(f"\n{title}\n\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")


def adaptive(sde: sd.GaussianSDE, paths: dict) -> None:
    """Errors of adaptive-sde beside those of equal steps, by mean evaluations."""
    score, ends = mixture(2).score(sde), grid(sde, 1)
    plan = [(f"adaptive-sde, {e:g}", solvers.AdaptiveSDE(e, e), ends) for e in (0.1, 0.03, 0.01)]
    for name in ("euler-maruyama", "sde-dpmpp-2m", "adaptive-sde (equal steps)"):
        solver = SOLVERS[name]
        for nfe in (40, 80, 160):
            plan.append((f"{name}, {nfe}", solver, grid(sde, nfe // solver.nfe_per_step)))
    for name, solver, times in plan:
        reverse = solver.reverse(score)
        out = solver.integrate(reverse, paths["x"], times, BrownianPath(0))
        nfe = reverse.nfe if out.nfe is None else float(out.nfe.double().mean())
        error = strong_error(solver, score, paths["x"], times, paths["end"])
        x, y = (
            torch.cat([features(v[:, i : i + 1]) for i in (0, 1)], 1)
            for v in (out.x, paths["end"])
        )
        worst = int((x - y).mean(0).abs().argmax())
        change = (x - y)[:, worst]
        print(
            f"| {name} | {nfe:.0f} | {error.rms:.4f} ± {error.stderr:.4f} "
            f"| {float(change.mean().abs()):.4f} ± {float(change.std()) / len(x) ** 0.5:.4f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--paths", type=int, default=512, help="In two dimensions.")
    parser.add_argument("--weak-paths", type=int, default=131072, help="In one.")
    parser.add_argument("--processes", nargs="+", default=["vp", "ve"], choices=PROCESSES)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, float64, CPU, {args.paths} and {args.weak_paths} paths")
    columns = ["solver", "declared", *(f"{n} steps" for n in STEPS), "order"]
    for name in args.processes:
        sde = PROCESSES[name]
        plane, score = paths_of(sde, 2, args.paths), mixture(2).score(sde)
        head(f"Strong error, {name}", columns)
        for label, solver in SOLVERS.items():
            errors = [
                tuple(strong_error(solver, score, plane["x"], grid(sde, n), plane["end"]))
                for n in STEPS
            ]
            row(label, 1, errors)
        head(f"Weak error, {name}", columns)
        line = paths_of(sde, 1, args.weak_paths, COMPARED)
        line["bias"] = expectations(Fixed(), sde, COMPARED, 801) - exact(sde)
        for label, solver in SOLVERS.items():
            counts = CARRIED_STEPS if carries(solver) else STEPS
            row(label, f"{solver.order:g}", [weak(solver, sde, n, line) for n in counts], counts)
        head(f"Adaptive steps, {name}", ["solver", "NFE", "strong error", "weak error"])
        adaptive(sde, plane)


if __name__ == "__main__":
    main()
