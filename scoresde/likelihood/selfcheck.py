r"""A likelihood's settings, tried where the answer is known: do its error bars tell the truth?

Under every Gaussian process a mixture of Gaussians has a closed-form score, and a closed-form
density at ``t_min`` and at ``t_max``. Mixtures of the shape of the data go through the settings
that the data will go through; of each item, with the latent ``z`` that was reached,

    error = log_prob - log p(x; t_min) + (log p(z; t_max) - log prior(z))

is the estimator's own: the bracket is what the prior lacks of the marginal at ``t_max``, a fault
of the process that no solver mends, and is reported apart (of discrete data by the first draw's
latent). The truth of discrete data is ``E[log p(x) - log q(x | k)]``, by many draws of the closed
form.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..analytic import GaussianMixture
from ..config import build
from ..data.scaler import Scaler
from ..noise import KeyedNoise
from ..precision import FLOOR
from ..sde.base import GaussianSDE
from . import dequantize
from .dequantize import importance_weighted, mean_bound
from .discrete import SERIES, data_log_prob
from .flow import log_prob
from .result import LogProb
from .terminal import terminal_log_prob
from .verdict import Check, binomial_range, verdict

CASES = {"broad": 0.85, "narrow": 0.2}
"""Name of a mixture to the standard deviation of its modes, in units of that of the whole."""
MODES = 6
DISCRETE_STD = 0.3
"""Standard deviation of discrete data in their range [-1, 1]."""
TRUTH_DRAWS = 32
"""Draws of the truth of discrete data for each of the estimate: its variance in 32 parts."""
TRUTH = 1 << 41
"""Keeps its noise apart from that of the estimate."""
RESERVED = ("seed", "start_index", "differentiable", "progress")


def self_check(
    sde: GaussianSDE,
    shape: tuple[int, ...],
    settings: Mapping[str, Any],
    *,
    levels: int | None = None,
    repeats: int = 400,
    seed: int = 0,
    level: float = 0.95,
    batch: int = 64,
    cases: Sequence[str] = tuple(CASES),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    wrap: Callable[[Any], Any] | None = None,
    progress: Callable[[float], object] | None = None,
) -> list[Check]:
    """Puts mixtures of known density through the settings of a likelihood, and says how it went.

    Args:
        sde: the process of the model.
        shape: of an item.
        settings: of :func:`scoresde.log_prob`, or with ``levels`` of
            :func:`scoresde.data_log_prob`, all but the seed and conditions. Moments given as
            ``terminal`` are replaced by those of the mixture, of the same form.
        levels: for discrete data of so many levels in [-1, 1]; None for a density.
        repeats: items of each mixture, >= 20; 400 tell a coverage of 95 % to about 2 %.
        seed: of the mixtures, the items and their noise.
        level: of the interval, in (0, 1).
        batch: items solved at once.
        cases: which mixtures, of ``"broad"`` and ``"narrow"``.
        dtype: of the state and the score, float32 as a network's or float64.
        device: where to solve.
        wrap: makes of each exact score the one that is used, to try what stands between a model
            and its likelihood: a lower precision, a cache, guidance.
        progress: called with the fraction done.

    Returns:
        A :class:`~scoresde.likelihood.verdict.Check` for each mixture, which
        :func:`~scoresde.likelihood.verdict.report` makes a table of.

    Raises:
        ValueError: for arguments outside the above, or settings that do not fit.
    """
    taken = [name for name in RESERVED if name in settings]
    if taken:
        raise ValueError(f"a self-check sets {', '.join(taken)} itself: leave it out of settings")
    if repeats < 20 or batch < 1 or not 0 < level < 1:
        raise ValueError(
            "a self-check needs repeats >= 20, batch >= 1 and 0 < level < 1, "
            f"got repeats={repeats}, batch={batch}, level={level}"
        )
    wrong = [case for case in cases if case not in CASES]
    if wrong or not cases:
        raise ValueError(f"cases are among {', '.join(CASES)}, got {', '.join(wrong) or 'none'}")
    if dtype not in FLOOR:
        raise ValueError(f"dtype must be one of {', '.join(map(str, FLOOR))}, got {dtype}")
    checks = []
    for number, case in enumerate(cases):
        std = 1.0 if levels is None else DISCRETE_STD
        least = 0.0 if levels is None else 2 / levels
        mixture = mixture_of(shape, std, max(CASES[case] * std, min(least, 0.9 * std)), seed)
        own = _with_moments(settings, mixture)
        trial = _Trial(sde, mixture, own, levels, seed, dtype, device, wrap)

        def tell(done: float, before: int = number) -> None:
            if progress is not None:
                progress((before + done) / len(cases))

        checks.append(trial.check(case, repeats, batch, level, tell))
    return checks


def mixture_of(shape: tuple[int, ...], std: float, mode: float, seed: int = 0) -> GaussianMixture:
    """A mixture of six modes of standard deviation ``mode``, ``std`` in all, of zero mean."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(MODES, *shape, generator=generator, dtype=torch.float64)
    means = means - means.mean(0)
    means = means / means.square().mean().sqrt()
    return GaussianMixture([1.0] * MODES, (std**2 - mode**2) ** 0.5 * means, [mode] * MODES)


