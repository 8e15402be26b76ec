"""Error against evaluations beside azula and diffusers, on mixtures whose score is exact.

    pip install --no-deps azula && pip install -e ".[test]" einops
    python benchmarks/against_peers.py                 # ODE solvers: distance to the exact end
    python benchmarks/against_peers.py --stochastic    # their law: moments and sliced W2

EDM's process, sigma from 80 to 0.002, the same start noise for all, evaluations counted at the
denoiser. For each project the best of all its samplers on all its grids stands in the table; ours
are ``vabm`` on the logistic grid at its defaults, the best of a list of solvers on fixed grids,
and ``vabm`` on a grid tuned on trajectories of other start noise. Prints Markdown.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from peers import SIGMA_MIN, Peer, every
from torch import Tensor

import scoresde as sd
from scoresde import grids, solvers
from scoresde.metrics import SlicedWasserstein
from scoresde.noise import KeyedNoise
from scoresde.tuning import tune

f64 = torch.float64
NFE = (5, 8, 10, 15, 20, 35, 50)
STOCHASTIC_NFE = (10, 20, 50, 100)
TIGHT = {"name": "runge-kutta", "method": "dop853", "rtol": 1e-10, "atol": 1e-10, "max_nfe": 20000}
GRIDS = {
    "karras": grids.Karras(),
    "logsnr": grids.LogSNR(),
    "logistic": grids.Logistic(),
    "logistic width 2": grids.Logistic(2.0),
    "logistic scale 0.1": grids.Logistic(3.0, 0.1),
}
FIXED = {
    **{f"vabm ({p})": solvers.VABM(points=p) for p in (1, 2, 3, 4)},
    **{f"vab ({p})": solvers.VAB(points=p) for p in (2, 3, 4)},
    **{f"noise AB ({p})": solvers.Multistep("noise", p) for p in (2, 3, 4)},
    **{f"unipc noise ({p})": solvers.UniPC("noise", p) for p in (2, 3)},
    **{f"unipc data ({p})": solvers.UniPC("data", p) for p in (2, 3)},
    "dpmpp-3m": solvers.DPMpp3M(),
    "data AB (4)": solvers.Multistep("data", 4),
}
NOISY = {
    **{f"sde-dpmpp ({p})": solvers.SDEDPMpp2M(points=p) for p in (1, 2)},
    **{f"sa {s}": solvers.SASolver(strength=s) for s in (0.3, 0.6, 1.0)},
    **{f"edm churn {c}": solvers.EDM(churn=c) for c in (5.0, 20.0)},
    "ancestral": solvers.Ancestral(),
    "ddim eta=0.5": solvers.DDIM(0.5),
}


def standard(weights: Tensor, means: Tensor, stds: Tensor) -> sd.GaussianMixture:
    """The mixture with mean zero and an average variance of one."""
    mean, covariance = sd.GaussianMixture(weights, means, stds).moments()
    size = covariance.diagonal().mean().sqrt()
    return sd.GaussianMixture(weights, (means - mean) / size, stds / size)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def modes() -> sd.GaussianMixture:
    """8-D, six modes of different weight and width."""
    g = generator(8)
    means = torch.randn(6, 8, generator=g, dtype=f64)
    stds = 0.1 + 0.3 * torch.rand(6, 8, generator=g, dtype=f64)
    return standard(0.5 + torch.rand(6, generator=g, dtype=f64), means, stds)


def ring() -> sd.GaussianMixture:
    """2-D, eight narrow modes on a circle."""
    angle = torch.arange(8, dtype=f64) * math.pi / 4
    means = 1.4 * torch.stack([angle.cos(), angle.sin()], 1)
    return standard(torch.ones(8, dtype=f64), means, torch.full((8,), 0.1, dtype=f64))


def sheets() -> sd.GaussianMixture:
    """64-D, five modes of nearly degenerate covariance: standard deviations over two decades."""
    g = generator(64)
    means = 0.6 * torch.randn(5, 64, generator=g, dtype=f64)
    stds = 10 ** (-2 + 2 * torch.rand(5, 64, generator=g, dtype=f64))
    return standard(torch.ones(5, dtype=f64), means, stds)


def high() -> sd.GaussianMixture:
    """256-D, eight wide modes."""
    g = generator(256)
    means = 0.5 * torch.randn(8, 256, generator=g, dtype=f64)
    return standard(
        torch.ones(8, dtype=f64), means, 0.3 + 0.5 * torch.rand(8, 256, generator=g, dtype=f64)
    )


LAWS: dict[str, tuple[Callable[[], sd.GaussianMixture], int, int, int]] = {
    "modes": (modes, 4096, 8192, 256),
    "ring": (ring, 4096, 8192, 256),
    "sheets": (sheets, 1024, 2048, 128),
    "high": (high, 512, 1024, 64),
}
"""Law, judged trajectories, trajectories to tune on, batch of the search."""


class Problem:
    """A law, its denoiser with a count of evaluations, start noise and exact ends."""

    def __init__(self, law: sd.GaussianMixture, samples: int, seed: int, ends: bool = True):
        self.law, self.sde, self.nfe = law, sd.EDM(), 0
        self.score = law.score(self.sde)
        shape = (samples, *law.shape)
        self.x = self.sde.prior_sample(shape, KeyedNoise(seed), dtype=f64)
        if ends:
            found = sd.sample(self.score, x_T=self.x, solver=TIGHT, denoise=False)
            assert found.converged, found.message
            self.ends = {False: found.x, True: self.score.denoise(found.x, SIGMA_MIN)}

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The exact denoiser, counted."""
        self.nfe += 1
        return self.score.denoise(x.double(), torch.as_tensor(float(sigma), dtype=f64))

    @torch.no_grad()
    def peer(self, peer: Peer, nfe: int) -> Tensor | None:
        """Its result; None if it takes more evaluations, fails or gives no finite numbers."""
        self.nfe = 0
        torch.manual_seed(0)
        try:
            x = peer.run(self.denoise, self.x, nfe).double()
        except (IndexError, TypeError, ValueError, RuntimeError, ZeroDivisionError):
            return None
        return x if self.nfe <= nfe and bool(x.isfinite().all()) else None

    def ours(self, solver: Any, grid: Any, nfe: int, denoise: bool) -> Tensor:
        """Our result with at most ``nfe`` evaluations."""
        steps = (nfe - denoise) // solver.nfe_per_step
        out = sd.sample(
            self.score, x_T=self.x, solver=solver, grid=grid, steps=steps, denoise=denoise, seed=1
        )
        assert out.nfe <= nfe
        return out.x

    def distance(self, x: Tensor, denoised: bool) -> tuple[float, float]:
        """Root mean square over trajectories and entries; median over trajectories."""
        squares = (x - self.ends[denoised]).flatten(1).square().mean(1)
        return float(squares.mean().sqrt()), float(squares.sqrt().median())


