r"""The reverse SDE with steps and an error control of each sample's own.

In the log-SNR ``lam`` and the state of constant variance ``z = x/sqrt(alpha^2 + sigma^2)`` every
process is one, with additive noise; ``sin = sigma/sqrt(alpha^2 + sigma^2)``:

    dz = a(z, lam) d lam + sqrt(2) sin dW,    a = sin (sin z - 2 eps_hat)

Stochastic improved Euler, a step ``h`` with one normal ``n`` in both stages:

    k = h a(z, lam) + std n,    k' = h a(z + k, lam + h) + std n,    z <- z + (k + k')/2
    std^2 = int 2 sin^2 d lam = log((1 + q_t^2)/(1 + q_s^2)),    q = sigma/alpha
    E = cos rms of (k' - k)/2 / max(e_abs, e_rel max(|z|, |z + k|)),    accepted if E <= 1
    h <- h clamp(theta E^(-exponent), 0.2, 5),    rounded to a power of 2^(1/8)

``cos = alpha/sqrt(alpha^2 + sigma^2)`` at the end is how far an error reaches the data. A
network's ``E`` differs in its last digits from batch to batch; with rounded steps that is no
matter, where others would end at other points of a rough path. ``n`` is
the increment of a :class:`scoresde.brownian.BrownianPath`, a fixed function: a rejected step is
tried again on a part of its increment. New noise in its place, as published code draws it, favours
increments that undo the drift: twice the variance of 2-D data, and more at smaller tolerances (in
many dimensions errors are averages, which hardly depend on the draw: none was seen in 16).

Sources: Gotta Go Fast When Generating Data with Score-Based Models (Jolicoeur-Martineau et al.,
2021), https://arxiv.org/abs/2105.14080, with steps in t and x; On the convergence of adaptive
approximations for SDEs (Foster & Jelincic, 2024), https://arxiv.org/abs/2311.14201.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..brownian import BrownianPath, path_of, span
from ..noise import NoiseSource
from ..precision import name_of, tolerance, widest
from ..sde.base import GaussianSDE, Reverse, as_time, match
from .base import Callback, Solution, Solver, increment
from .runge_kutta import NOT_FINITE, SHORTEST, SPENT, TOO_SMALL, first_of, named

FIRST_STEP = 0.1
"""First step that is tried, in log-SNR: the state is still nearly white noise."""


@dataclass(frozen=True)
class AdaptiveSDE(Solver):
    """Stochastic improved Euler with per-sample steps on a Gaussian process.

    Of weak order 2 and strong order 1 at equal steps; a rejected attempt costs one evaluation.
    The noise follows one Brownian path a sample, which a tighter tolerance follows more closely.
    A callback is told the largest time of any sample, and is shown each at its own.

    Args:
        e_abs: absolute tolerance of a step, > 0, in units of the standard deviation of the state.
        e_rel: relative tolerance, >= 0.
        theta: safety factor of the next step, in (0, 1].
        exponent: how the step follows the error, in (0, 1]; errors grow as ``h^1.5``.
        max_nfe: evaluations after which a sample gives up, >= 2.
    """

    e_abs: float = 0.01
    e_rel: float = 0.01
    theta: float = 0.8
    exponent: float = 2 / 3
    max_nfe: int = 10_000

    name: ClassVar[str] = "adaptive-sde"
    order: ClassVar[float] = 2.0
    stochastic: ClassVar[bool] = True
    brownian: ClassVar[bool] = True
    nfe_per_step: ClassVar[int] = 2
    default_steps: ClassVar[int | None] = None
    default_grid: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if not (self.e_abs > 0 and self.e_rel >= 0):
            raise ValueError(
                "AdaptiveSDE needs e_abs > 0 and e_rel >= 0, "
                f"got e_abs={self.e_abs}, e_rel={self.e_rel}"
            )
        if not (0 < self.theta <= 1 and 0 < self.exponent <= 1):
            raise ValueError(
                "AdaptiveSDE needs theta and exponent in (0, 1], "
                f"got theta={self.theta}, exponent={self.exponent}"
            )
        if self.max_nfe < 2:
            raise ValueError(f"AdaptiveSDE needs max_nfe >= 2, got {self.max_nfe}")

    def step(
        self,
        reverse: Reverse,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        noise: NoiseSource | None,
        state: Any = None,
    ) -> tuple[Tensor, Any]:
        """One step of improved Euler from ``t`` to ``s``, without error control."""
        sde = reverse.sde
        start, end = sde.log_snr(t), sde.log_snr(s)
        z, n = x / match(size(sde, t), x), increment(x, noise, sde, t, s)
        h, kick = match(end - start, x), match(spread(start, end), x) * n
        k = h * slope(reverse, z, t) + kick
        both = k + h * slope(reverse, z + k, s) + kick
        return match(size(sde, s), x) * (z + both / 2), state

    def integrate(
        self,
        reverse: Reverse,
        x: Tensor,
        times: Tensor,
        noise: NoiseSource | None = None,
        callback: Callback | None = None,
    ) -> Solution:
        """Solves from ``times[0]`` to ``times[-1]``; see :meth:`Solver.integrate`.

        Raises:
            ValueError: if the log-SNR is not finite at an end, or for another ``eta``.
        """
        self.check(reverse)
        run = _Run(self, reverse, x, float(times[0]), float(times[-1]), path_of(noise))
        attempts = 0
        while len(run.items):
            run.attempt()
            attempts += 1
            if callback is not None:
                callback(attempts, float(run.time(run.reached).max()), run.state())
        nfe = run.nfe.to(x.device)
        if not run.failures:
            return Solution(run.state(), run.end, nfe=nfe)
        t, (item, reason) = run.time(run.reached), first_of(run.failures)
        where = f"t={float(t[item]):.6g} after {run.tried[item]} steps tried"
        where = f"{where}, short of t={run.end:.6g}, in {name_of(x.dtype)}"
        message = f"{named(item, noise)} stopped at {where}: {reason}"
        return Solution(run.state(), t.to(x.device, widest(x.device)), False, message, nfe)

    def normal(
        self, path: BrownianPath, here: Tensor, start: Tensor, end: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of the steps from ``start`` to ``end``, ``(b,)``: the normals, and the path at the end.

        ``here`` is the path at ``start``, float64, ``(b, *shape)``.
        """
        ahead = path.at(end, tuple(here.shape), here.device)
        return (ahead - here) / as_time(span(start, end).sqrt().to(here.device), here), ahead


