"""Time that a sampler spends outside the network: 20 steps of the `small` U-Net, batch 64.

    python benchmarks/sampler_overhead.py [--shape 1 28 28] [--solvers ddim ancestral ...]

The network's time is taken around its own forward pass; the rest of the wall-clock time of
`sample` (grid, noise, updates, final denoising) is the sampler's. A second table has the
processor time of a step with a score that costs nothing: what the method takes on the host.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import scoresde as sd
from scoresde import grids, solvers
from scoresde.config import build
from scoresde.noise import KeyedNoise


class Timed(torch.nn.Module):
    """A network that adds up the time of its forward passes."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net
        self.seconds = 0.0

    def forward(self, *args, **cond):
        """The network's output."""
        started = time.perf_counter()
        out = self.net(*args, **cond)
        self.seconds += time.perf_counter() - started
        return out


def host_microseconds(name: str, steps: int = 200, repeats: int = 5) -> float:
    """Processor time of a step of a tiny batch with the score ``-x``; the best of the repeats."""

    def score(x, t):
        return -x

    score.sde = sd.VP()
    solver = build(name, solvers, "solver")
    times = grids.LogSNR()(score.sde, steps, 1.0, 1e-3)
    best = float("inf")
    for _ in range(repeats):
        reverse, x = solver.reverse(score), torch.zeros(1, 2)
        began = time.process_time()
        solver.integrate(reverse, x, times, KeyedNoise(0))
        best = min(best, (time.process_time() - began) / steps)
    return best * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=[1, 28, 28])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--solvers",
        nargs="+",
        default=["ddim", "dpmpp-3m", "unipc", "heun", "ancestral", "euler-maruyama", "pc"],
    )
    args = parser.parse_args()
    net = Timed(sd.nets.UNet(tuple(args.shape), **sd.nets.UNet.presets["small"])).eval()
    model = sd.ScoreModel(net, sd.VP(), sd.V())
    parameters = sum(p.numel() for p in net.parameters())
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, shape {args.shape}, "
        f"batch {args.batch}, {args.steps} steps, {parameters:,} parameters, "
        f"median of {args.repeats}"
    )
    shape = (args.batch, *args.shape)
    sd.sample(model, shape, solver="ddim", steps=1)  # warm-up
    print(f"{'solver':<20}{'nfe':>6}{'seconds':>10}{'outside':>10}{'share':>9}")
    for solver in args.solvers:
        shares, totals, nfe = [], [], 0
        for repeat in range(args.repeats):
            net.seconds = 0.0
            out = sd.sample(model, shape, solver=solver, steps=args.steps, seed=repeat)
            totals.append(out.seconds)
            shares.append((out.seconds - net.seconds) / out.seconds)
            nfe = out.nfe
        total, share = statistics.median(totals), statistics.median(shares)
        print(f"{solver:<20}{nfe:>6}{total:>10.2f}{total * share:>10.3f}{share:>9.2%}", flush=True)
    print(f"\n{'solver':<20}{'microseconds a step, trivial score':>36}")
    for solver in args.solvers:
        print(f"{solver:<20}{host_microseconds(solver):>36.0f}")


if __name__ == "__main__":
    main()
