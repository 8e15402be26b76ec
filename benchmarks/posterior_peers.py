"""azula's methods that sample posteriors, each within a number of passes.

They take the same denoiser as ours under the same process, from the same start. Passes back are
counted where they go through the denoiser. azula steps evenly in the time of a schedule, so each
schedule is a grid: the time of the process (as in azula's own schedule of this kind, down to the
noise of its default, 1e-3) or its log-SNR.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from posterior_methods import SDE, Precisions
from posterior_problems import Problem, f64
from torch import Tensor

import scoresde as sd
from scoresde.noise import KeyedNoise


class _Pass(torch.autograd.Function):
    """The identity, which counts the passes back through it, of any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: list[int]) -> Tensor:
        ctx.count = count
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.count[0] += 1
        return _Pass.apply(grad, ctx.count), None


def along_time(t: Tensor) -> Tensor:
    """Equal steps in the time of the process."""
    return SDE.t_min + t * (SDE.t_max - SDE.t_min)


def along_log_snr(t: Tensor) -> Tensor:
    """Equal steps in its log-SNR."""
    low, high = SDE.log_snr(SDE.t_max), SDE.log_snr(SDE.t_min)
    return SDE.time(high + t * (low - high))


GRIDS = {"time": along_time, "log-SNR": along_log_snr}


@dataclass(frozen=True)
class Variant:
    """A method of azula with its options.

    Args:
        method: name that it shares with ours.
        options: of its class.
        grid: name of the grid.
        eta: of the DDIM step, where the method leaves the sampler open or is one.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    grid: str = "time"
    eta: float | None = None

    def __str__(self) -> str:
        said = [f"{k}={v:g}" for k, v in self.options.items() if not isinstance(v, str)]
        said += [f"eta={self.eta:g}"] if self.eta is not None else []
        return ", ".join([*said, f"{self.grid} grid"])


def variants(problem: Problem) -> dict[str, list[Variant]]:
    """azula's methods with the values of their main options to try, the default ones first."""
    if importlib.util.find_spec("azula") is None:
        return {}
    options: dict[str, list[dict[str, Any]]] = {
        "dps": [{"zeta": z} for z in (1.0, 0.03, 0.1, 0.3, 3.0, 10.0)],
        "pgdm": [{}],
        "tmpd": [{}],
        "mmps": [{"iterations": i} for i in (1, 2, 3)],
        "diffpir": [
            *({"lmbda": v} for v in (10.0, 0.1, 1.0, 3.0)),
            *({"lmbda": v, "iterations": 5} for v in (0.3, 1.0)),
        ],
        "jfps": [{"iterations": i} for i in (1, 3)],
        "smc": [{"ahead": True}, {"ahead": False}],
    }
    etas: dict[str, tuple[float | None, float | None]] = dict.fromkeys(options, (1.0, 0.0))
    etas |= {"pgdm": (0.0, 1.0), "dps": (None, None), "smc": (None, None)}
    if isinstance(problem.operator, sd.inverse.Mask):
        options["repaint"] = [{"iterations": i} for i in (3, 1, 10)]
        etas["repaint"] = (0.0, 1.0)
    found: dict[str, list[Variant]] = {}
    for name, some in options.items():
        usual, other = etas[name]
        places = dict.fromkeys([("time", usual), ("log-SNR", usual), ("time", other)])
        found[name] = [Variant(name, o, g, e) for g, e in places for o in some]
    return found


