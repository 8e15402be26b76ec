"""Accuracy of ``log_prob`` against evaluations of the score, where the density is known.

    python benchmarks/likelihood_accuracy.py [--sde vp] [--items 64] [--seed 7] [--json FILE]

Four mixtures in 16 dimensions, exact divergence, float64. Errors are in bits/dim: ``mean`` and
``max`` of the absolute error against the closed form at ``t_min``, and ``bias``, its mean with
sign; ``at 0`` is the mean absolute error against the density of the data themselves. ``moments``
replaces the prior by the Gaussian of the data's mean and covariance (``terminal=``). The same
items serve every row. Evaluations are a sample's own, mean and largest, and differ only where the
steps do. Another ``--seed`` draws other mixtures: no setting was chosen on those of the default.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from typing import Any

import torch

import scoresde as sd
from scoresde import sde as processes
from scoresde.config import build

DIMS, COMPONENTS = 16, 8
METHODS: list[dict[str, Any]] = [
    *({"method": "dopri5", "rtol": tol, "atol": tol} for tol in (1e-3, 1e-4, 1e-5, 1e-6)),
    *({"method": "dop853", "rtol": tol, "atol": tol} for tol in (1e-3, 1e-5, 1e-6, 1e-7)),
    *({"method": "bosh3", "rtol": tol, "atol": tol} for tol in (1e-3, 1e-4)),
    {"method": "torchdiffeq-dopri5", "rtol": 1e-5, "atol": 1e-5},
    *({"method": "rk4", "steps": steps} for steps in (6, 12, 24, 48)),
    *({"method": "midpoint", "steps": steps} for steps in (24, 96)),
    *({"method": "scipy-rk45", "rtol": tol, "atol": tol} for tol in (1e-3, 1e-5)),
    *(
        {"method": method, "grid": {"name": "logistic", "width": 6.0}, "steps": steps}
        for steps in (59, 199)
        for method in (
            {"name": "unipc", "points": 3, "variable": "noise"},
            {"name": "unipc", "points": 4, "variable": "noise"},
            {"name": "vabm", "points": 3},
        )
    ),
]


def mixtures(seed: int) -> dict[str, sd.GaussianMixture]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    means = randn(COMPONENTS, DIMS)
    means = means - means.mean(0)
    means = means / means.square().mean().sqrt()
    ones = torch.ones(COMPONENTS, dtype=torch.float64)
    shares = torch.rand(COMPONENTS, generator=generator, dtype=torch.float64) + 0.2
    off_centre = 0.8 * randn(COMPONENTS, DIMS) + 0.1
    rough = 0.01 * 30 ** torch.rand(COMPONENTS, DIMS, generator=generator, dtype=torch.float64)
    return {
        **{
            f"zero mean, unit variance, std {std}": sd.GaussianMixture(
                ones, (1 - std**2) ** 0.5 * means, std * ones
            )
            for std in (0.7, 0.5)
        },
        "mean 0.1, std 0.05": sd.GaussianMixture(shares, off_centre, 0.05 * ones),
        "zero mean, stds 0.01 to 0.3": sd.GaussianMixture(ones, means, rough),
    }


def text(method: str | dict[str, Any]) -> str:
    """A method in a few words."""
    if isinstance(method, str):
        return method
    return " ".join(str(method[k]) for k in ("name", "points", "variable") if k in method)


def measure(
    mixture: sd.GaussianMixture, sde: sd.GaussianSDE, items: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """One row of the table."""
    x = mixture.sample(items, torch.Generator().manual_seed(1))
    mean, covariance = mixture.moments()
    ends = {"prior": None, "moments": (mean, covariance)}
    row: dict[str, Any] = {"rtol": None, "steps": None, **settings}
    scale = DIMS * math.log(2)
    truth = mixture.log_prob(x, sde, sde.t_min_likelihood)
    for name, terminal in ends.items():
        out = sd.log_prob(
            mixture.score(sde), x, divergence="exact", terminal=terminal, max_nfe=5000, **settings
        )
        error = (out.log_prob - truth) / scale
        row[name] = {
            "mean": float(error.abs().mean()),
            "max": float(error.abs().max()),
            "bias": float(error.mean()),
            "at_0": float((out.log_prob - mixture.log_prob(x)).abs().mean()) / scale,
        }
        row |= {
            "nfe_mean": float(out.nfe.double().mean()),
            "nfe_max": int(out.nfe.max()),
            "converged": bool(out.converged.all()),
            "seconds": out.seconds,
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sde", default="vp", help="name of the process (default: vp)")
    parser.add_argument("--items", type=int, default=64, help="items in the batch (default: 64)")
    parser.add_argument("--seed", type=int, default=7, help="of the mixtures (default: 7)")
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sde = build(options.sde, processes, "sde")
    report: dict[str, Any] = {
        "sde": repr(sde),
        "items": options.items,
        "seed": options.seed,
        "threads": 1,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "rows": [],
    }
    print(f"{sde}, {options.items} items, one thread, torch {torch.__version__}")
    for name, mixture in mixtures(options.seed).items():
        print(
            f"\n{name}\n{'method':28s}{'NFE':>5s}{'max':>5s}   prior: mean     max    bias    at 0"
            "   moments: mean     max    at 0"
        )
        for settings in METHODS:
            row = measure(mixture, sde, options.items, settings)
            report["rows"].append({"mixture": name, **row})
            how = f"{row['rtol']:g}" if row["rtol"] else f"{row['steps']} steps"
            a, b = row["prior"], row["moments"]
            print(
                f"{text(row['method']):20s}{how:8s}{row['nfe_mean']:5.0f}{row['nfe_max']:5d}"
                f"      {a['mean']:8.1e}{a['max']:8.1e}{a['bias']:9.1e}{a['at_0']:8.1e}"
                f"        {b['mean']:8.1e}{b['max']:8.1e}{b['at_0']:8.1e}"
            )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
