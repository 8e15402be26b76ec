r"""What a likelihood returns: its parts, what is not known of it, and how it was obtained.

Three things are left uncertain, and each has a standard error of its own: the probes that estimate
the divergence, the noise that dequantises, and the steps of the solver. They are independent, so
that ``stderr^2 = stderr_probes^2 + stderr_dequantization^2 + stderr_solver^2``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogProb:
    """Log-likelihoods in nats with their parts, and how they were obtained.

    Attributes:
        log_prob: ``prior + delta``, shape ``(B,)``, of the data in model range; of
            :func:`scoresde.data_log_prob`, of the data themselves: ``prior + delta +
            dequantization`` of discrete data (more with importance weights), ``prior + delta +
            log_det`` of continuous; nan where the solve did not end.
        prior: log-density of the latent under the terminal distribution, ``(B,)``.
        delta: integral of the divergence, ``(B,)``.
        log_det: the scaler's ``log |d model / d data|`` of an item, 0 where there is no scaler:
            what :func:`scoresde.log_prob` lacks to the log-density in units of the data.
        stderr: standard error of ``log_prob``, of all parts that were estimated, ``(B,)``.
        stderr_probes: over the probes; 0 if the divergence is exact, nan with one probe, which
            tells nothing of its own error, ``(B,)``.
        stderr_dequantization: over the draws of the dequantisation; 0 without one, nan with one
            draw, ``(B,)``. Each draw has probes of its own, so that with several draws it holds
            what the probes leave as well, and ``stderr_probes`` is 0.
        stderr_solver: error left by the steps, nan where not estimated, ``(B,)``.
        freedom: degrees of freedom of ``stderr`` without the solver's part, ``(B,)``.
        estimates: log-likelihood by each probe, or by each draw, ``(B, k)``.
        latent: the state at ``t_max`` (where the solve stopped, if early), ``(B, *shape)``.
        nfe: evaluations of the score for each sample, int64, ``(B,)``.
        converged: whether a sample reached ``t_max`` within tolerance (for fixed steps: reached
            it) with finite values, bool, ``(B,)``.
        message: where and why the first sample that did not converge stopped, or what kept a
            target from being met; else empty.
        seconds: wall-clock time.
        divergence: ``"exact"`` or ``"hutchinson"``.
        probes: probes, the most of any sample; 0 if exact.
        noise: distribution of the probes.
        method: the ODE method, or name of the solver.
        steps: fixed steps, the most of any sample; None if adaptive.
        rtol: relative tolerance, of the state and of nats a dimension; the tightest of any sample.
        atol: absolute tolerance, likewise.
        t_min: where the integral starts: the density is that of the data with this much noise.
        t_max: where it ends.
        seed: key of the probes; ``start_index`` the index of the first sample.
        weights: which weights the score carries (``"ema"``, ``"raw"``), None if it does not say.
        solver: name and fields of a solver of the package; None for the other methods.
        grid: name and fields of its grid.
        levels: levels of discrete data, None of continuous.
        dequantization: what dequantisation adds to ``prior + delta``: ``-log q``, ``(B,)``.
        dequantizer: its name and fields, None without one; ``draws`` the draws of a sample.
        importance: whether the draws are weighted by importance, or averaged.
    """

    log_prob: Tensor
    prior: Tensor
    delta: Tensor
    log_det: float
    stderr: Tensor
    stderr_probes: Tensor
    stderr_dequantization: Tensor
    stderr_solver: Tensor
    freedom: Tensor
    estimates: Tensor
    latent: Tensor
    nfe: Tensor
    converged: Tensor
    message: str
    seconds: float
    divergence: str
    probes: int
    noise: str
    method: str
    steps: int | None
    rtol: float
    atol: float
    t_min: float
    t_max: float
    seed: int
    start_index: int
    weights: str | None
    solver: dict[str, Any] | None = None
    grid: dict[str, Any] | None = None
    levels: int | None = None
    dequantization: Tensor | None = None
    dequantizer: dict[str, Any] | None = None
    draws: int = 0
    importance: bool = False

    @property
    def bits_per_dim(self) -> Tensor:
        """``-log_prob / (D ln 2)`` of discrete data, ``(B,)``.

        Raises:
            ValueError: for a density, which has no bits: see :func:`scoresde.bits_per_dim`.
        """
        if self.levels is None:
            raise ValueError(
                "bits/dim are of discrete data: take data_log_prob(model, data), "
                "or bits_per_dim(log_prob, dims, levels, width)"
            )
        return -self.log_prob / (self.latent[0].numel() * math.log(2))

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Ends of the interval that covers the log-likelihood as often as ``level``, ``(B,)``.

        Student's, with the degrees of freedom of Welch and Satterthwaite where the solver's error,
        which counts as known, is part of ``stderr``; and on the side where the estimates' skewness
        asks for more, Hall's, so that it is seldom too short: fixed probes err like a chi-squared
        variable. Nan where nothing is known of the error.
        """
        from scipy import stats

        # On the CPU: there is always float64.
        probes, dequantization = self.stderr_probes.cpu(), self.stderr_dequantization.cpu()
        random = probes.double() ** 2 + dequantization.double() ** 2
        total = self.stderr.cpu().double() ** 2
        freedom = self.freedom.cpu().double() * (total / random).nan_to_num(1.0, 1e12) ** 2
        freedom = torch.where(random > 0, freedom, torch.full_like(freedom, math.inf))
        student = torch.as_tensor(stats.t.ppf((1 + level) / 2, freedom.clamp_max(1e12).numpy()))
        # The third cumulant is the random part's alone.
        shift = _skewness_shift(self.estimates.cpu()) * (random / total).nan_to_num(0.0) ** 1.5
        if self.importance:  # whose estimates are averaged as exponentials
            shift = torch.zeros_like(shift)
        below, above = (torch.maximum(student, _unskewed(student, s)) for s in (shift, -shift))
        unknown = (random == 0) & self.stderr_solver.cpu().isnan()
        below, above = (end.masked_fill(unknown, math.nan) for end in (below, above))
        return (
            self.log_prob - self.stderr * below.to(self.stderr),
            self.log_prob + self.stderr * above.to(self.stderr),
        )


