r"""Forward processes ``dx = f(x, t) dt + g(t) dw`` on ``t`` in ``[t_min, t_max]``.

A Gaussian process has the transition kernel ``p(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I)``, and
those two functions give everything else:

    f(x, t) = (d log alpha / dt) x
    g(t)^2  = d sigma^2 / dt - 2 (d log alpha / dt) sigma^2 = -2 sigma^2 d log_snr / dt

Its reversal is one family, indexed by ``eta``: every member has the marginals of the forward
process; ``eta = 1`` is the reverse SDE, ``eta = 0`` the probability-flow ODE:

    dx = [f(x, t) - (1 + eta^2)/2 g(t)^2 score(x, t)] dt + eta g(t) dw,     t from t_max to t_min

Source: Score-Based Generative Modeling through Stochastic Differential Equations (Song et al.,
2021), https://arxiv.org/abs/2011.13456.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import ConfigError
from ..noise import NoiseSource, normal

ScoreFn = Callable[..., Tensor]


def as_time(t: float | Tensor, x: Tensor | None = None) -> Tensor:
    """Time as a tensor of shape ``()`` or ``(B, 1, ..., 1)``, which broadcasts against ``x``.

    Numbers become float64 scalars on the CPU: schedule arithmetic on them costs no device time,
    and a 0-d CPU tensor combines with tensors of any device and keeps their dtype. A vector of
    ``B`` times is reshaped to the axes of ``x``.
    """
    if not isinstance(t, Tensor):
        return torch.tensor(float(t), dtype=torch.float64)
    if x is not None and t.ndim == 1 and x.ndim > 1:
        return t.reshape(-1, *(1,) * (x.ndim - 1))
    return t


def match(coefficient: Tensor, x: Tensor) -> Tensor:
    """A schedule value in the dtype of ``x`` (0-d tensors already leave the dtype alone)."""
    return coefficient.to(x.dtype) if coefficient.ndim else coefficient


@dataclass(frozen=True, kw_only=True)
class SDE(ABC):
    """Forward process on ``[t_min, t_max]``; ``t = 0`` is data, ``t = t_max`` is the prior.

    Args:
        t_min: smallest time at which the score is trained.
        t_max: largest time; the marginal there is close to the prior.
        t_min_sampling: time at which sampling stops (and denoises).
        t_min_likelihood: time at which the likelihood integral starts.
    """

    t_min: float = 1e-5
    t_max: float = 1.0
    t_min_sampling: float = 1e-3
    t_min_likelihood: float = 1e-5

    default_solver: ClassVar[str] = "vabm"
    """Solver that :func:`scoresde.sample` takes when none is named."""
    default_parameterization: ClassVar[str] = "v"
    """What a network for this process predicts when nothing is said."""
    default_objective: ClassVar[dict[str, str]] = {}
    """Weight and times of training, where the usual ones do not suit the process."""
    langevin_snr: ClassVar[float] = 0.01
    """Signal-to-noise ratio of the Langevin corrector (Song et al. 2021, table 5)."""
    ode_min_steps: ClassVar[int] = 0
    """Steps below which a deterministic solver is known to do badly; sampling warns."""
    ode_min_nfe: ClassVar[int] = 0
    """The same in evaluations, on a grid that is made for few steps."""
    rate_jumps: ClassVar[bool] = False
    """Whether drift and diffusion jump in t, though the log-SNR does not: there adaptive methods
    that step in t lose their order."""

    def __post_init__(self) -> None:
        if not 0 <= self.t_min < self.t_max:
            raise ValueError(
                f"{type(self).__name__} needs 0 <= t_min < t_max, "
                f"got t_min={self.t_min}, t_max={self.t_max}"
            )
        for name in ("t_min_sampling", "t_min_likelihood"):
            value = getattr(self, name)
            if not self.t_min <= value < self.t_max:
                raise ValueError(
                    f"{name}={value} lies outside the trained times [{self.t_min}, {self.t_max})"
                )

    @abstractmethod
    def drift(self, x: Tensor, t: float | Tensor) -> Tensor:
        """``f(x, t)``, of the shape of ``x``."""

    @abstractmethod
    def diffusion(self, t: float | Tensor) -> Tensor:
        """``g(t) >= 0``, of the shape of ``t``."""

    @abstractmethod
    def prior_sample(
        self,
        shape: tuple[int, ...],
        generator: NoiseSource | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Draws from the prior, of shape ``(B, *shape)`` = ``shape``."""

    @abstractmethod
    def prior_log_prob(self, z: Tensor) -> Tensor:
        """Log-density of the prior in nats, shape ``(B,)``."""

    def reverse(self, score: ScoreFn, eta: float = 1.0, **cond: Any) -> Reverse:
        """The process of this SDE run backwards with ``score``; see :class:`Reverse`."""
        return Reverse(self, score, eta, cond)