class _Run:
    """A solution on its way. Rows of ``lam``, ``h``, ``z``, ... are those of ``items``."""

    def __init__(
        self,
        solver: AdaptiveSDE,
        reverse: Reverse,
        x: Tensor,
        t_start: float,
        t_end: float,
        noise: Any,
    ) -> None:
        sde = reverse.sde
        self.solver, self.reverse, self.path, self.end = solver, reverse, noise, t_end
        self.t_start, self.first, self.last = (
            t_start,
            *map(float, map(sde.log_snr, (t_start, t_end))),
        )
        if not self.first < self.last < float("inf"):
            raise ValueError(
                f"AdaptiveSDE needs a finite log-SNR at t={t_start:g} and t={t_end:g}, "
                f"got {self.first:g} and {self.last:g}"
            )
        self.e_abs = tolerance(solver.e_abs, x.dtype)
        total = len(x)
        self.reached = torch.full((total,), self.first, dtype=torch.float64)
        self.nfe = torch.zeros(total, dtype=torch.int64)
        self.tried = torch.zeros(total, dtype=torch.int64)
        self.failures: dict[int, str] = {}
        self.z_all = x / match(size(sde, t_start), x)

        self.items = torch.arange(total)  # who is still under way
        self.lam = self.reached.clone()
        self.h = torch.full_like(self.lam, FIRST_STEP)
        self.z = self.z_all
        self.here = self.path.at(self.lam, tuple(x.shape), x.device)
        self.a = torch.zeros_like(self.z)
        self.stale = torch.ones(total, dtype=torch.bool)  # whose ``a`` is that of a step before

    def time(self, lam: Tensor) -> Tensor:
        """Time at ``lam (b,)``, never outside the interval, whatever the rounding."""
        t = self.reverse.sde.time(lam).clamp(self.end, self.t_start)
        t = torch.where(lam >= self.last, self.end, t)
        return torch.where(lam <= self.first, self.t_start, t)

    def state(self) -> Tensor:
        """``x`` of all samples, each where it is."""
        return (
            match(beside(size(self.reverse.sde, self.time(self.reached)), self.z_all), self.z_all)
            * self.z_all
        )

    def slope(self, z: Tensor, lam: Tensor, items: Tensor) -> Tensor:
        """``a`` for some samples, one evaluation each."""
        self.nfe[items] += 1
        return slope(self.reverse.part(items.to(z.device)), z, beside(self.time(lam), z))

    def attempt(self) -> None:
        """One attempt of every sample under way, and who leaves after it."""
        solver, z = self.solver, self.z
        device = z.device
        self.tried[self.items] += 1
        target = torch.where(self.h < self.last - self.lam, self.lam + self.h, self.last)
        h = target - self.lam
        if bool(self.stale.any()):
            rows = self.stale.nonzero().flatten().to(device)
            new = self.slope(z[rows], self.lam[self.stale], self.items[self.stale])
            self.a = self.a.index_copy(0, rows, new)
        n, ahead = solver.normal(self.path.part(self.items), self.here, self.lam, target)
        kick = match(beside(spread(self.lam, target), z), z) * n.to(z)
        step = match(beside(h, z), z)
        trial = z + step * self.a + kick
        change = step * (self.slope(trial, target, self.items) - self.a) / 2
        scale = (solver.e_rel * torch.maximum(z.abs(), trial.abs())).clamp_min(self.e_abs)
        error = (change / scale).flatten(1).square().mean(1).sqrt().cpu().double()  # the one wait
        error = error * torch.sigmoid(2 * target).sqrt()

        accepted = error <= 1
        moves = beside(accepted, z)
        self.z = torch.where(moves, trial + change, z)
        self.here = torch.where(moves, ahead, self.here)
        self.lam = torch.where(accepted, target, self.lam)
        self.stale = accepted
        factor = (solver.theta * error**-solver.exponent).nan_to_num(0.2).clamp(0.2, 5)
        self.h = torch.exp2((8 * (h * factor).log2()).round() / 8)
        self.reached[self.items] = self.lam
        self.z_all = self.z_all.index_copy(0, self.items.to(device), self.z)
        self._leave(error)

    def _leave(self, error: Tensor) -> None:
        """Drops who has arrived, and who cannot go on."""
        going = self.lam < self.last
        way = self.last - self.first
        lost = ~error.isfinite() & (self.h < SHORTEST * way)
        stuck = self.h < 1e-3 * SHORTEST * way
        spent = self.nfe[self.items] + 1 + self.stale.long() > self.solver.max_nfe
        for reason, met in ((NOT_FINITE, lost), (TOO_SMALL, stuck), (SPENT, spent)):
            self.failures.update(dict.fromkeys(self.items[going & met].tolist(), reason))
            going = going & ~met
        if bool(going.all()):
            return
        rows = going.nonzero().flatten().to(self.z.device)
        self.items, self.lam, self.h = self.items[going], self.lam[going], self.h[going]
        self.stale = self.stale[going]
        self.z, self.here, self.a = self.z[rows], self.here[rows], self.a[rows]


def size(sde: GaussianSDE, t: float | Tensor) -> Tensor:
    """``sqrt(alpha^2 + sigma^2)``."""
    return torch.hypot(sde.alpha(t), sde.sigma(t))


def spread(start: Tensor, end: Tensor) -> Tensor:
    """``std`` of the noise of a step between two log-SNRs."""
    return (softplus(-2 * start) - softplus(-2 * end)).sqrt()


def slope(reverse: Reverse, z: Tensor, t: Tensor) -> Tensor:
    """``a = sin (sin z - 2 eps_hat)`` at times of shape ``()`` or ``(B, 1, ..., 1)``."""
    whole = size(reverse.sde, t)
    sin = match(reverse.sde.sigma(t) / whole, z)
    return sin * (sin * z - 2 * reverse.noise(match(whole, z) * z, t))


def beside(values: Tensor, x: Tensor) -> Tensor:
    """``values (B,)`` where they broadcast against ``x``; floats in its most precise type."""
    dtype = values.dtype if values.dtype == torch.bool else widest(x.device)
    return as_time(values.to(x.device, dtype), x)
