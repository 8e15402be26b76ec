r"""The variational bound of the discrete chain: what DDPM's ancestral sampler can code.

On the grid ``t_i = i t_max / N`` the forward chain is ``q(x_i | x_{i-1}) = N(a x_{i-1}, v^2)``,
``(a, v) = sde.transition(t_i, t_{i-1})``, and with ``s = t_{i-1}``, ``t = t_i``

    q(x_s | x_t, x_0) = N((a sigma_s^2 x_t + alpha_s v^2 x_0)/sigma_t^2, sigma_s^2 v^2/sigma_t^2)
    -log p(x_0) <= KL(q(x_N | x_0) | prior) + sum_{i=2}^N KL(q(x_s | x_t, x_0) | p(x_s | x_t))
                   + E[-log p(x_0 | x_1)]

where ``p`` puts ``x_0_hat = (x_t - sigma_t eps_hat)/alpha_t`` in place of ``x_0``. With the small
variance a step is ``1/2 (alpha_s^2/sigma_s^2 - alpha_t^2/sigma_t^2) |x_0 - x_0_hat|^2``; a learned
variance is each entry's own. On :class:`~scoresde.DDPM` every number is that of Ho et al. This
bounds the likelihood of the reverse *SDE*; :func:`~scoresde.log_prob` is that of the ODE.

Sources: Denoising Diffusion Probabilistic Models (Ho et al., 2020), equations 5 to 13,
https://arxiv.org/abs/2006.11239; Variational Diffusion Models (Kingma et al., 2021),
https://arxiv.org/abs/2107.00630; Improved Denoising Diffusion Probabilistic Models (Nichol &
Dhariwal, 2021), https://arxiv.org/abs/2102.09672.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import unknown
from ..model import evaluating
from ..noise import KeyedNoise
from ..precision import supported, widest
from ..sde.base import GaussianSDE, as_time, match
from ..solvers.ancestral import VARIANCES, log_ratio
from .divergence import LIKELIHOOD_DRAW

WIDTH = 2.0
"""Model range of discrete data is [-1, 1]."""


@dataclass(frozen=True)
class VLB:
    """A variational bound on ``-log p(x_0)`` with its parts, and how they were obtained.

    Attributes:
        total: ``prior + sum of all steps + decoder``, shape ``(B,)``, in ``unit``.
        prior: ``KL(q(x_N | x_0) | prior)``, exact, ``(B,)``.
        steps: the evaluated ``KL`` terms, ``(B, K)``, ``K = N - 1`` unless ``terms`` was given.
        index: the step ``i`` in 2..N of each of them, ``(B, K)``.
        decoder: one draw of ``-log p(x_0 | x_1)``, ``(B,)``.
        stderr: standard error of the sum over steps, over its noise (and over the choice of
            steps); slightly too large, and nan if only one step was evaluated, ``(B,)``.
        unit: ``"bits/dim"`` for discrete data, ``"nats"`` for continuous.
        nfe: evaluations of the score, ``K + 1``.
        seconds: wall-clock time.
        grid_steps: ``N``.
        variance: ``"small"``, ``"large"`` or ``"learned"``.
        levels: levels of discrete data, None for continuous.
        seed: key of the noise; ``start_index`` the index of the first sample.
        weights: which weights the score carries, None if it does not say.
    """

    total: Tensor
    prior: Tensor
    steps: Tensor
    index: Tensor
    decoder: Tensor
    stderr: Tensor
    unit: str
    nfe: int
    seconds: float
    grid_steps: int
    variance: str
    levels: int | None
    seed: int
    start_index: int
    weights: str | None


def vlb(
    score: Any,
    x0: Tensor,
    *,
    steps: int = 1000,
    levels: int | None = 256,
    variance: str = "small",
    terms: int | None = None,
    seed: int = 0,
    start_index: int = 0,
    progress: Callable[[float, float, int], None] | None = None,
    **cond: Any,
) -> VLB:
    """The variational bound of ``x0`` under the chain of ``steps`` steps.

    Args:
        score: ``score(x, t, **cond)`` that carries its ``.sde``.
        x0: data in model range, shape ``(B, *shape)``. Discrete data lie on the centres of the
            bins, ``2 (k + 1/2)/levels - 1``: ``scaler.encode(x, dequantize=False)``.
        steps: ``N >= 2``; for DDPM's own bound the length of its table.
        levels: number of discrete levels: the decoder then integrates its Gaussian over each
            bin, the two outermost being open, and the result is in bits/dim. None for continuous
            data: the decoder is a Gaussian density, and the result is in nats.
        variance: of the reverse steps, ``"small"`` (``sigma_s^2 v^2/sigma_t^2``, DDPM's
            beta-tilde: right for data on points) or ``"large"`` (``v^2``, DDPM's beta: right for
            smooth data, on which the small one leaves about 0.29 D nats however many the
            steps); the decoder's is then ``sigma_1^2``. Or ``"learned"``, which the network puts
            between the two in their logarithms, entry by entry. At the decoder the small one would
            be 0: it is that of step 2 there, as in improved DDPM.
        terms: number of steps to evaluate, chosen at random for each sample; the sum is then
            scaled to be unbiased. All by default.
        seed: key of the noise.
        start_index: index of the first sample: its noise does not depend on its batch.
        progress: called as ``progress(fraction, t, nfe)`` before each evaluation.
        cond: passed to the score.

    Raises:
        ValueError: a grid that starts below the trained times, data that are not on the bins, or
            an unknown option.
        ConfigError: a learned variance of a score that has none.
    """
    sde, x0 = score.sde, checked(x0, levels)
    if variance not in VARIANCES:
        raise unknown("variance", variance, VARIANCES)
    if steps < 2 or not 1 <= (terms or 1) <= steps - 1:
        raise ValueError(
            f"the bound needs steps >= 2 and 1 <= terms <= steps - 1, "
            f"got steps={steps}, terms={terms}"
        )
    times = torch.arange(steps + 1, dtype=torch.float64) * (sde.t_max / steps)
    if times[1] < sde.t_min:
        raise ValueError(
            f"steps={steps} starts at t={float(times[1]):g}, below the trained t_min={sde.t_min:g}"
        )
    started = time.perf_counter()
    with torch.no_grad(), evaluating(score):
        chain = _Chain(score, x0, times, variance, KeyedNoise(seed, start_index), cond)
        index = _choose(steps, terms, x0, KeyedNoise(seed, start_index))
        values = []
        for column in index.T:
            # A column of one step for all keeps t a scalar, as a network without t-batch wants.
            i = column[0] if terms is None else column
            if progress is not None:
                progress(chain.nfe / len(index.T), float(times[i].max()), chain.nfe)
            values.append(chain.step(i))
        kl = torch.stack(values, 1)
        prior = chain.prior()
        decoder = chain.decoder(levels)
        scale = (steps - 1) / kl.shape[1]
        total = prior + scale * kl.sum(1) + decoder
        stderr = _stderr(kl, terms is None, scale)
    unit = 1.0 if levels is None else 1 / (x0[0].numel() * math.log(2))
    return VLB(
        total=total * unit,
        prior=prior * unit,
        steps=kl * unit,
        index=index,
        decoder=decoder * unit,
        stderr=stderr * unit,
        unit="nats" if levels is None else "bits/dim",
        nfe=chain.nfe,
        seconds=time.perf_counter() - started,
        grid_steps=steps,
        variance=variance,
        levels=levels,
        seed=seed,
        start_index=start_index,
        weights=getattr(score, "weights", None),
    )


class _Chain:
    """The terms of the bound, in nats of shape ``(B,)``."""

    def __init__(
        self,
        score: Any,
        x0: Tensor,
        times: Tensor,
        variance: str,
        noise: KeyedNoise,
        cond: dict[str, Any],
    ) -> None:
        self.sde: GaussianSDE = score.sde
        self.reverse = self.sde.reverse(score, **cond)
        self.x0, self.times, self.variance, self.noise = x0, times, variance, noise

    @property
    def nfe(self) -> int:
        """Evaluations so far."""
        return self.reverse.nfe

    def prior(self) -> Tensor:
        """``KL(N(alpha_T x_0, sigma_T^2) | N(0, tau^2))``."""
        t, tau = self.sde.t_max, self.sde.prior_std
        alpha, ratio = float(self.sde.alpha(t)), (float(self.sde.sigma(t)) / tau) ** 2
        power = (alpha / tau * self.x0).flatten(1).square()
        return (power + (ratio - 1 - math.log(ratio))).sum(1) / 2

    def step(self, i: Tensor) -> Tensor:
        """``KL(q(x_s | x_t, x_0) | p(x_s | x_t))`` of the step ``i``, shape ``()`` or ``(B,)``."""
        t, s = self._time(i), self._time(i - 1)
        _, v = self.sde.transition(t, s)
        alpha_s, sigma_s, sigma_t = self.sde.alpha(s), self.sde.sigma(s), self.sde.sigma(t)
        eps, eps_hat, v_hat = self._noises(t, i)
        # |x_0 - x_0_hat| = sigma/alpha |eps - eps_hat|: Ho et al., equation 12. The weight is for
        # the small variance, of which the model's is e^-log_r.
        error = (eps - eps_hat).square()
        weight = (alpha_s * v / sigma_s / self.sde.alpha(t)) ** 2 / 2
        log_r = (1 + v_hat) * log_ratio(sigma_t, sigma_s, error)
        mismatch = (torch.expm1(log_r) - log_r) / 2
        return (match(weight, error) * log_r.exp() * error + mismatch).flatten(1).sum(1)

    def decoder(self, levels: int | None) -> Tensor:
        """``-log p(x_0 | x_1)`` of one ``x_1``: mass of the bin, or density."""
        t = self.times[1]
        alpha, large = self.sde.alpha(t), self.sde.sigma(t)
        eps, eps_hat, v_hat = self._noises(t, torch.ones((), dtype=torch.long))
        if self.variance == "learned":
            _, v = self.sde.transition(self.times[2], t)
            small = large * v / self.sde.sigma(self.times[2])
            sigma = large * torch.exp((1 - v_hat) / 2 * log_ratio(large, small, eps))
        else:
            sigma = large
        residual = large / alpha * (eps_hat - eps) / sigma  # (x_0 - x_0_hat) / sigma
        if levels is None:
            log_p = -(residual**2) / 2 - sigma.log() - math.log(2 * math.pi) / 2
            return -log_p.flatten(1).sum(1)
        half, last = WIDTH / (2 * levels) / sigma, WIDTH / 2 - WIDTH / levels
        low = (residual - half).masked_fill(self.x0 < -last, -math.inf)
        high = (residual + half).masked_fill(self.x0 > last, math.inf)
        return -log_mass(low, high).flatten(1).sum(1)

    def _time(self, i: Tensor) -> Tensor:
        """Time of the grid: ``()`` for one step, else ``(B, 1, ..., 1)`` beside the data."""
        if i.ndim == 0:
            return self.times[i]
        return as_time(self.times[i].to(self.x0.device, widest(self.x0.device)), self.x0)

    def _noises(self, t: Tensor, i: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
        """``eps`` of step ``i``, the same whichever steps are evaluated, ``eps_hat`` and ``v``."""
        eps = _step_noise(self.noise, i, self.x0)
        x = self.sde.perturb(self.x0, t, eps)
        if self.variance == "learned":
            return eps, *self.reverse.noise_and_variance(x, t)
        return eps, self.reverse.noise(x, t), -1.0 if self.variance == "small" else 1.0


def checked(x0: Tensor, levels: int | None) -> Tensor:
    """``x0`` as float32 or float64, on the centres of the bins if there are levels."""
    if not x0.is_floating_point() or x0.ndim < 2:
        raise ValueError(
            f"x0 must be floating point of shape (B, *shape), got {x0.dtype} {tuple(x0.shape)}: "
            "take integer data to model range by scaler.encode(x, dequantize=False)"
        )
    if not bool(x0.isfinite().all()):
        raise ValueError("x0 is not finite")
    x0 = x0.detach().to(supported(torch.promote_types(x0.dtype, torch.float32), x0.device))
    if levels is not None:
        k = (x0.to(widest(x0.device)) + WIDTH / 2) * levels / WIDTH - 0.5
        if levels < 2 or not bool(((k - k.round().clamp(0, levels - 1)).abs() < 0.01).all()):
            raise ValueError(
                f"x0 does not lie on the centres of {levels} bins of [-1, 1]: "
                "use scaler.encode(x, dequantize=False), or levels=None for continuous data"
            )
    return x0


def _choose(steps: int, terms: int | None, x0: Tensor, source: KeyedNoise) -> Tensor:
    """The steps to evaluate, ``(B, K)``, values in 2..N: all, or a random subset a sample."""
    if terms is None:
        return torch.arange(2, steps + 1).expand(len(x0), -1)
    source.draw = LIKELIHOOD_DRAW
    keys = source.uniform((len(x0), steps - 1), dtype=torch.float64)
    return keys.argsort(1)[:, :terms] + 2


def _step_noise(source: KeyedNoise, i: Tensor, like: Tensor) -> Tensor:
    """Normal noise of the step ``i`` (one a batch, or one a sample), shape of ``like``."""
    shape = tuple(like.shape)
    if i.ndim == 0:
        source.draw = LIKELIHOOD_DRAW + int(i)
        return source.normal(shape, like.device, like.dtype)
    rows = []
    for row, step in enumerate(i.tolist()):
        one = KeyedNoise(source.seed, source.start + row)
        one.draw = LIKELIHOOD_DRAW + step
        rows.append(one.normal((1, *shape[1:]), like.device, like.dtype))
    return torch.cat(rows)


def log_mass(low: Tensor, high: Tensor) -> Tensor:
    """``log(Phi(high) - Phi(low))``, evaluated in the lower tail, where nothing cancels."""
    flip = low > 0
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    top = torch.special.log_ndtr(high)
    return top + torch.log(-torch.expm1(torch.special.log_ndtr(low) - top))


def _stderr(kl: Tensor, every: bool, scale: float) -> Tensor:
    """Standard error of ``scale * kl.sum(1)``.

    With every step evaluated, half the squared differences of neighbours estimate the noise of
    each (von Neumann, 1941); with a subset, the spread over steps covers noise and choice.
    """
    count = kl.shape[1]
    if count < 2:
        return torch.full_like(kl[:, 0], math.nan)
    if every:
        return (kl.diff(dim=1).square().sum(1) / 2).sqrt()
    return scale * count**0.5 * kl.std(1)
