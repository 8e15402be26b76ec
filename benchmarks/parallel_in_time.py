"""Sampling in parallel in time: rounds and evaluations against those of one step after another.

    python benchmarks/parallel_in_time.py [--steps 25 50 ...] [--tolerance 1e-3] [--window 32]

For each method and number of steps: its evaluations one after another; the rounds (calls of the
score that wait for each other) and evaluations of a sample in parallel, the last denoising
included; and the largest deviation of any entry of any sample from the sequential end point.
"""

from __future__ import annotations

import argparse
import time

import torch

import scoresde as sd
from scoresde import solvers
from scoresde.bench import mixture
from scoresde.noise import KeyedNoise


def table(title: str, score, shape: tuple[int, ...], args: argparse.Namespace) -> None:
    """A Markdown table with a row for each method and number of steps."""
    print(f"\n{title}, {shape[0]} samples of shape {shape[1:]}\n")
    columns = ("solver", "steps", "NFE", "rounds", "NFE in parallel", "largest deviation", "RMS")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    dtype = next((p.dtype for p in getattr(score, "parameters", list)()), torch.float64)
    x_T = score.sde.prior_sample(shape, KeyedNoise(0), dtype=dtype)
    for name in args.solvers:
        for steps in args.steps:
            settings = {"x_T": x_T, "steps": steps, "grid": "logsnr"}
            one = sd.sample(score, solver=name, **settings)
            solver = solvers.Parallel(name, window=args.window, tolerance=args.tolerance)
            many = sd.sample(score, solver=solver, **settings)
            gap = (many.x - one.x).abs()
            cells = (
                name, steps, one.nfe, many.rounds, f"{many.mean_nfe:.0f}", f"{gap.max():.1e}",
                f"{gap.square().mean().sqrt():.1e}",
            )  # fmt: skip
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[25, 50, 100, 200, 1000])
    parser.add_argument("--solvers", nargs="+", default=["ddim", "dpmpp-2m", "vab"])
    parser.add_argument("--tolerance", type=float, default=solvers.Parallel.tolerance)
    parser.add_argument("--window", type=int, default=solvers.Parallel.window)
    parser.add_argument("--samples", type=int, default=64, help="Of the mixture.")
    parser.add_argument("--pictures", type=int, default=2, help="Of zoo:digits.")
    args = parser.parse_args()
    began = time.perf_counter()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"window {args.window}, tolerance {args.tolerance:g}"
    )
    table("A mixture under VP", mixture(2).score(sd.VP()), (args.samples, 2), args)
    model = sd.load("zoo:digits")
    table("zoo:digits", model, (args.pictures, *model.shape), args)
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