class Azula:
    """Runs variants on a problem's measurements, ``n`` samples of each."""

    def __init__(self, problem: Problem, y: Tensor, n: int, seed: int) -> None:
        from azula.denoise import Denoiser, DiracPosterior
        from azula.linalg.covariance import FullCovariance, IsotropicCovariance

        self.problem, self.n, self.seed = problem, n, seed
        self.draws, self.shape = len(y), problem.mixture.shape
        self.count, self.known_passes = [0], {}
        self.known = problem.operator.seen(torch.ones_like(y[:1])).flatten() > 0
        self.y = y.repeat_interleave(n, 0)
        noise = torch.tensor(problem.noise_std, dtype=f64) ** 2
        self.noise = IsotropicCovariance(noise)
        _, covariance = problem.mixture.moments()
        values, axes = torch.linalg.eigh(covariance)
        self.signal = FullCovariance(axes, values)
        score, count = Precisions(problem.mixture), self.count

        class Exact(Denoiser):
            def __init__(self, grid: Callable[[Tensor], Tensor]) -> None:
                super().__init__()
                self.time = lambda t: grid(torch.as_tensor(t, dtype=f64))

            def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
                return SDE.alpha(self.time(t)), SDE.sigma(self.time(t))

            def forward(self, x: Tensor, t: Tensor, **_: Any) -> Any:
                count[0] += 1
                return DiracPosterior(mean=_Pass.apply(score.denoise(x, self.time(t)), count))

        self.denoiser = Exact

    def measure(self, x: Tensor) -> Tensor:
        """The measured numbers ``(B, m)`` of flat items."""
        return self.problem.operator(x.reshape(-1, *self.shape)).flatten(1)[:, self.known]

    def back(self, y: Tensor) -> Tensor:
        """The pseudo-inverse of :meth:`measure`, flat."""
        full = y.new_zeros(len(y), len(self.known))
        full[:, self.known] = y
        return self.problem.operator.pinv(full.reshape(-1, *self.problem.operator.out)).flatten(1)

    def passes(self, variant: Variant) -> int:
        """Of one step, found by a trial."""
        key = (variant.method, *variant.options.values())
        if key not in self.known_passes:
            self.count[0] = 0
            self._run(variant, slice(0, 1), 1)
            self.known_passes[key] = self.count[0]
        return self.known_passes[key]

    def __call__(self, variant: Variant, budget: int) -> tuple[Tensor, int, int]:
        """Samples ``(draws * n, *shape)``, passes and steps.

        Raises:
            ValueError: if the budget pays for no step.
        """
        each = self.passes(variant)
        steps = budget // each
        if steps < 1:
            raise ValueError(f"{variant.method} needs {each} passes a step")
        self.count[0] = 0
        torch.manual_seed(self.seed)
        if variant.method == "smc":  # one run of particles a measurement
            rows = [slice(i * self.n, (i + 1) * self.n) for i in range(self.draws)]
            x = torch.cat([self._run(variant, part, steps) for part in rows])
            return x.reshape(-1, *self.shape), self.count[0] // self.draws, steps
        x = self._run(variant, slice(None), steps)
        return x.reshape(-1, *self.shape), self.count[0], steps

    def _run(self, variant: Variant, rows: slice, steps: int) -> Tensor:
        size = len(self.y) * self.problem.mixture.means[0].numel()
        start = SDE.prior_sample(
            (len(self.y), size // len(self.y)), KeyedNoise(self.seed), dtype=f64
        )
        x, y = start[rows], self.y[rows].flatten(1)[:, self.known]
        denoiser = flattened(self.denoiser(GRIDS[variant.grid]), self.shape)
        with torch.no_grad():
            return self._sampler(variant, denoiser, y, steps)(x)

    def _sampler(self, variant: Variant, denoiser: Any, y: Tensor, steps: int) -> Any:
        from azula import guidance, sample

        along: dict[str, Any] = {"steps": steps, "silent": True, "dtype": f64}
        if variant.eta is not None:
            along["eta"] = variant.eta
        name, options, measure = variant.method, variant.options, self.measure
        power = self.problem.noise_std**2
        if name == "dps":
            # Its step is over the norm of the whole batch; a sample's own comes of a sum of norms.
            def residual(x: Tensor) -> Tensor:
                return (measure(x) - y).norm(dim=1).sum().reshape(1)

            return guidance.DPSSampler(denoiser, y.new_zeros(1), residual, **options, **along)
        if name == "pgdm":
            return guidance.PGDMSampler(denoiser, y, measure, self.back, **along)
        if name == "repaint":
            flat, mask = self.y.new_zeros(len(y), len(self.known)), self.known
            flat[:, mask] = y
            return guidance.RePaintSampler(denoiser, flat, mask, **options, **along)
        if name == "smc":
            return guidance.TDSSampler(denoiser, self._twist(y, **options), **along)
        made = {
            "tmpd": lambda: guidance.TMPDenoiser(denoiser, y, measure, power),
            "mmps": lambda: guidance.MMPSDenoiser(denoiser, y, measure, self.noise, **options),
            "diffpir": lambda: guidance.DiffPIRDenoiser(denoiser, y, measure, power, **options),
            "jfps": lambda: guidance.JFPSDenoiser(
                denoiser, y, measure, self.noise, self.signal, **options
            ),
        }
        return sample.DDIMSampler(made[name](), **along)

    def _twist(self, y: Tensor, ahead: bool) -> Callable[[Tensor, Tensor], Tensor]:
        """The likelihood of the denoised data; ``ahead`` adds what is not yet known of them."""
        matrix = self.measure(torch.eye(self.problem.mixture.means[0].numel(), dtype=f64)).T
        values, axes = torch.linalg.eigh(matrix @ matrix.T)

        def log_likelihood(x0: Tensor, q: Tensor) -> Tensor:
            wider = q**2 / (1 + q**2) if ahead else 0.0
            spread = self.problem.noise_std**2 + wider * values
            r = (self.measure(x0) - y) @ axes
            return -(r**2 / spread + torch.as_tensor(spread).log()).sum(1) / 2

        return log_likelihood


def flattened(denoiser: Any, shape: tuple[int, ...]) -> Any:
    """A denoiser of flat items, which azula's linear algebra takes."""
    inner = denoiser.forward

    def forward(x: Tensor, t: Tensor, **cond: Any) -> Any:
        found = inner(x.reshape(-1, *shape), t, **cond)
        found.mean = found.mean.flatten(1)
        return found

    denoiser.forward = forward
    return denoiser
