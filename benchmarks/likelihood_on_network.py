"""Error of a network's likelihood against cost: adaptive methods, and solvers along a grid.

    python benchmarks/likelihood_on_network.py [--model zoo:mnist] [--items 16]

Each item is dequantised once and has one probe, the same for all methods, so that the differences
are those of the solvers alone; the reference is dopri5 at 1e-6. Prints Markdown: evaluations,
seconds, and the error in bits/dim: its mean, its standard deviation between items, its largest.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch

import scoresde as sd
from scoresde.cli.heldout import held_out_data
from scoresde.noise import KeyedNoise

ADAPTIVE = [("dopri5", tol) for tol in (1e-5, 1e-4, 1e-3, 1e-2)] + [("bosh3", 1e-3)]
STEPPED = [
    ({"name": "unipc", "points": 2}, "logsnr"),
    ({"name": "unipc", "points": 3}, "logsnr"),
    ({"name": "unipc", "points": 2, "variable": "noise"}, {"name": "logistic", "width": 6.0}),
    ({"name": "vabm", "points": 1}, {"name": "logistic", "width": 6.0, "scale": 0.3}),
    ({"name": "vabm", "points": 2}, "logsnr"),
    ({"name": "heun"}, "logsnr"),
]


def text(section: object) -> str:
    """A section in a few words."""
    if not isinstance(section, dict):
        return str(section)
    fields = [f"{k}={v}" for k, v in section.items() if k != "name"]
    return ":".join([section["name"], *fields])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="zoo:mnist")
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--nfe", type=int, nargs="+", default=[24, 32, 44, 60, 90])
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = sd.load(args.model)
    data = held_out_data(args.model, None, "test").x[: args.items]
    noise = KeyedNoise(1).uniform(tuple(data.shape), torch.device("cpu"), torch.float32)
    x = model.scaler.encode(data, noise=noise, dequantize=True).float()
    scale = x[0].numel() * math.log(2)

    def solve(**settings) -> tuple[torch.Tensor, float, float]:
        began = time.perf_counter()
        found = sd.log_prob(model, x, **settings)
        assert bool(found.converged.all()), found.message
        return found.log_prob, float(found.nfe.double().mean()), time.perf_counter() - began

    truth, nfe, seconds = solve(rtol=1e-6, atol=1e-6)
    print(f"torch {torch.__version__}, one thread, {len(x)} items of {args.model}")
    about = f"{float(-truth.mean()) / scale:.4f} in the model's units"
    print(f"reference: {about}, {nfe:.0f} evaluations, {seconds:.1f} s\n")
    columns = ("method", "grid", "NFE", "seconds", "mean error", "standard deviation", "largest")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    plan = [(f"{m} {tol:g}", "-", {"method": m, "rtol": tol, "atol": tol}) for m, tol in ADAPTIVE]
    for method, grid in STEPPED:
        for count in args.nfe:
            steps = count // (2 if method["name"] == "heun" else 1)
            settings = {"method": method, "grid": grid, "steps": steps}
            plan.append((text(method), text(grid), settings))
    for name, grid, settings in plan:
        found, nfe, seconds = solve(**settings)
        errors = ((truth - found) / scale).tolist()
        spread = f"{statistics.stdev(errors):.4f} | {max(map(abs, errors)):.4f}"
        mean = f"{statistics.fmean(errors):+.4f}"
        print(f"| {name} | {grid} | {nfe:.0f} | {seconds:.1f} | {mean} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
