"""Error of a network's likelihood against seconds: the usual way, adaptive methods, grids.

    python benchmarks/likelihood_on_network.py [--model zoo:mnist] [--items 64] [--json FILE]

All methods are given the same dequantised items and run one after another on one thread. The
converged value is that of 128 steps with two probes an item. A method's error is that of its mean
over the items; beside it stands what its probes alone would make of it (the items are the same, so
that they have no part in it). ``spot`` marks a mean that is corrected by the refined solve of a
few items, whose seconds count. ``baseline`` is ``rk45_baseline.py``. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import time

import torch
from rk45_baseline import rk45_log_prob

import scoresde as sd
from scoresde.cli.heldout import held_out_data
from scoresde.likelihood.divergence import draw_probes
from scoresde.noise import KeyedNoise

GRID = {"name": "unipc", "points": 3, "variable": "noise"}
ADAPTIVE = [("dopri5", 1e-5), ("dopri5", 1e-4), ("dopri5", 1e-3), ("bosh3", 1e-3)]
OTHERS = [
    ({"name": "unipc", "points": 4, "variable": "noise"}, "logsnr"),
    ({"name": "unipc", "points": 3}, "logsnr"),
    ({"name": "unipc", "points": 2}, "logsnr"),
    ({"name": "vabm", "points": 2}, "logsnr"),
    ({"name": "heun"}, "logsnr"),
    (GRID, "quadratic"),
    (GRID, {"name": "logistic", "width": 9.0}),
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
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--steps", type=int, nargs="+", default=[12, 16, 18, 20, 24, 32, 48])
    parser.add_argument("--spot", type=int, default=4, help="items of the spot check")
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = sd.load(args.model).eval()
    data = held_out_data(args.model, None, "test").x[: args.items]
    noise = KeyedNoise(1).uniform(tuple(data.shape), torch.device("cpu"), torch.float32)
    x = model.scaler.encode(data, noise=noise).float()
    bit = x[0].numel() * math.log(2)
    few = torch.linspace(0, len(x) - 1, args.spot).round().long()

    def solve(**settings) -> sd.LogProb:
        found = sd.log_prob(model, x, **settings)
        assert bool(found.converged.all()), found.message
        return found

    began = time.perf_counter()
    reference = solve(method=GRID, steps=128, probes=2)
    truth = reference.log_prob.double()
    uncertain = float(reference.estimates.std(1).square().mean() / 2 / len(x)) ** 0.5 / bit
    seconds = time.perf_counter() - began
    print(f"torch {torch.__version__}, one thread, {len(x)} items of {args.model}")
    print(f"converged: {-float(truth.mean()) / bit:.4f} ± {uncertain:.4f}, {seconds:.0f} s\n")
    columns = ("method", "grid", "NFE", "seconds", "of baseline", "error", "of it probes")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    rows: list[dict] = []

    def row(name: str, grid: str, nfe: float, seconds: float, values, shift: float = 0.0) -> None:
        """One line; the error of the mean, and the noise that probes give it by the items."""
        differences = (truth - values.double()) / bit
        error = float(differences.mean()) - shift / bit
        spread = float(differences.std()) / math.sqrt(len(x))
        usual = rows[0]["seconds"] if rows else seconds
        rows.append(
            {
                "method": name,
                "grid": grid,
                "nfe": nfe,
                "seconds": seconds,
                "of_baseline": seconds / usual,
                "error": error,
                "probes": spread,
            }
        )
        cells = (name, grid, f"{nfe:.0f}", f"{seconds:.1f}", f"{seconds / usual:.3f}")
        print(f"| {' | '.join(cells)} | {error:+.4f} | {spread:.4f} |", flush=True)

    probes = draw_probes(x, 1)[0]
    for tolerance in (1e-5, 1e-3):
        found = rk45_log_prob(model, x, probes, tolerance)
        row(f"baseline RK45 {tolerance:g}", "-", found.nfe, found.seconds, found.log_prob)
    for method, tolerance in ADAPTIVE:
        out = solve(method=method, rtol=tolerance, atol=tolerance)
        nfe = float(out.nfe.double().mean())
        row(f"{method} {tolerance:g}", "-", nfe, out.seconds, out.log_prob)
    for steps in args.steps:
        out = solve(method=GRID, steps=steps)
        row(text(GRID), "logsnr", steps + 1, out.seconds, out.log_prob)
        started = time.perf_counter()
        pair = [sd.log_prob(model, x[few], method=GRID, steps=steps, seed=1, refine=r).log_prob
                for r in (1, 4)]  # fmt: skip
        shift = float((pair[1] - pair[0]).mean())
        took = out.seconds + time.perf_counter() - started
        nfe = steps + 1 + (5 * steps + 2) * args.spot / len(x)
        row(f"{text(GRID)}, spot", "logsnr", nfe, took, out.log_prob, shift)
    for method, grid in OTHERS:
        for steps in (24, 32):
            count = steps // (2 if method["name"] == "heun" else 1)
            out = solve(method=method, grid=grid, steps=count)
            nfe = float(out.nfe.double().mean())
            row(text(method), text(grid), nfe, out.seconds, out.log_prob)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
