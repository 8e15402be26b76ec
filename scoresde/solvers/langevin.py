r"""Langevin corrector: steps that (nearly) leave ``p_t`` as it is, and pull a state towards it.

    x <- x + step score(x, t) + sqrt(2 step) z,    z ~ N(0, I)
    step = 2 a (snr r)^2,    a = (alpha_t/alpha_s)^2

``r`` is the ratio of the norms of ``z`` and of the score. ``a`` is the power that the transition
from ``s`` to ``t`` keeps (1 for VE), read from the marginals, so that it fits every process and
any number of steps. A step that follows the state has ``p_t/step`` as its stationary density, not
``p_t``; with the plain ratio of one sample's own norms the variance is too large by a factor of
about ``(1 + 2/D)^2`` in ``D`` dimensions, without bound for small ``D``. Here both norms are
shrunk to their expectations, as if ``c = 100`` more dimensions had been seen, for noise whose
estimate ``eps_hat = -sigma_t score`` has unit variance:

    r^2 = sigma_t^2 (D + c)/(|eps_hat|^2 + c)

The published ratio is the limit of many dimensions; what is left is at most ``2/(D + c)`` of the
variance, and ``snr^2`` of it from the finite step. No norm is shared by the samples of a batch.

Source: Score-Based Generative Modeling through Stochastic Differential Equations (Song et al.,
2021), algorithms 4 and 5, https://arxiv.org/abs/2011.13456.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..noise import NoiseSource
from ..sde.base import Reverse, as_time, match
from .base import Solver, gaussian

_SEEN = 100.0  # c: dimensions' worth of trust in the expected norms
_SNR_ALONE = 0.25  # table 5 has 0.22 (VE) and 0.27 (VP) for the corrector without a predictor


@dataclass(frozen=True)
class Langevin(Solver):
    """Annealed Langevin dynamics; also the corrector of :class:`PC`.

    Args:
        snr: signal-to-noise ratio of a step, > 0; if None, that of the process
            (``sde.langevin_snr``) as a corrector, and 0.25 alone.
        steps: corrector steps at each time, >= 1.
    """

    snr: float | None = None
    steps: int = 1

    order: ClassVar[float] = 0.0  # more grid steps alone do not remove its bias
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.snr is not None and not self.snr > 0:
            raise ValueError(f"Langevin needs snr > 0, got {self.snr}")
        if self.steps < 1:
            raise ValueError(f"Langevin needs steps >= 1, got {self.steps}")
        object.__setattr__(self, "nfe_per_step", self.steps)

    def correct(
        self,
        reverse: Reverse,
        x: Tensor,
        t: Tensor,
        a: Tensor,
        noise: NoiseSource | None,
        snr: float | None = None,
    ) -> Tensor:
        """Langevin steps at the fixed time ``t``.

        Args:
            reverse: the process.
            x: state at ``t``, shape ``(B, *shape)``.
            t: time, shape ``()`` or ``(B, 1, ..., 1)``.
            a: power kept by the transition of the solver's step, ``(alpha_t/alpha_s)^2``.
            noise: where noise comes from.
            snr: signal-to-noise ratio; by default the solver's, or else the process's.
        """
        snr = snr or self.snr or reverse.sde.langevin_snr
        sigma = reverse.sde.sigma(t)
        dims = x[0].numel()
        for _ in range(self.steps):
            eps = reverse.noise(x, t)
            power = as_time(eps.flatten(1).square().sum(1), x)
            step = match(2 * a * (snr * sigma) ** 2, x) * (dims + _SEEN) / (power + _SEEN)
            x = x - step / match(sigma, x) * eps + (2 * step).sqrt() * gaussian(x, noise)
        return x

    def step(
        self,
        reverse: Reverse,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        noise: NoiseSource | None,
        state: Any = None,
    ) -> tuple[Tensor, Any]:
        """``x/a``, which keeps the signal as it is (``x/alpha``), corrected at ``s``."""
        a, _ = reverse.sde.transition(t, s)
        x = x / match(a, x)
        return self.correct(reverse, x, s, a**2, noise, self.snr or _SNR_ALONE), state
