r"""Guidance by any differentiable function of the denoised data.

    s(x, t) = score(x, t) + scale grad_x log p(y | x0_hat),    x0_hat = E[x_0 | x_t]

``log p(y | x_0)`` is what the caller makes of it: a classifier of clean items, the likeness to a
caption by CLIP, a distance to a reference. The gradient goes through the network,

    grad_x = J^T grad_{x0} log p(y | x0_hat),    J = d x0_hat/dx = (alpha/sigma^2) Cov[x_0 | x_t]

or takes the estimate of the noise as it stands, ``d x0_hat/dx = 1/alpha``: no way back through the
network, and a rougher direction. Neither is ``grad log p(y | x_t)``, which averages over
``p(x_0 | x_t)`` instead of taking its mean; they agree for little noise, and through the network
also where the energy is linear. So the guided score is not that of a diffused tilted density, at
``scale = 1`` either.

Sources: Diffusion Posterior Sampling for General Noisy Inverse Problems (Chung et al., 2023),
https://arxiv.org/abs/2209.14687; Universal Guidance for Diffusion Models (Bansal et al., 2023),
https://arxiv.org/abs/2302.07121; the interval: Kynkaanniemi et al. (2024),
https://arxiv.org/abs/2404.07724.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..model import Cost, cost
from ..sde.base import match
from .gradients import gradient, leaf, recordable, recording
from .pulled import Pulled
from .readings import Reading, check_settings, denoised, read


@dataclass(frozen=True, eq=False)
class Energy(Pulled):
    """``score + scale grad_x log p(y | x0_hat)``.

    Args:
        score: ``score(x, t, **cond)`` that carries its ``sde``; differentiable if ``through``.
        energy: ``energy(x0_hat)``, or ``energy(x0_hat, t)``, with the conditions that it names in
            its signature as keywords, to ``log p(y | x0_hat)`` up to a constant, ``(B,)``: more is
            better. ``x0_hat (B, *shape)`` is in model range.
        scale: factor of the gradient, 0 for the score alone.
        through: whether the gradient goes through the network.
        interval: noise levels ``low < sigma/alpha <= high`` to guide at; elsewhere the score
            alone. None for everywhere.
        conditional: whether the score is given the conditions that the energy takes, too.
        takes: names of these conditions; by default those in the energy's signature.

    Raises:
        ConfigError: for a setting out of range.
        ValueError: when called, if the energy does not give one number a sample, or is not
            differentiable.
    """

    score: Any
    energy: Callable[..., Tensor]
    scale: float = 1.0
    through: bool = True
    interval: tuple[float, float] | None = None
    conditional: bool = False
    takes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        interval = check_settings(type(self).__name__, self.scale, self.interval)
        object.__setattr__(self, "interval", interval)
        timed, named = _signature(self.energy)
        object.__setattr__(self, "_timed", timed)
        if self.takes is None:
            object.__setattr__(self, "takes", named)

    @property
    def parts(self) -> tuple[Any, ...]:
        """The score and the energy."""
        return self.score, self.energy

    def asks(self, cond: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
        """What the score is given of the conditions."""
        return [(self.score, self._kept(cond))]

    def _kept(self, cond: dict[str, Any]) -> dict[str, Any]:
        taken = () if self.conditional else self.takes or ()
        return {k: v for k, v in cond.items() if k not in taken}

    def _pulled(
        self, kind: str, x: Tensor, t: Tensor, cond: dict[str, Any]
    ) -> tuple[Reading, Tensor]:
        """A reading of the score, and the gradient: one evaluation of the score."""
        kept_cond = self._kept(cond)
        if not self.through:
            reading = read(kind, self.score, x, t, kept_cond)
            x0 = denoised(kind, reading.value, self.sde, x, t)
            with recording() as kept:
                at = leaf(x0, kept)
                pull = gradient(self._log_prob(at, t, cond), at, kept, "energy")
            return reading, pull / match(self.sde.alpha(t), x)
        with recording() as kept:
            at, t = leaf(x, kept), recordable(t)
            kept_cond = {k: recordable(v) for k, v in kept_cond.items()}
            value, variance = read(kind, self.score, at, t, kept_cond)
            x0 = denoised(kind, value, self.sde, at, t)
            if not value.requires_grad:
                raise ValueError(
                    "the score is not differentiable in x, which guidance through it needs: "
                    "take through=False"
                )
            pull = gradient(self._log_prob(x0, t, cond), at, kept, "energy")
        if not kept:
            value = value.detach()
            variance = None if variance is None else variance.detach()
        return Reading(value, variance), pull

    def _log_prob(self, x0: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        """What the energy says."""
        given = {k: recordable(cond[k]) for k in self.takes or () if k in cond}
        times = (recordable(t),) if self._timed else ()  # type: ignore[attr-defined]
        return self.energy(x0, *times, **given)

    def cost(self, t: Tensor) -> Cost:
        """That of the score, and ``through`` it its way back; the energy itself is not counted."""
        forwards, products = cost(self.score, t)
        if self.through and self.active(t):
            # The way back through a product passes its two halves.
            products += forwards + 2 * products
        return Cost(forwards, products)


def _signature(energy: Any) -> tuple[bool, tuple[str, ...]]:
    """Whether the second argument is the time, and the names of the conditions."""
    try:
        signature = inspect.signature(energy.forward if isinstance(energy, nn.Module) else energy)
    except (TypeError, ValueError):  # of a builtin
        return False, ()
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [p for p in signature.parameters.values() if p.kind in plain]
    timed = len(named) > 1 and named[1].name in ("t", "time")
    rest = [p.name for p in named[2 if timed else 1 :]]
    only = inspect.Parameter.KEYWORD_ONLY
    return timed, (*rest, *(p.name for p in signature.parameters.values() if p.kind == only))


__all__ = ["Energy"]