def _with_moments(settings: Mapping[str, Any], mixture: GaussianMixture) -> dict[str, Any]:
    """The settings, with the mixture's own moments where a terminal is given."""
    terminal = settings.get("terminal")
    if terminal is None:
        return dict(settings)
    mean, covariance = mixture.moments()
    if tuple(torch.as_tensor(terminal[1]).shape) != tuple(covariance.shape):
        covariance = covariance.diagonal().sqrt().reshape(mean.shape)
    return {**settings, "terminal": (mean, covariance)}


class _Scaled:
    """A score with the scaler of its data."""

    def __init__(self, score: Any, scaler: Scaler) -> None:
        self._score, self.sde, self.scaler = score, score.sde, scaler

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self._score(x, t)


@dataclass(frozen=True)
class _Trial:
    """A mixture, and what it is put through."""

    sde: GaussianSDE
    mixture: GaussianMixture
    settings: dict[str, Any]
    levels: int | None
    seed: int
    dtype: torch.dtype
    device: torch.device | str
    wrap: Callable[[Any], Any] | None

    def check(
        self, case: str, repeats: int, batch: int, level: float, told: Callable[[float], object]
    ) -> Check:
        """All batches, and what they come to."""
        started = time.perf_counter()
        data = self.data(repeats)
        outs, columns = [], []
        for start in range(0, repeats, batch):
            part = data[start : start + batch]
            out = self.solve(part, start)
            columns.append(self.columns(out, part, start, level))
            outs.append(out)
            told(min(start + batch, repeats) / repeats)
        error, lacks, truth_error, covers, covers_all, stated, nfe = torch.cat(columns, 1)
        done = error.isfinite()
        kept, holds = error[done], int(covers.sum())
        bias, bias_stderr = _mean(kept)
        finer = None
        if abs(bias) > 3 * bias_stderr and "target_stderr" not in self.settings:
            finer = self.finer(data[:batch], outs[0])
        check = Check(
            case=case, bias=bias, bias_stderr=bias_stderr, rms=_rms(kept),
            stated=_rms(stated[done]), coverage=holds / repeats,
            coverage_range=binomial_range(holds, repeats),
            coverage_with_prior=float(covers_all.mean()), prior_bias=-float(lacks[done].mean()),
            prior_rms=_rms(lacks[done]),
            finer=finer, truth_stderr=_rms(truth_error), failed=int((~done).sum()),
            nfe=float(nfe.mean()), repeats=repeats, seed=self.seed, level=level,
            levels=self.levels, shape=self.mixture.shape, sde=repr(self.sde),
            how={**_how(outs[0]), "dtype": str(self.dtype).removeprefix("torch.")},
            seconds=time.perf_counter() - started, ok=False, verdict="",
        )  # fmt: skip
        message = next((out.message for out in outs if out.message), "")
        ok, said = verdict(check, message, bool(self.settings.get("solver_error")))
        return replace(check, ok=ok, verdict=said)

    def data(self, count: int) -> Tensor:
        """Items, of levels where they are discrete."""
        x = self.mixture.sample(count, torch.Generator().manual_seed(self.seed))
        if self.levels is None:
            return x.to(self.dtype)
        return ((x + 1) * self.levels / 2).floor().clamp(0, self.levels - 1).long()

    @property
    def scaler(self) -> Scaler:
        """Of discrete data in [-1, 1]."""
        assert self.levels is not None
        return Scaler((self.levels / 2,), (2 / self.levels,), self.levels)

    def solve(self, data: Tensor, start: int, **changed: Any) -> LogProb:
        """The likelihood of some items by the settings."""
        score: Any = self.mixture.to(self.device, self.dtype).score(self.sde)
        score = score if self.wrap is None else self.wrap(score)
        settings = {**self.settings, **changed, "seed": self.seed, "start_index": start}
        if self.levels is None:
            return log_prob(score, data.to(self.device), **settings)
        return data_log_prob(_Scaled(score, self.scaler), data.to(self.device), **settings)

    def columns(self, out: LogProb, data: Tensor, start: int, level: float) -> Tensor:
        """Of each item what is counted, float64 on the CPU, ``(7, B)``."""
        value, low, high = (v.cpu().double() for v in (out.log_prob, *out.interval(level)))
        latent = out.latent.cpu().double()  # of discrete data that of the first draw
        lacks = self.mixture.log_prob(latent, self.sde, out.t_max) - terminal_log_prob(
            self.sde, latent, out.t_max, self.settings.get("terminal")
        )
        truth, truth_error = self.truth(data, out, start)
        holds = [(low <= t) & (t <= high) for t in (truth - lacks, truth)]
        rest = (out.stderr.cpu(), out.nfe.cpu())
        return torch.stack(
            [t.double() for t in (value - truth + lacks, lacks, truth_error, *holds, *rest)]
        )

    def truth(self, data: Tensor, out: LogProb, start: int) -> tuple[Tensor, Tensor]:
        """What the estimates are of, in closed form, and its own standard error, ``(B,)`` each."""
        if self.levels is None:
            truth = self.mixture.log_prob(data.double(), self.sde, out.t_min)
            return truth, torch.zeros_like(truth)
        kind = build(self.settings.get("dequantization", "uniform"), dequantize, "dequantization")
        values = []
        for number in range(TRUTH_DRAWS * max(2, out.draws)):
            source = KeyedNoise(self.seed ^ TRUTH, start + number * SERIES)
            x, log_q, _ = kind.draw(data, self.scaler, self.sde, source)
            values.append(self.mixture.log_prob(x.double(), self.sde, out.t_min) - log_q.double())
        return (importance_weighted if out.importance else mean_bound)(torch.stack(values))

    def finer(self, data: Tensor, out: LogProb) -> tuple[float, float]:
        """What shorter steps add to the estimates of a batch, and its standard error."""
        changed: dict[str, Any] = {"solver_error": False}
        if out.steps is None:
            changed |= {"rtol": out.rtol / 10, "atol": out.atol / 10}
        else:
            changed |= {"steps": 2 * out.steps}
        change = (self.solve(data, 0, **changed).log_prob - out.log_prob).double()
        change = change[change.isfinite()]
        return _mean(change)


def _how(out: LogProb) -> dict[str, Any]:
    """What a result says of how it was obtained."""
    names = ["method", "steps", "divergence", "probes", "noise", "t_min", "t_max"]
    names[2:2] = [] if out.steps is not None else ["rtol", "atol"]
    if out.divergence == "exact":
        names = [name for name in names if name not in ("probes", "noise")]
    how = {name: getattr(out, name) for name in names}
    how["grid"] = None if out.grid is None else out.grid["name"]
    if out.levels is not None:
        how |= {"dequantization": (out.dequantizer or {})["name"], "draws": out.draws}
    return {name: value for name, value in how.items() if value is not None}


def _mean(values: Tensor) -> tuple[float, float]:
    """A mean and its standard error; nan of too few."""
    if len(values) < 2:
        return math.nan, math.nan
    return float(values.mean()), float(values.std()) / len(values) ** 0.5


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
