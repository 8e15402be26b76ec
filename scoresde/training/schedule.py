r"""Schedules of training made of cells of log-SNR: computed once, or learned with the network.

With any schedule ``lambda(u)`` from ``lambda(t_min)`` to ``lambda(t_max)``, ``u`` uniform,

    loss = l(t) |d lambda/du| / (|d lambda/dt| (t_max - t_min)),    lambda(t) = lambda(u)

is an unbiased estimate of the mean of ``l`` over uniform times: the end points alone matter. What
a schedule changes is the variance, so that is what it is trained for. As the mean is fixed,
minimising ``E[loss^2]`` does it, and ``grad E[loss^2] = E[2 loss grad loss]``: the gradients that
the backward pass of the loss brings to the schedule are multiplied by ``2 loss``, item by item,
and no second pass is needed.

Sources: Variational Diffusion Models (Kingma et al., 2021), the appendix on learning the
schedule, https://arxiv.org/abs/2107.00630; Improved Techniques for Maximum Likelihood
Estimation for Diffusion ODEs (Zheng et al., 2023), https://arxiv.org/abs/2305.03935.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..noise import NoiseSource
from ..precision import widest
from ..sde.base import GaussianSDE
from .times import Times

CELLS = 4096


@dataclass(frozen=True)
class VelocityImportance(Times):
    """Density proportional to ``alpha^2 g^2/sigma^2``, the likelihood weight on a velocity.

    With ``eps_hat - eps = alpha (v_hat - v)``, ``v = (eps - sigma x)/alpha`` on a VP process
    (parameterization ``v``) or ``(eps - x)/alpha`` on the straight path, the likelihood weight on
    the error of ``v`` is ``alpha^2 g^2/sigma^2``, which these times leave constant. On a VP
    process they are uniform in ``log sigma``: i-DODE's closed form. The density is constant on
    ``4096`` cells of log-SNR and the correction is that of this density, hence exact.

    Source: Improved Techniques for Maximum Likelihood Estimation for Diffusion ODEs (Zheng et al.,
    2023), https://arxiv.org/abs/2305.03935.
    """

    stratified: bool = True

    def quantile(self, sde: GaussianSDE, u: Tensor) -> Tensor:
        """The time of the log-SNR below which a share ``u`` lies."""
        edges = _velocity_edges(sde)
        k = (torch.searchsorted(edges, u, right=True) - 1).clamp(0, CELLS - 1)
        share = (k + (u - edges[k]) / (edges[k + 1] - edges[k])) / CELLS
        start, end = sde.log_snr(sde.t_min), sde.log_snr(sde.t_max)
        return sde.time(start + share * (end - start))

    def correction(self, sde: GaussianSDE, t: Tensor) -> Tensor:
        """``1 / (p(t) (t_max - t_min))``."""
        edges = _velocity_edges(sde)
        start, end = sde.log_snr(sde.t_min), sde.log_snr(sde.t_max)
        k = ((sde.log_snr(t) - start) / (end - start) * CELLS).floor().long().clamp(0, CELLS - 1)
        slope = 1 / ((edges[k + 1] - edges[k]) * CELLS)
        return slope * (start - end) / _rate(sde, t) / (sde.t_max - sde.t_min)


@lru_cache
def _velocity_edges(sde: GaussianSDE) -> Tensor:
    """Mass below each edge of equal cells of log-SNR, from ``t_min`` on, ``(CELLS + 1,)``."""
    start, end = sde.log_snr(sde.t_min), sde.log_snr(sde.t_max)
    middle = (torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS
    mass = sde.alpha(sde.time(start + middle * (end - start))) ** 2
    edges = torch.cat([mass.new_zeros(1), mass.cumsum(0)])
    return edges / edges[-1]


@dataclass(frozen=True)
class Learned(Times):
    """Times of a schedule that is trained beside the network for the least variance of the loss.

    It starts as :class:`~scoresde.training.times.Importance`, uniform in log-SNR.

    Args:
        cells: parts of ``[0, 1]`` on each of which the schedule is linear in ``u``.
    """

    stratified: bool = True
    cells: int = 32
    module: Schedule = field(init=False, repr=False, compare=False)
    """Its parameters are to be trained with those of the network."""

    def __post_init__(self) -> None:
        if self.cells < 2:
            raise ValueError(f"learned times need cells >= 2, got {self.cells}")
        object.__setattr__(self, "module", Schedule(self.cells))

    def __call__(
        self, sde: GaussianSDE, batch: int, generator: NoiseSource | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(t, correction)``, each ``(batch,)``, where the schedule's parameters are.

        Both carry gradients, those of the variance; any loss that is multiplied by the correction
        trains the schedule.
        """
        pair = self.module(sde, self.uniforms(batch, generator))
        t, correction = _ForVariance.apply(*pair)  # type: ignore[no-untyped-call]
        return t, correction

    def quantile(self, sde: GaussianSDE, u: Tensor) -> Tensor:
        """The time of ``lambda(u)``."""
        with torch.no_grad():
            t: Tensor = self.module(sde, u)[0]
        return t


class Schedule(nn.Module):
    """A monotone map from ``[0, 1]`` onto the range of the log-SNR, linear on equal cells.

    Args:
        cells: number of cells; a softmax of as many parameters gives the share of the range that
            each of them covers.
    """

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(cells))

    def forward(self, sde: GaussianSDE, u: Tensor) -> tuple[Tensor, Tensor]:
        """``t`` with ``lambda(t) = lambda(u)``, and the correction of the module's docstring.

        Args:
            sde: the process.
            u: ``(B,)`` in (0, 1).
        """
        u = u.to(self.logits.device, widest(self.logits.device), non_blocking=True)
        cells = len(self.logits)
        width = self.logits.to(u.dtype).softmax(0)
        edges = torch.cat([width.new_zeros(1), width.cumsum(0)])
        k = (u * cells).floor().long().clamp(0, cells - 1)
        start, end = float(sde.log_snr(sde.t_min)), float(sde.log_snr(sde.t_max))
        log_snr = start + (end - start) * (edges[k] + width[k] * (u * cells - k))
        # d log_snr/dt = -g^2/(2 sigma^2), whether or not ``time`` itself can be differentiated.
        t = sde.time(log_snr.detach()).detach()
        t = t - (log_snr - log_snr.detach()) / _rate(sde, t)
        slope = cells * width[k] * (start - end)
        return t, slope / _rate(sde, t) / (sde.t_max - sde.t_min)


class _ForVariance(torch.autograd.Function):
    """Leaves times and corrections as they are, and multiplies their gradients by twice the loss.

    The loss of an item is the correction times what it multiplies, which is its gradient; so the
    backward pass knows it, up to a factor (of the mean, of a scaled loss) that the mean square
    of the batch takes out: what arrives is the gradient of ``mean(loss^2) / mean(loss)^2`` with
    the denominator held.
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor, correction: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(correction)
        return t.clone(), correction.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        grad_t, grad_correction = grads
        (correction,) = ctx.saved_tensors
        loss = correction * grad_correction
        twice = 2 * loss / (loss.mean() ** 2 * len(loss))
        return twice * grad_t, twice * grad_correction


def _rate(sde: GaussianSDE, t: Tensor) -> Tensor:
    """``-d log_snr/dt = g^2/(2 sigma^2)``."""
    return (sde.diffusion(t) / sde.sigma(t)) ** 2 / 2


__all__ = ["Learned", "VelocityImportance"]