def tuned(problem: Problem, nfe: int, trajectories: int, batch: int) -> tuple[Any, Any, float]:
    """Solver and grid chosen by the trajectories of the search alone, and its seconds."""
    found = [
        tune(problem.score, solvers.VABM(points=points), nfe, trajectories=trajectories,
             held_out=2, iterations=300, batch=batch, seed=77)
        for points in (2, 3)
    ]  # fmt: skip
    best = min(found, key=lambda one: one.seen)
    return (
        solvers.VABM(points=best.solver["points"]), best.grid, sum(one.seconds for one in found)
    )  # fmt: skip


def deterministic(names: list[str], counts: list[int]) -> None:
    peers = [peer for peer in every() if not peer.stochastic]
    print("| law | NFE | best peer | RMS | median | `vabm`, logistic | best fixed of ours | RMS "
          "| tuned `vabm` | median | tuned / peer |")  # fmt: skip
    print("|---" * 11 + "|")
    for name in names:
        make, samples, trajectories, batch = LAWS[name]
        problem = Problem(make(), samples, seed=99)
        for nfe in counts:
            rows = []
            for peer in peers:
                x = problem.peer(peer, nfe)
                if x is not None:
                    rows.append((*problem.distance(x, peer.denoised), peer.name))
            fixed = []
            for label, solver in FIXED.items():
                for place, grid in GRIDS.items():
                    error = problem.distance(problem.ours(solver, grid, nfe, False), False)[0]
                    fixed.append((error, f"{label}, {place}"))
            usual = problem.distance(problem.ours(solvers.VABM(), None, nfe, False), False)[0]
            solver, grid, _ = tuned(problem, nfe, trajectories, batch)
            error, median = problem.distance(problem.ours(solver, grid, nfe, False), False)
            best, own = min(rows), min(fixed)
            print(
                f"| {name} | {nfe} | {best[2]} | {best[0]:.2e} | {min(r[1] for r in rows):.1e} "
                f"| {usual:.2e} | {own[1]} | {own[0]:.2e} "
                f"| {error:.2e} | {median:.1e} | {error / best[0]:.2f} |",
                flush=True,
            )


