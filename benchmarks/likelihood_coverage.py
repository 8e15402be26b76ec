"""How often a likelihood's 95 % interval holds the truth, under every process, up to 1000 dims.

    python benchmarks/likelihood_coverage.py [--only grid,adaptive,discrete,steps] [--scale 1]

Mixtures of six Gaussians of zero mean and unit variance, their exact scores in float32, truths in
float64. Of each process the integral starts where the noise is 0.05 standard deviations of the
data, so that 40 steps leave little. What the prior lacks of the marginal
at ``t_max`` is known in closed form and taken out; its largest mean is printed below.

    grid       8 probes along 40 steps of vabm, whose signs turn from point to point
    adaptive   8 probes, fixed, along dopri5 at 1e-4
    discrete   256 levels of 0.026 standard deviations, uniform dequantisation, 8 draws of one
               probe each, 40 steps of vabm
    steps      exact divergence, the solver's error alone: it is no random variable but
               half of what twice the steps change, so that intervals may cover more than 95 %

In the first three, 8 items under many seeds: a cell is ``bias ± its error (stated): coverage``,
in nats and per cent, with ``stated`` the root mean square standard error. Probes are signs, but
Gaussian in 2 dimensions, where the error of a sign is one number, plus or minus. The last part has
an item a repeat. Markdown; cells out of [93, 97] are marked ``!`` (the last part: below 93).
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from torch import Tensor

import scoresde as sd
from scoresde.data.scaler import Scaler
from scoresde.likelihood.selfcheck import mixture_of

PROCESSES = {
    "vp": sd.VP(), "subvp": sd.SubVP(), "ve": sd.VE(), "cosine": sd.Cosine(), "edm": sd.EDM(),
    "linear": sd.Linear(), "ddpm": sd.DDPM(),
}  # fmt: skip
REPEATS = {2: 4000, 16: 4000, 128: 1600, 1000: 600}
ITEMS = 8
MODE = 0.7
NOISE = 0.05
LEVELS = 256
TRUTH_DRAWS = 1024
LEVEL = 2 / LEVELS / 0.3
"""What a level spans, in standard deviations of the data."""
GRID = {"method": "vabm", "steps": 40}
PARTS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "grid": ((2, 16, 128, 1000), {"probes": 8, **GRID}),
    "adaptive": ((2, 16, 128), {"probes": 8, "rtol": 1e-4, "atol": 1e-4}),
    "discrete": ((2, 16, 128, 1000), {"draws": 8, **GRID}),
    "steps": ((2, 16), {"method": "vabm", "steps": 20, "solver_error": True}),
}


class Scaled:
    """A score with the scaler of its data."""

    def __init__(self, score: Any, scaler: Scaler) -> None:
        self.score, self.sde, self.scaler = score, score.sde, scaler

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The score."""
        return self.score(x, t)


def start(sde: sd.GaussianSDE, noise: float) -> float:
    """Time at which ``sigma / alpha`` is the noise, or the earliest of a likelihood."""
    return max(sde.t_min_likelihood, float(sde.time(-math.log(noise))))