LEAST = 4
"""Estimates that tell of a skewness."""


def _skewness_shift(estimates: Tensor) -> Tensor:
    """``skewness / (6 sqrt(k))`` of the ``k`` estimates of each item, 0 if too few, ``(B,)``."""
    values = estimates.double()
    known = values.isfinite()
    count = known.sum(1).double()
    centred = (values - values.nanmean(1, keepdim=True)).where(known, values.new_zeros(()))
    second, third = (centred.pow(n).sum(1) / count for n in (2, 3))
    unbiased = (count * (count - 1)).sqrt() / (count - 2)
    shift = unbiased * third / second**1.5 / (6 * count.sqrt())
    return torch.where((count >= LEAST) & (second > 0), shift, torch.zeros_like(shift))


def _unskewed(student: Tensor, shift: Tensor) -> Tensor:
    """Inverse of Hall's ``g(T) = T + 2 a T^2 + 4/3 a^2 T^3 + a``, which takes the skewness away.

    Source: On the Removal of Skewness by Transformation (Hall, 1992),
    https://doi.org/10.1111/j.2517-6161.1992.tb01876.x.
    """
    cube = 1 + 6 * shift * (student - shift)
    root = cube.sign() * cube.abs() ** (1 / 3)
    return torch.where(shift.abs() > 1e-9, (root - 1) / (2 * shift), student)


def total_stderr(*parts: Tensor) -> Tensor:
    """Root of the sum of squares: of random parts as they are, of the last where it is known."""
    *random, solver = parts
    squares = [part**2 for part in random]
    return (sum(squares, torch.zeros_like(solver)) + solver.nan_to_num(0.0) ** 2).sqrt()
