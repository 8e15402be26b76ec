r"""The objective that trains the variance of the reverse steps beside their mean.

    L_hybrid = L_simple + vlb L_vlb,    L_vlb = N E_n[L_n],  n uniform in 1..N

On the chain ``t_n = n t_max/N``, with ``s = t_{n-1}``, ``t = t_n``, ``(a, v) = transition(t, s)``,

    L_n = KL(q(x_s | x_t, x_0) | N(mean, Sigma))  for n > 1,    L_1 = -log p(x_0 | x_1)
    log Sigma = f log v^2 + (1 - f) log(v^2 sigma_s^2/sigma_t^2),    f = (v_hat + 1)/2

and the mean held in ``L_vlb``, which trains ``v_hat`` alone. ``L_vlb`` is in bits: divided by the
number of dimensions, the loss is that of the paper, ``L_simple`` a mean over dimensions and
``L_vlb`` in bits/dim. The term ``L_N`` of the prior has nothing to train and is left out. The
terms are those of :func:`scoresde.vlb`; at ``n = 1``, where the small variance would be 0, it is
that of step 2.

Source: Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021), equations 15
and 16, https://arxiv.org/abs/2102.09672.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import ConfigError
from ..likelihood.bound import WIDTH, log_mass
from ..model import Score
from ..noise import NoiseSource
from ..sde.base import GaussianSDE, as_time
from .objective import DSM, squared
from .times import Steps


@dataclass(frozen=True)
class Hybrid(DSM):
    """The denoising loss plus a small multiple of the variational bound, for the variance.

    The network gives twice the channels (:meth:`scoresde.ScoreModel.noise_and_variance`).

    Args:
        times: ``steps``, of any number; on :class:`~scoresde.DDPM` the length of its table.
        vlb: factor ``lambda`` of the bound.
        levels: levels of discrete data in [-1, 1]: the last step then gives the mass of the bin
            in which ``x_0`` lies, the outermost bins being open. None for continuous data: a
            density.
    """

    times: Any = "steps"
    vlb: float = 0.001
    levels: int | None = 256

    variance: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.times, Steps):
            raise ConfigError(
                f"objective.times of hybrid must be 'steps', got {type(self.times).__name__}"
            )
        if not self.vlb >= 0:
            raise ValueError(f"vlb must not be negative, got {self.vlb}")
        if self.levels is not None and self.levels < 2:
            raise ValueError(f"levels must be at least 2, got {self.levels}")

    def loss(
        self,
        model: Score,
        x0: Tensor,
        time: Tensor,
        correction: Tensor,
        eps: Tensor,
        source: NoiseSource | None,
        cond: dict[str, Any],
    ) -> Tensor:
        """As in :class:`DSM`; a network that says nothing of the variance is refused."""
        error, c_out, v = model.denoising_error(x0, eps, time, **cond)
        if v is None:
            raise ConfigError(
                "objective hybrid trains a variance: it needs a network of twice the channels "
                "(net.out_channels)"
            )
        simple = self.factor(model, time, correction, c_out, x0) * squared(error)
        time, c_out = time.expand(len(x0)), c_out.expand(len(x0))
        terms = self.terms(model.sde, time, x0, error.detach(), c_out, v)
        scale = self.vlb * self.times.length(model.sde) / math.log(2)
        correction = correction.to(simple.device, simple.dtype, non_blocking=True)
        return simple + scale * correction * terms

    def terms(
        self, sde: GaussianSDE, t: Tensor, x0: Tensor, error: Tensor, c_out: Tensor, v: Tensor
    ) -> Tensor:
        """``L_n`` of each item in nats, ``(B,)``; ``eps_hat - eps = c_out error``."""
        span = sde.t_max / self.times.length(sde)
        n = (t / span).round().clamp_min(1)
        last = n == 1
        # Any step stands in where there is none: the decoder takes the place of its term.
        t, s = n * span, torch.where(last, t, (n - 1) * span)
        weight, log_ratio = step(sde, torch.where(last, 2 * span, t), torch.where(last, span, s))
        weight, log_ratio = (
            as_time(c.to(x0.device, x0.dtype, non_blocking=True), x0)
            for c in (weight * c_out**2, log_ratio)
        )
        log_r = (1 + v) * log_ratio
        kl = weight * log_r.exp() * error.square() + (torch.expm1(log_r) - log_r) / 2
        nats = kl.flatten(1).sum(1)
        if not bool(last.any()):  # t is on the CPU: nothing is waited for
            return nats
        rows = last.nonzero()[:, 0]
        there = rows.to(x0.device, non_blocking=True)
        factor = as_time(c_out[rows].to(x0.device, x0.dtype, non_blocking=True), x0)
        first = self.decoder(sde, span, x0[there], factor * error[there], v[there])
        return nats.index_copy(0, there, first)

    def decoder(self, sde: GaussianSDE, t: float, x0: Tensor, error: Tensor, v: Tensor) -> Tensor:
        """``-log p(x_0 | x_1)`` in nats, ``(B,)``: of the bin of ``x_0``, or its density."""
        large, (_, v_2) = float(sde.sigma(t)), sde.transition(2 * t, t)
        log_ratio = math.log(float(v_2 / sde.sigma(2 * t)))  # of the small deviation of step 2
        std = large * torch.exp((1 - v) / 2 * log_ratio)
        miss = large / float(sde.alpha(t)) * error  # x_0 - x_0_hat
        if self.levels is None:
            log_p = -((miss / std) ** 2) / 2 - std.log() - math.log(2 * math.pi) / 2
            return -log_p.flatten(1).sum(1)
        width = WIDTH / self.levels
        k = ((x0 + WIDTH / 2) / width).floor().clamp(0, self.levels - 1)
        low = k * width - WIDTH / 2 - x0 + miss
        high = (low + width) / std
        low = (low / std).masked_fill(k == 0, -math.inf)
        high = high.masked_fill(k == self.levels - 1, math.inf)
        return -log_mass(low, high).flatten(1).sum(1)


def step(sde: GaussianSDE, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """``(alpha_s v/(sigma_s alpha_t))^2/2`` and ``log(sigma_s/sigma_t)`` of a step, float64.

    The first is the factor of ``|eps_hat - eps|^2`` in the divergence with the small variance;
    the second half the logarithm of the small variance over the large.
    """
    _, v = sde.transition(t, s)
    sigma_s = sde.sigma(s)
    weight = (sde.alpha(s) * v / sigma_s / sde.alpha(t)) ** 2 / 2
    return weight, (sigma_s / sde.sigma(t)).log()


__all__ = ["Hybrid"]
