r"""Kernels of the reverse process, and how a measurement twists them: what particles are moved by.

``p(x_0 | x_t)`` is taken for a Gaussian ``N(x0_hat, C)``, and the exact bridge of the process then
gives the kernel of the chain that is reweighted:

    x_s = c x_t + b x_0 + std z,    c = a sigma_s^2/sigma_t^2,  b = alpha_s v^2/sigma_t^2
    p(x_s | x_t) = N(c x_t + b x0_hat, std^2 I + b^2 C),        std = v sigma_s/sigma_t

The twist ``psi(x_t)`` stands for ``p(y | x_t)``, and the proposal for ``p(x_s | x_t, y)``:

    psi = N(y; A x0_hat, noise_std^2 I + A C A^T)
    q(x_s | x_t) = N(c x_t + b x0', std^2 I + b^2 C')
    x0' = x0_hat + (sigma^2/alpha) grad log psi

with ``C'`` the covariance of ``x_0`` given ``y`` as well. The last kernel, ``s = 0``, is ``p(x_0 |
x_t)`` itself, of which ``y`` is told exactly. For Gaussian data and their own ``C`` all of this is
exact, and all weights are equal.

Kernels of order 2 take ``x0_hat + (h'/2h) (x0_hat - x0_hat before)`` for ``x0_hat``, where ``h'``
and ``h`` are this and the last step in log-SNR, and ``b^2 C`` is left out: the estimate's own
change has it.

Sources: Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (Wu et al.,
2023), https://arxiv.org/abs/2306.17775, whose twist has ``C = 0`` and whose proposal ``C' = C``;
the covariances are those of Pseudoinverse-Guided Diffusion Models (Song et al., 2023),
https://openreview.net/forum?id=9_gsMA8MRKQ, and of Learning Diffusion Priors from Observations
(Rozet et al., 2024), https://arxiv.org/abs/2405.13712.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..noise import KeyedNoise
from .measured import Denoised, beside
from .problem import Problem, one_an_item

LONGEST = 1.0
"""Longest shift of a twist that is a plain gradient, in units of the spread ``sqrt(D) r``."""
POINTS = 1
"""Seed of the points that a likelihood is averaged over."""


class Step(NamedTuple):
    """Coefficients of the bridge from ``t`` to ``s``, float64 scalars; ``s = 0`` if ``last``."""

    state: Tensor
    data: Tensor
    std: Tensor
    lead: Tensor
    last: bool

    @classmethod
    def between(cls, sde: Any, t: Tensor, s: Tensor | None, before: Tensor | None) -> Step:
        """Of the step after that which came from ``before``."""
        zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        if s is None:
            return cls(zero, one, zero, zero, True)
        a, v = sde.transition(t, s)
        sigma_t, sigma_s = sde.sigma(t), sde.sigma(s)
        lead = zero
        if before is not None:
            lead = (sde.log_snr(s) - sde.log_snr(t)) / (sde.log_snr(t) - sde.log_snr(before)) / 2
        return cls(
            a * (sigma_s / sigma_t) ** 2,
            sde.alpha(s) * (v / sigma_t) ** 2,
            v * sigma_s / sigma_t,
            lead,
            False,
        )


class View(NamedTuple):
    """What is known of every particle at its state; a row a particle.

    ``shift`` is ``x0' - x0_hat``, ``log_twist`` is ``log psi``, and ``spread`` is ``C``: a
    variance ``(B,)``, or a matrix ``(B, D, D)``.
    """

    x0: Tensor
    shift: Tensor
    log_twist: Tensor
    spread: Tensor

    def rows(self, index: Tensor) -> View:
        """The views of some particles."""
        return View(*(part[index] for part in self))


@dataclass(frozen=True)
class Twist(ABC):
    """How particles look ahead: a subclass gives :meth:`look`; each knows how it moves them."""

    linear: ClassVar[bool] = False
    """Whether it is about a linear map, and tells the last kernel of ``y`` exactly."""

    def products(self, last: bool) -> int:
        """Products with the Jacobian of the score in one look; ``last`` before the last kernel."""
        return 1

    @abstractmethod
    def look(self, problem: Problem, at: Denoised, t: Tensor, last: bool) -> View:
        """The views of particles whose denoised data at ``t`` are given."""

    def move(
        self, problem: Problem, view: View, x: Tensor, step: Step, z: Tensor, back: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """A draw ``x_s`` from ``q(. | x_t)``, and ``log p(x_s | x_t) - log q(x_s | x_t)``.

        Args:
            problem: what was measured.
            view: of the particles.
            x: their states at ``t``, ``(B, *shape)``.
            step: the coefficients.
            z: standard normals like ``x``.
            back: ``x0_hat`` one step before, or None to take no account of it.
        """
        spread = beside(view.spread, x)
        std2 = step.std**2 + step.data**2 * spread
        mean = view.x0
        if back is not None and not step.last:
            std2 = (step.std**2).to(spread) + 0 * spread
            mean = mean + step.lead * (view.x0 - back)
        shift = step.data * view.shift
        moved = shift + std2.sqrt() * z
        ratio = z.square() / 2 - moved.square() / (2 * std2)
        return step.state * x + step.data * mean + moved, ratio.flatten(1).sum(1)


@dataclass(frozen=True)
class Blind(Twist):
    """No twist: particles follow the prior, and the likelihood alone weighs them, at the end."""

    def products(self, last: bool) -> int:
        """None."""
        return 0

    def look(self, problem: Problem, at: Denoised, t: Tensor, last: bool) -> View:
        """``psi = 1``."""
        return View(at.x0, torch.zeros_like(at.x0), at.x0.new_zeros(len(at.x0)), alike(at))


@dataclass(frozen=True)
class Gradient(Twist):
    """A function of the denoised data, and its gradient; by default the likelihood of them.

    Args:
        function: ``(x0_hat, t) -> log psi``, ``(B,)``.
        points: of ``N(x0_hat, r_t^2 I)``, over which the likelihood is averaged, in pairs of
            opposite ones; 0 for ``x0_hat`` alone.
    """

    function: Callable[[Tensor, Tensor], Tensor] | None = None
    points: int = 0

    def look(self, problem: Problem, at: Denoised, t: Tensor, last: bool) -> View:
        """``log psi(x0_hat)``, and ``(sigma^2/alpha) J^T`` times its gradient, bounded."""
        spread = alike(at)
        with torch.enable_grad():
            x0 = at.x0.detach().requires_grad_()
            if self.function is not None:
                value = one_an_item(self.function(x0, t), x0)
            elif not self.points:
                value = problem.likelihood(x0)
            else:
                noise = KeyedNoise(POINTS).normal(
                    (self.points, *x0.shape[1:]), x0.device, x0.dtype
                )
                away = beside(spread, x0).sqrt()
                parts = [problem.likelihood(x0 + k * away * e) for e in noise for k in (-1, 1)]
                value = torch.stack(parts).logsumexp(0) - math.log(len(parts))
            (pull,) = torch.autograd.grad(value.sum(), x0)
        shift = at.spread(pull.nan_to_num(0.0, 0.0, 0.0))
        length = shift.flatten(1).norm(dim=1)
        longest = LONGEST * (spread * math.prod(x0.shape[1:])).sqrt()
        shift = shift * beside((longest / length.clamp_min(1e-30)).clamp_max(1), shift)
        return View(at.x0, shift, value.detach(), spread)


def alike(at: Denoised) -> Tensor:
    """``r_t^2`` of each particle, ``(B,)``."""
    return at.variance.to(at.x0.device, at.x0.dtype).flatten().expand(len(at.x0))
