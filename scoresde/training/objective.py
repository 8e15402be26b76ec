r"""Denoising score matching.

    loss(x_0) = w(t) |eps_hat(alpha x_0 + sigma eps, t) - eps|^2,    eps ~ N(0, I), t ~ p(t)

Sources: A Connection Between Score Matching and Denoising Autoencoders (Vincent, 2011),
https://doi.org/10.1162/NECO_a_00142; Score-Based Generative Modeling through Stochastic
Differential Equations (Song et al., 2021), https://arxiv.org/abs/2011.13456.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import config
from ..model import Score
from ..precision import widest
from ..sde.base import as_time
from . import times as times_room
from . import weights as weights_room


@dataclass(frozen=True)
class DSM:
    """The denoising loss of any Gaussian process.

    Args:
        weight: factor on the squared error: ``simple``, ``likelihood``, ``x0``, ``edm``,
            ``min-snr``, a section such as ``{name: min-snr, gamma: 5}``, or an object.
        times: distribution of ``t``: ``uniform``, ``low-discrepancy``, ``log-normal``,
            ``importance``, a section, or an object.
    """

    weight: Any = "simple"
    times: Any = "low-discrepancy"

    def __post_init__(self) -> None:
        weight = config.build(self.weight, weights_room, "objective.weight")
        times = config.build(self.times, times_room, "objective.times")
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "times", times)

    def __call__(
        self,
        model: Score,
        x0: Tensor,
        *,
        t: float | Tensor | None = None,
        eps: Tensor | None = None,
        generator: torch.Generator | None = None,
        **cond: Any,
    ) -> Tensor:
        """Loss of each item, summed over its dimensions, shape ``(B,)``.

        Args:
            model: the score model in training.
            x0: data in model range, ``(B, *shape)``.
            t: times to use in place of drawn ones, ``()`` or ``(B,)``.
            eps: noise to use in place of drawn noise, of the shape of ``x0``.
            generator: source of both.
        """
        if t is None:
            time, correction = self.times(model.sde, len(x0), generator)
        else:
            time = as_time(t)
            correction = torch.ones_like(time)
        if eps is None:
            home = generator.device if generator is not None else x0.device
            eps = torch.randn(x0.shape, generator=generator, device=home, dtype=x0.dtype)
            eps = eps.to(x0.device)
        factor = (self.weight(model.sde, time) * correction).to(x0.device, x0.dtype)
        if time.ndim:
            time = as_time(time, x0).to(x0.device, widest(x0.device))
        error = model.noise(model.sde.perturb(x0, time, eps), time, **cond) - eps
        return factor * error.flatten(1).square().sum(1)