def stochastic(names: list[str], counts: list[int]) -> None:
    peers = [peer for peer in every() if peer.stochastic]
    print("| law | NFE | measure | best peer | its error | best of ours | its error | floor |")
    print("|---" * 8 + "|")
    for name in names:
        make, samples, _, _ = LAWS[name]
        law = make()
        problem = Problem(law, 4 * samples, seed=99, ends=False)
        mean, covariance = law.moments()
        sliced = SlicedWasserstein(projections=64)
        reference = law.sample(len(problem.x), generator(5))

        def measures(
            x: Tensor, mean=mean, covariance=covariance, sliced=sliced, reference=reference
        ) -> dict[str, float]:
            moved = (x.mean(0) - mean).square().mean().sqrt()
            spread = (torch.cov(x.T) - covariance).norm() / covariance.norm()
            return {"mean": float(moved), "covariance": float(spread),
                    "sliced W2": sliced(x, reference).value}  # fmt: skip

        floors = [measures(law.sample(len(problem.x), generator(6 + i))) for i in range(8)]
        for nfe in counts:
            theirs: dict[str, list[Any]] = {key: [] for key in floors[0]}
            own: dict[str, list[Any]] = {key: [] for key in floors[0]}
            for peer in peers:
                x = problem.peer(peer, nfe)
                if x is not None:
                    for key, value in measures(x).items():
                        theirs[key].append((value, peer.name))
            for label, method in NOISY.items():
                for place, grid in GRIDS.items():
                    for last in (False, True):
                        if (nfe - last) // method.nfe_per_step < 1:
                            continue
                        found = measures(problem.ours(method, grid, nfe, last))
                        for key, value in found.items():
                            own[key].append((value, f"{label}, {place}"))
            for key in floors[0]:
                top = sorted(floor[key] for floor in floors)[-2]
                (a, b), (c, d) = min(theirs[key]), min(own[key])
                print(f"| {name} | {nfe} | {key} | {b} | {a:.3g} | {d} | {c:.3g} | {top:.2g} |",
                      flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--laws", nargs="+", default=list(LAWS), choices=list(LAWS))
    parser.add_argument("--nfe", nargs="+", type=int)
    parser.add_argument("--stochastic", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    if arguments.stochastic:
        stochastic(arguments.laws, arguments.nfe or list(STOCHASTIC_NFE))
    else:
        deterministic(arguments.laws, arguments.nfe or list(NFE))
    print(f"\n{time.perf_counter() - began:.0f} s, torch {torch.__version__}, float64, one thread")


if __name__ == "__main__":
    main()