def discrete(
    sde: sd.GaussianSDE, mixture: sd.GaussianMixture, repeats: int, settings: dict[str, Any]
) -> tuple[sd.LogProb, Tensor]:
    """Estimates for whole levels, and their truth, whose own error is below a tenth."""
    generator = torch.Generator().manual_seed(1)
    scaler = Scaler((LEVELS / 2,), (LEVEL,), LEVELS)
    x = mixture.sample(ITEMS, generator)
    k = (x / LEVEL + LEVELS / 2).floor().clamp(0, LEVELS - 1).long()
    t_min = start(sde, NOISE)
    total = torch.zeros(ITEMS, dtype=torch.float64)
    for _ in range(TRUTH_DRAWS // 64):
        # A half of the draws mirrors the other: what is linear in them cancels.
        u = torch.rand(32, *k.shape, generator=generator, dtype=torch.float64)
        x = (k + torch.cat([u, 1 - u]) - LEVELS / 2) * LEVEL
        total += mixture.log_prob(x.flatten(0, 1), sde, t_min).reshape(64, -1).sum(0)
    truth = total / (TRUTH_DRAWS // 64 * 64) + k[0].numel() * math.log(LEVEL)
    model = Scaled(mixture.to(dtype=torch.float32).score(sde), scaler)
    out = sd.data_log_prob(
        model, k.repeat(repeats // ITEMS, 1), divergence="hutchinson", t_min=t_min, **settings
    )
    return out, truth.repeat(repeats // ITEMS)


def continuous(
    sde: sd.GaussianSDE, mixture: sd.GaussianMixture, repeats: int, settings: dict[str, Any]
) -> tuple[sd.LogProb, Tensor]:
    """Estimates of a density, and its closed form."""
    alone = "solver_error" in settings
    x = mixture.sample(repeats if alone else ITEMS, torch.Generator().manual_seed(1)).float()
    x = x if alone else x.repeat(repeats // ITEMS, 1)
    out = sd.log_prob(
        mixture.to(dtype=torch.float32).score(sde), x, t_min=start(sde, NOISE),
        divergence="exact" if alone else "hutchinson",
        noise="gaussian" if x[0].numel() == 2 else "rademacher", **settings,
    )  # fmt: skip
    return out, mixture.log_prob(x.double(), sde, out.t_min)


def cell(part: str, dims: int, sde: sd.GaussianSDE, scale: float) -> tuple[str, float, bool]:
    """Text of a cell, the mean of what the prior lacks, and whether the coverage is right."""
    repeats = max(ITEMS, int(scale * REPEATS[dims]) // ITEMS * ITEMS)
    mixture = mixture_of((dims,), 1.0, MODE, seed=dims)
    settings = PARTS[part][1]
    out, truth = (discrete if part == "discrete" else continuous)(sde, mixture, repeats, settings)
    latent = out.latent.double()
    lacks = mixture.log_prob(latent, sde, out.t_max) - sde.prior_log_prob(latent)
    error = out.log_prob.double() + lacks - truth
    low, high = (end.double() + lacks for end in out.interval(0.95))
    covers = 100 * float(((low <= truth) & (truth <= high)).double().mean())
    bias, bias_error = float(error.mean()), float(error.std()) / repeats**0.5
    stated = float(out.stderr.double().square().mean().sqrt())
    right = covers >= 93 if part == "steps" else 93 <= covers <= 97
    text = f"{bias:+.2g} ± {bias_error:.1g} ({stated:.2g}): {covers:.1f}{'' if right else ' !'}"
    return text, float(lacks.mean()), right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="Parts, by commas.")
    parser.add_argument("--scale", type=float, default=1.0, help="Of the repeats.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    print(f"| part | dims | repeats | {' | '.join(PROCESSES)} | seconds |")
    print("|---" * (4 + len(PROCESSES)) + "|")
    wrong, largest = 0, dict.fromkeys(PROCESSES, 0.0)
    for part in args.only.split(","):
        for dims in PARTS[part][0]:
            began, cells = time.perf_counter(), []
            for name, sde in PROCESSES.items():
                text, lacks, right = cell(part, dims, sde, args.scale)
                cells.append(text)
                wrong += not right
                largest[name] = max(largest[name], abs(lacks))
            seconds = time.perf_counter() - began
            repeats = int(args.scale * REPEATS[dims])
            print(f"| {part} | {dims} | {repeats} | {' | '.join(cells)} | {seconds:.0f} |")
    print(f"\nCells with a wrong coverage: {wrong}. Largest mean of what the prior lacks, nats:")
    print(", ".join(f"{name} {value:.1g}" for name, value in largest.items()) + ".")
    print(f"{time.perf_counter() - started:.0f} s on one thread, torch {torch.__version__}.")


if __name__ == "__main__":
    main()
