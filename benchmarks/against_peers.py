"""Error against evaluations beside azula, diffusers and k-diffusion, where scores are exact.

    pip install --no-deps azula k-diffusion && pip install -e ".[test]" einops
    python benchmarks/against_peers.py                 # ODE solvers: distance to the exact end
    python benchmarks/against_peers.py --stochastic    # stochastic ones: W2 to the exact law

EDM's process, sigma from 80 to 0.002, the same start noise for all, evaluations counted at the
denoiser. Of the peers the best of all samplers on all their grids stands in the table; ours are
``vabm`` of three points on the logistic grid, the best of a list of solvers on fixed grids, and
the one of a shorter list that ``tune`` takes, on a grid tuned on trajectories of other start
noise. Errors are root mean squares over trajectories; of their ratios the 95 % interval is given,
by bootstrap of the trajectories, which all samplers have in common. Prints Markdown.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from peers import SIGMA_MAX, SIGMA_MIN, Peer, every
from torch import Tensor

import scoresde as sd
from scoresde import grids, solvers
from scoresde.bench.convergence import GaussianData, UnitNoise
from scoresde.config import build
from scoresde.noise import KeyedNoise
from scoresde.tuning import Tuning, tune

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
PLACED = [
    *(solvers.VAB(points=p) for p in (2, 3, 4)),
    *(solvers.VABM(points=p) for p in (1, 2, 3, 4)),
]
"""Those for which points are placed; a short search of each decides which is taken."""
NOISY = {
    **{f"sde-dpmpp ({p})": solvers.SDEDPMpp2M(points=p) for p in (1, 2)},
    **{
        f"sa ({p}, {c}{', lower last' * low}) {s}": solvers.SASolver(p, c, low, s)
        for p, c in ((2, 2), (2, 3), (3, 3), (3, 4), (4, 5))
        for low in (False, True)
        for s in (0.1, 0.3, 1.0)
    },
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
    "modes": (modes, 16384, 8192, 256),
    "ring": (ring, 16384, 8192, 256),
    "sheets": (sheets, 8192, 16384, 128),
    "high": (high, 2048, 4096, 64),
}
"""Law, judged trajectories, trajectories to tune on, batch of the search."""


class Problem:
    """A law, its denoiser with a count of evaluations, start noise and exact ends."""

    def __init__(self, law: sd.GaussianMixture, samples: int, seed: int) -> None:
        self.law, self.sde, self.nfe = law, sd.EDM(), 0
        self.score = law.score(self.sde)
        shape = (samples, *law.shape)
        self.x = self.sde.prior_sample(shape, KeyedNoise(seed), dtype=f64)
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

    def squares(self, x: Tensor, denoised: bool) -> Tensor:
        """Mean square over entries of the distance from the exact end, one a trajectory."""
        return (x - self.ends[denoised]).flatten(1).square().mean(1)


def tuned(problem: Problem, nfe: int, trajectories: int, batch: int) -> Tuning:
    """Solver and grid chosen by the trajectories of the search alone."""
    return tune(problem.score, PLACED, nfe, trajectories=trajectories, held_out=2, iterations=300,
                batch=batch, seed=77)  # fmt: skip


def rms(squares: Tensor) -> float:
    return float(squares.mean().sqrt())


def median(squares: Tensor) -> float:
    return float(squares.sqrt().median())


def ratio(ours: Tensor, theirs: Tensor, resamples: int = 1000) -> str:
    """The ratio of two root mean squares over the same trajectories, and its interval."""
    g = generator(0)
    found = []
    for _ in range(resamples):
        rows = torch.randint(len(ours), (len(ours),), generator=g)
        found.append(ours[rows].mean() / theirs[rows].mean())
    low, high = torch.stack(found).sqrt().quantile(torch.tensor([0.025, 0.975], dtype=f64))
    return f"{rms(ours) / rms(theirs):.2f} ({low:.2f} to {high:.2f})"


def deterministic(names: list[str], counts: list[int]) -> None:
    peers = [peer for peer in every() if not peer.stochastic]
    print(f"{len(peers)} deterministic samplers and grids of other projects\n")
    columns = ("law", "NFE", "best peer", "RMS", "median", "vabm (3), logistic", "best fixed",
               "RMS", "fixed / peer", "tuned", "RMS", "median", "tuned / peer")  # fmt: skip
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name in names:
        make, samples, trajectories, batch = LAWS[name]
        problem = Problem(make(), samples, seed=99)
        for nfe in counts:
            theirs = {}
            for peer in peers:
                x = problem.peer(peer, nfe)
                if x is not None:
                    theirs[peer] = problem.squares(x, peer.denoised)
            own = {}
            for label, solver in FIXED.items():
                for place, grid in GRIDS.items():
                    x = problem.ours(solver, grid, nfe, False)
                    own[f"{label}, {place}"] = problem.squares(x, False)
            usual = problem.squares(problem.ours(solvers.VABM(points=3), None, nfe, False), False)
            made = tuned(problem, nfe, trajectories, batch)
            solver = build(made.solver, solvers, "solver")
            found = problem.squares(problem.ours(solver, made.grid, nfe, False), False)
            best, fixed = (min(all_, key=lambda key: rms(all_[key])) for all_ in (theirs, own))
            cells = (
                name, nfe, best.name + ", denoised" * best.denoised, f"{rms(theirs[best]):.2e}",
                f"{min(map(median, theirs.values())):.1e}", f"{rms(usual):.2e}",
                fixed, f"{rms(own[fixed]):.2e}", ratio(own[fixed], theirs[best]),
                f"{made.solver['name']} ({made.solver['points']})", f"{rms(found):.2e}",
                f"{median(found):.1e}", ratio(found, theirs[best]),
            )  # fmt: skip
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def stochastic(names: list[str], counts: list[int]) -> None:
    """Wasserstein-2 distance of the sampled law to the exact one, on Gaussian data.

    There the score is affine, so a sampler is affine in its start and its draws: run on unit
    starts and unit draws it tells its exact mean and covariance, without Monte Carlo. torch's
    random functions are made to give those draws.
    """
    peers = [peer for peer in every() if peer.stochastic]
    print("| data | NFE | best peer | W2 | best of ours | W2 | ours / peer |")
    print("|---" * 7 + "|")
    for name in names:
        data = GAUSSIANS[name]()
        law = _Affine(data)
        for nfe in counts:
            theirs, own = [], []
            for peer in peers:
                error = law.peer(peer, nfe)
                if error is not None:
                    theirs.append((error, peer.name))
            for label, method in NOISY.items():
                for place, grid in GRIDS.items():
                    for last in (False, True):
                        own.append((law.ours(method, grid, nfe, last), f"{label}, {place}"))
            (a, b), (c, d) = min(theirs), min(own)
            print(f"| {name} | {nfe} | {b} | {a:.2e} | {d} | {c:.2e} | {c / a:.2f} |", flush=True)


def gaussian(dims: int, low: float, seed: int) -> GaussianData:
    """Gaussian data of standard deviations from ``low`` to one in a turned basis."""
    basis = torch.linalg.qr(torch.randn(dims, dims, generator=generator(seed), dtype=f64))[0]
    variances = torch.logspace(2 * math.log10(low), 0, dims, dtype=f64)
    mean = 0.5 * torch.randn(dims, generator=generator(seed + 1), dtype=f64)
    return GaussianData(mean, basis @ torch.diag(variances) @ basis.T)


GAUSSIANS = {
    "2-D": lambda: gaussian(2, 0.2, 1),
    "8-D, std 0.1 to 1": lambda: gaussian(8, 0.1, 2),
    "8-D, std 0.01 to 1": lambda: gaussian(8, 0.01, 3),
}


class _Affine:
    """What samplers make of the exact law at SIGMA_MAX, under the score of Gaussian data."""

    def __init__(self, data: GaussianData) -> None:
        self.data, self.sde, self.nfe = data, sd.EDM(), 0
        self.score = data.score(self.sde)
        self.dims = len(data.mean)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Tweedie's formula, counted."""
        self.nfe += 1
        sigma = torch.as_tensor(float(sigma), dtype=f64)
        return x.double() + sigma**2 * self.score(x.double(), sigma)

    def distance(self, run: Callable[[Tensor], Tensor], draws: int, denoised: bool) -> float:
        """W2 to the exact law at SIGMA_MIN, or to that of the denoised state."""
        d = self.dims
        eye, none = torch.eye(d, dtype=f64), torch.zeros(1, d, dtype=f64)
        out = run(torch.cat([none, eye, none.expand(draws * d, d)]))
        columns = (out[1:] - out[0]).T
        a, c = columns[:, :d], columns[:, d:]
        mean, covariance = self.data.marginal(self.sde, SIGMA_MAX)
        found = a @ mean + out[0], a @ covariance @ a.T + c @ c.T
        mean, covariance = self.data.marginal(self.sde, SIGMA_MIN)
        if denoised:
            ends = self.denoise(torch.cat([none, eye]), torch.tensor(SIGMA_MIN))
            b = (ends[1:] - ends[0]).T
            mean, covariance = b @ mean + ends[0], b @ covariance @ b.T
        root = _root(covariance)
        cross = _root(root @ found[1] @ root)
        square = (found[0] - mean).square().sum() + (found[1] + covariance - 2 * cross).trace()
        return math.sqrt(max(float(square), 0.0))

    def peer(self, peer: Peer, nfe: int) -> float | None:
        """Of a peer; None if it takes more evaluations or fails."""
        count = UnitNoise(1)
        try:
            self.nfe = 0
            with drawing(count):
                peer.run(self.denoise, torch.zeros(1, self.dims, dtype=f64), nfe)
            if self.nfe > nfe:
                return None

            def run(x: Tensor) -> Tensor:
                with drawing(UnitNoise(1 + self.dims)):
                    return peer.run(self.denoise, x, nfe).double()

            error = self.distance(run, count.draw, peer.denoised)
        except (IndexError, TypeError, ValueError, RuntimeError, ZeroDivisionError):
            return None
        return error if math.isfinite(error) else None

    def ours(self, solver: Any, grid: Any, nfe: int, last: bool) -> float:
        """Of a solver of ours, on a grid, with a last denoising or without."""
        steps = (nfe - last) // solver.nfe_per_step
        times = grid(self.sde, steps, SIGMA_MAX, SIGMA_MIN)
        reverse = self.sde.reverse(self.score, eta=solver.eta)
        count = UnitNoise(1)
        solver.integrate(reverse, torch.zeros(1, self.dims, dtype=f64), times, count)

        def run(x: Tensor) -> Tensor:
            x = solver.integrate(reverse, x, times, UnitNoise(1 + self.dims)).x
            return self.denoise(x, times[-1]) if last else x

        return self.distance(run, count.draw, last)


def _root(matrix: Tensor) -> Tensor:
    """Square root of a symmetric matrix that is not negative."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T


@contextmanager
def drawing(noise: UnitNoise) -> Iterator[None]:
    """torch's normal draws, taken from ``noise`` instead."""

    def like(x: Tensor, **_: Any) -> Tensor:
        return noise.normal(tuple(x.shape), dtype=f64)

    def shaped(*shape: Any, **_: Any) -> Tensor:
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return noise.normal(tuple(sizes), dtype=f64)

    with mock.patch("torch.randn_like", like), mock.patch("torch.randn", shaped):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--laws", nargs="+", default=list(LAWS), choices=list(LAWS))
    parser.add_argument("--nfe", nargs="+", type=int)
    parser.add_argument("--stochastic", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    if arguments.stochastic:
        stochastic(list(GAUSSIANS), arguments.nfe or list(STOCHASTIC_NFE))
    else:
        deterministic(arguments.laws, arguments.nfe or list(NFE))
    print(f"\n{time.perf_counter() - began:.0f} s, torch {torch.__version__}, float64, one thread")


if __name__ == "__main__":
    main()