@dataclass(frozen=True, kw_only=True)
class GaussianSDE(SDE):
    """Process given by ``alpha(t)`` and ``sigma(t)``: ``x_t = alpha x_0 + sigma eps``.

    A subclass defines those two. Drift, diffusion and the inverse of the log-SNR then follow, by
    automatic differentiation and bisection; closed forms may override them.
    """

    @abstractmethod
    def alpha(self, t: float | Tensor) -> Tensor:
        """Factor of the data at time ``t``, of the shape of ``t``."""

    @abstractmethod
    def sigma(self, t: float | Tensor) -> Tensor:
        """Standard deviation of the noise at time ``t``, of the shape of ``t``."""

    @property
    def prior_std(self) -> float:
        """Standard deviation of the prior ``N(0, prior_std^2 I)``."""
        return float(self.sigma(self.t_max))

    def log_alpha(self, t: float | Tensor) -> Tensor:
        """``log alpha(t)``."""
        return self.alpha(t).log()

    def log_snr(self, t: float | Tensor) -> Tensor:
        """``log(alpha / sigma)``, decreasing in ``t`` (half the log of the power ratio)."""
        return self.log_alpha(t) - self.sigma(t).log()

    def time(self, log_snr: float | Tensor) -> Tensor:
        """The time at which ``log_snr(t)`` has the given value: the inverse, by bisection."""
        target = as_time(log_snr)
        low = torch.zeros_like(target)
        high = torch.full_like(target, self.t_max)
        for _ in range(80):
            mid = (low + high) / 2
            noisier = self.log_snr(mid) < target
            low, high = torch.where(noisier, low, mid), torch.where(noisier, mid, high)
        return (low + high) / 2

    def drift_rate(self, t: float | Tensor) -> Tensor:
        """``d log alpha / dt``: the drift is this times ``x``."""
        return _derivative(self.log_alpha, as_time(t))

    def diffusion(self, t: float | Tensor) -> Tensor:
        """``g(t) = sqrt(d sigma^2/dt - 2 (d log alpha/dt) sigma^2)``."""
        t = as_time(t)
        growth = _derivative(lambda u: self.sigma(u) ** 2, t)
        return (growth - 2 * self.drift_rate(t) * self.sigma(t) ** 2).clamp_min(0).sqrt()

    def drift(self, x: Tensor, t: float | Tensor) -> Tensor:
        """``f(x, t) = (d log alpha / dt) x``."""
        return match(self.drift_rate(as_time(t, x)), x) * x

    def transition(self, t: float | Tensor, s: float | Tensor) -> tuple[Tensor, Tensor]:
        """``(a, v)`` of ``p(x_t | x_s) = N(a x_s, v^2 I)`` for ``s < t``.

        ``a = alpha_t / alpha_s`` and ``v^2 = sigma_t^2 - a^2 sigma_s^2``, the latter as
        ``-sigma_t^2 expm1(2 (log_snr_t - log_snr_s))``. DDPM's ``beta_i`` is ``v^2`` of a VP step.
        """
        a = (self.log_alpha(t) - self.log_alpha(s)).exp()
        ratio = torch.expm1(2 * (self.log_snr(t) - self.log_snr(s)))
        return a, self.sigma(t) * (-ratio).clamp_min(0).sqrt()

    def perturb(self, x0: Tensor, t: float | Tensor, eps: Tensor) -> Tensor:
        """``x_t = alpha(t) x_0 + sigma(t) eps``."""
        t = as_time(t, x0)
        return match(self.alpha(t), x0) * x0 + match(self.sigma(t), x0) * eps

    def prior_sample(
        self,
        shape: tuple[int, ...],
        generator: NoiseSource | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """``N(0, prior_std^2 I)`` draws of the given shape."""
        return self.prior_std * normal(shape, generator, device=device, dtype=dtype)

    def prior_log_prob(self, z: Tensor) -> Tensor:
        """``log N(z; 0, prior_std^2 I)`` in nats, shape ``(B,)``."""
        z = z.flatten(1)
        constant = math.log(2 * math.pi) / 2 + math.log(self.prior_std)
        return -((z / self.prior_std) ** 2).sum(1) / 2 - z.shape[1] * constant


class Reverse:
    """The reversed process, ready to be stepped by a solver.

        drift(x, t) = f(x, t) - (1 + eta^2)/2 g(t)^2 score(x, t)
        diffusion(t) = eta g(t)

    Generic solvers use these two; exponential ones use ``sde.alpha``, ``sde.sigma`` and
    :meth:`noise` or :meth:`denoise`. ``nfe`` counts the evaluations of the score, ``forwards`` and
    ``products`` what these ask of networks (see :class:`scoresde.model.Cost`).
    """

    def __init__(
        self, sde: Any, score: ScoreFn, eta: float = 1.0, cond: dict[str, Any] | None = None
    ) -> None:
        self.sde = sde
        self.eta = eta
        self.cond = cond or {}
        self.nfe = self.forwards = self.products = 0
        self._score = score

    def part(self, rows: Tensor) -> Reverse:
        """The process of some samples of the batch, with a count of its own."""
        return Reverse(self.sde, self._score, self.eta, select(self.cond, rows))

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """``grad_x log p_t(x)``, one evaluation."""
        self._count(t)
        return self._score(x, t, **self.cond)

    def _count(self, t: Tensor) -> None:
        """Counts one evaluation of the score."""
        own = getattr(self._score, "cost", None)
        forwards, products = (1, 0) if own is None else own(t)
        self.nfe += 1
        self.forwards += forwards
        self.products += products

    def error_norm(self, error: Tensor, alpha: Tensor | None = None) -> Tensor:
        """Size ``(B,)`` of errors ``(B, N)`` of a sample: the score's own measure, or their RMS.

        A score of a state that holds more than data says so by its ``error_norm``, which is also
        told the factor of the data where the errors are, ``alpha (B,)`` in their unit.
        """
        own = getattr(self._score, "error_norm", None)
        return error.square().mean(1).sqrt() if own is None else own(error, alpha)

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """Drift of the reversed process; time still runs from ``t_max`` down."""
        half_g2 = (1 + self.eta**2) / 2 * self.sde.diffusion(t) ** 2
        return self.sde.drift(x, t) - match(half_g2, x) * self.score(x, t)

    def diffusion(self, t: Tensor) -> Tensor:
        """``eta g(t)``."""
        return self.eta * self.sde.diffusion(t)

    def noise(self, x: Tensor, t: Tensor) -> Tensor:
        """``eps_hat = -sigma(t) score(x, t)``, one evaluation."""
        return match(-self.sde.sigma(t), x) * self.score(x, t)

    def noise_and_variance(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """``eps_hat``, and ``v`` that says where a step's log-variance lies, one evaluation.

        See :meth:`scoresde.ScoreModel.noise_and_variance`, which a score must offer.

        Raises:
            ConfigError: for a score that says nothing about the variance.
        """
        head = getattr(self._score, "noise_and_variance", None)
        if head is not None:
            self._count(t)
            eps, v = head(x, t, **self.cond)
            if v is not None:
                return eps, v
        raise ConfigError(
            f"variance='learned' needs a score with a variance head (a network of twice the "
            f"channels), which this {type(self._score).__name__} is not: take 'small' or 'large'"
        )

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """``E[x_0 | x_t] = (x + sigma^2 score) / alpha`` (Tweedie), one evaluation."""
        return (x + match(self.sde.sigma(t) ** 2, x) * self.score(x, t)) / match(
            self.sde.alpha(t), x
        )


def _derivative(fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """``d fn / dt`` elementwise, by forward-mode automatic differentiation."""
    return torch.func.jvp(fn, (t,), (torch.ones_like(t),))[1]


def repeated(cond: dict[str, Any], count: int) -> dict[str, Any]:
    """The conditions of a batch as those of ``count`` samples of each of its own, in a row."""
    return {
        k: v.repeat_interleave(count, 0) if isinstance(v, Tensor) and v.ndim else v
        for k, v in cond.items()
    }


def select(cond: dict[str, Any], rows: Tensor | slice) -> dict[str, Any]:
    """The conditions of some samples of a batch."""
    return {k: v[rows] if isinstance(v, Tensor) and v.ndim else v for k, v in cond.items()}
