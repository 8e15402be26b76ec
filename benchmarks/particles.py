"""Particles against an exact posterior: twisted sequential Monte Carlo, ours and azula's.

    python benchmarks/particles.py [--out FOLDER] [--seeds 3] [--quick]

Data are a mixture of five modes in two dimensions, of which one coordinate is measured: the
posterior has three modes, of weights 0.20, 0.13 and 0.66. *W2* is the exact Wasserstein-2
distance, by optimal assignment, of 1024 equally weighted samples from the posterior's own: as many
runs as that takes, each of so many particles, averaged over seeds. The floor is that of exact
samples. *Evidence* is the root mean square error of ``log p(y)`` over independent runs, whose mean
``p(y)`` is compared with the exact one as well. A pass is an evaluation of the score or a product
with its Jacobian.

azula's TDSSampler, where it is installed, steps on the same noise levels, under the likelihood of
the denoised data, and under the twist of pseudo-inverse guidance, as our ``pgdm``.
Writes ``particles.json`` and ``particles.png``; float64, one core.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor

import scoresde as sd
from scoresde.inverse.linear import Linear
from scoresde.inverse.linear_twists import Isotropic
from scoresde.inverse.smc import smc

f64 = torch.float64
MEANS = torch.tensor([[0.6, 1.3], [0.7, 0.1], [0.45, -1.2], [-1.2, 0.8], [-1.1, -0.7]], dtype=f64)
DATA = sd.GaussianMixture([0.3, 0.1, 0.3, 0.15, 0.15], MEANS, [0.1, 0.4, 0.15, 0.2, 0.3])
OPERATOR = Linear(torch.tensor([[1.0, 0.1]], dtype=f64))
Y, NOISE = torch.tensor([[0.5]], dtype=f64), 0.05
POSTERIOR = DATA.posterior(OPERATOR, Y, NOISE)
LOG_EVIDENCE = float(DATA.log_evidence(OPERATOR, Y, NOISE))
SDE = sd.VP()
SCORE = DATA.score(SDE)
SAMPLES = 1024
PARTICLES = (1, 4, 16, 64, 256, 1024, 4096)
STEPS = (50, 100, 200)
FOR_AZULA = (64, 256, 1024, 4096)
"""It takes one run at a time, which makes fewer particles slow."""
METHODS: dict[str, dict[str, Any]] = {
    "mmps, whole covariance": {"twist": "mmps"},
    "mmps, one product": {"twist": Isotropic(1)},
    "pgdm": {"twist": "pgdm"},
    "none": {"twist": "none"},
}
Run = Callable[[int, int, int, int], tuple[Tensor, Tensor | None, float]]
"""``(particles, runs, steps, seed)`` to samples, log-evidences and passes a particle."""


def wasserstein(x: Tensor, y: Tensor) -> float:
    """Exact W2 of two sets of as many points."""
    square = cdist(x.numpy(), y.numpy(), "sqeuclidean")
    return math.sqrt(square[linear_sum_assignment(square)].mean())


def ours(**options: Any) -> Run:
    def run(particles: int, runs: int, steps: int, seed: int) -> tuple[Tensor, Tensor, float]:
        found = smc(
            SCORE, OPERATOR, Y, NOISE,
            particles=particles, draws=runs, steps=steps, seed=seed, **options,
        )  # fmt: skip
        passes = found.cost.forwards + found.cost.products
        return found.sample(SAMPLES // runs), found.log_evidence, passes

    return run


def azula(inflated: bool) -> Run:
    from azula.denoise import Denoiser, DiracPosterior
    from azula.guidance import TDSSampler

    def schedule_of(steps: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        high, low = (float(SDE.log_snr(t)) for t in (SDE.t_max, SDE.t_min_sampling))

        def schedule(t: Tensor) -> tuple[Tensor, Tensor]:
            t = torch.as_tensor(t, dtype=f64)
            time = SDE.time(low + t * (high - low))
            return SDE.alpha(time), SDE.sigma(time)

        return schedule

    count = [0, 0]

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            count[1] += 1
            return grad

    class Exact(Denoiser):
        def __init__(self, schedule: Any) -> None:
            super().__init__()
            self.schedule = schedule

        def forward(self, x: Tensor, t: Tensor, **_: Any) -> Any:
            count[0] += 1
            alpha, sigma = self.schedule(t)
            time = SDE.time(alpha.log() - sigma.log())
            x = Counted.apply(x)
            return DiracPosterior(mean=(x + sigma**2 * SCORE(x, time)) / alpha)

    def run(particles: int, runs: int, steps: int, seed: int) -> tuple[Tensor, None, float]:
        schedule = schedule_of(steps)

        def twist(x0: Tensor, level: Tensor) -> Tensor:  # it is told sigma/alpha for t
            power = torch.tensor(NOISE**2, dtype=f64)
            if inflated:
                q2 = level**2
                power = power + q2 / (1 + q2) * OPERATOR.norm**2
            return -(Y - OPERATOR(x0)).square().sum(1) / (2 * power) - power.log() / 2

        torch.manual_seed(seed)
        count[:] = 0, 0
        parts = []
        for _ in range(runs):
            sampler = TDSSampler(Exact(schedule), twist, steps=steps, silent=True, dtype=f64)
            try:
                x = sampler(SDE.prior_sample((particles, 2), dtype=f64)).detach()
            except RuntimeError:  # weights that are no numbers
                x = torch.full((particles, 2), math.nan, dtype=f64)
            x = x / schedule(torch.tensor(0.0))[0]
            parts.append(x[torch.randint(particles, (SAMPLES // runs,))])
        return torch.cat(parts), None, sum(count) / runs

    return run


def measure(run: Run, particles: int, steps: int, seeds: int) -> dict[str, float]:
    """Mean W2 and its standard error, and the errors of the evidence, over seeds."""
    runs = max(1, SAMPLES // particles)
    began = time.process_time()
    distances, evidences, passes, bad = [], [], 0.0, 0
    for seed in range(seeds):
        x, evidence, passes = run(particles, runs, steps, seed)
        if not bool(x.isfinite().all()):
            bad += 1
            continue
        distances.append(wasserstein(x, exact(1000 + seed)))
        if evidence is not None:
            evidences.append(evidence)
    row = {"particles": particles, "steps": steps, "passes": passes, "failed": bad}
    values = torch.tensor(distances, dtype=f64)
    if len(values):
        row["w2"] = float(values.mean())
        row["w2_stderr"] = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0
    if evidences:
        off = torch.cat(evidences) - LOG_EVIDENCE
        row["log_evidence_rms"] = float(off.square().mean().sqrt())
        row["evidence_ratio"] = float(off.exp().mean())
        if len(off) > 1:
            row["evidence_ratio_stderr"] = float(off.exp().std() / math.sqrt(len(off)))
    return {**row, "seconds": time.process_time() - began}


def exact(seed: int) -> Tensor:
    return POSTERIOR.sample(SAMPLES, torch.Generator().manual_seed(seed))


def floor(seeds: int) -> float:
    """W2 of exact samples from exact samples."""
    return sum(wasserstein(exact(2000 + s), exact(1000 + s)) for s in range(seeds)) / seeds


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| method | steps | passes | particles | W2 | log-evidence RMS | evidence/exact |"]
    lines.append("|---|---|---|---|---|---|---|")
    for r in rows:
        w2 = f"{r['w2']:.3f} +- {r['w2_stderr']:.3f}" if "w2" in r else "not finite"
        rms = f"{r['log_evidence_rms']:.3f}" if "log_evidence_rms" in r else ""
        ratio = f"{r['evidence_ratio']:.3f}" if rms else ""
        if "evidence_ratio_stderr" in r:
            ratio += f" +- {r['evidence_ratio_stderr']:.3f}"
        lines.append(
            f"| {r['method']} | {r['steps']} | {r['passes']:.0f} | {r['particles']} "
            f"| {w2} | {rms} | {ratio} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=None)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--particles", type=int, nargs="+", default=PARTICLES)
    given = parser.parse_args()
    runs: dict[str, Run] = {name: ours(**options) for name, options in METHODS.items()}
    if importlib.util.find_spec("azula") is not None:
        runs |= {"azula TDS": azula(False), "azula TDS, pgdm twist": azula(True)}
    low = floor(given.seeds)
    print(f"floor {low:.3f}, log-evidence {LOG_EVIDENCE:.4f}")
    rows = []
    for name, run in runs.items():
        if given.methods and name not in given.methods:
            continue
        for steps in given.steps:
            for particles in given.particles:
                if name.startswith("azula") and particles not in FOR_AZULA:
                    continue
                row = {"method": name, **measure(run, particles, steps, given.seeds)}
                rows.append(row)
                print(table([row]).splitlines()[-1], f"{row['seconds']:.1f} s", flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    result = {"floor": low, "log_evidence": LOG_EVIDENCE, "samples": SAMPLES, "rows": rows}
    (given.out / "particles.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, given.out / "particles.png")


def draw(result: dict[str, Any], file: Path) -> None:
    """W2 and the error of the log-evidence over the particles, a line a method and step count."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["rows"]
    names = list(dict.fromkeys(r["method"] for r in rows))
    counts = sorted({r["steps"] for r in rows})
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for key, axis in zip(("w2", "log_evidence_rms"), axes, strict=True):
        for i, name in enumerate(names):
            for j, steps in enumerate(counts):
                line = [r for r in rows if (r["method"], r["steps"]) == (name, steps) and key in r]
                if not line:
                    continue
                axis.plot(
                    [r["particles"] for r in line], [r[key] for r in line], f"C{i}",
                    ls=(":", "--", "-")[j % 3], marker="o", ms=3,
                    label=f"{name}, {steps} steps",
                )  # fmt: skip
        axis.set(xlabel="particles")
        if axis.lines:
            axis.loglog()
    axes[0].axhline(result["floor"], color="k", lw=1, label="exact samples")
    axes[0].set_ylabel("W2 to the exact posterior")
    axes[0].legend(fontsize=7)
    first = [r for r in rows if "log_evidence_rms" in r]
    if first:
        k = torch.tensor([1.0, max(r["particles"] for r in first)])
        axes[1].plot(k, k.rsqrt(), "k", lw=1, label="1/sqrt(particles)")
        axes[1].legend()
    axes[1].set_ylabel("RMS error of the log-evidence (nats)")
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
