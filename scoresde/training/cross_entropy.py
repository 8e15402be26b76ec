r"""The objective of a classifier of noisy items.

    loss(x_0, y) = -log p(y | x_t),    x_t = alpha x_0 + sigma eps,  eps ~ N(0, I),  t ~ p(t)

A share of the items may be left clean, at ``t = 0``: all of them for a judge of clean items.

Source: Score-Based Generative Modeling through Stochastic Differential Equations (Song et al.,
2021), appendix I, https://arxiv.org/abs/2011.13456.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import config
from ..classifier import NoisyClassifier
from ..config import ConfigError
from ..noise import NoiseSource, normal
from ..precision import widest
from ..sde.base import GaussianSDE, as_time
from . import distributions as times_room
from .times import uniform


@dataclass(frozen=True)
class CrossEntropy:
    """``-log p(y | x_t)`` in nats, of any Gaussian process.

    Args:
        times: distribution of ``t``, as of :class:`~scoresde.DSM`.
        clean: share of the items that stay without any noise, at ``t = 0``, in [0, 1].
    """

    times: Any = "low-discrepancy"
    clean: float = 0.0

    variance: ClassVar[bool] = False
    twice: ClassVar[bool] = False
    whole: ClassVar[bool] = True
    """Whether the loss is that of an item, and not told for each dimension."""

    def __post_init__(self) -> None:
        times = config.build(self.times, times_room, "objective.times")
        object.__setattr__(self, "times", times)
        if not 0 <= self.clean <= 1:
            raise ValueError(f"clean must be in [0, 1], got {self.clean}")

    @property
    def module(self) -> nn.Module | None:
        """What the objective itself has to train: the schedule of ``learned`` times, or None."""
        return getattr(self.times, "module", None)

    def instants(
        self, sde: GaussianSDE, batch: int, source: NoiseSource | None = None
    ) -> tuple[Tensor, Tensor]:
        """Times of a batch and their correction, ``(batch,)`` each: 0 and 1 of clean items."""
        t, correction = self.times(sde, batch, source)
        if not self.clean:
            return t, correction
        clean = (uniform(batch, source) < self.clean).to(t.device)
        return t.masked_fill(clean, 0.0), correction.masked_fill(clean, 1.0)

    def __call__(
        self,
        model: NoisyClassifier,
        x0: Tensor,
        *,
        t: float | Tensor | None = None,
        eps: Tensor | None = None,
        generator: NoiseSource | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """The loss of each item, ``(B,)``.

        Args:
            model: the classifier in training.
            x0: data in model range, ``(B, *shape)``.
            t: times to use in place of drawn ones, ``()`` or ``(B,)``; 0 for clean items.
            eps: noise to use in place of drawn noise, of the shape of ``x0``.
            generator: source of both.
            y: classes, ``(B,)``.

        Raises:
            ConfigError: without classes.
        """
        if y is None:
            raise ConfigError("a classifier is trained on items with classes y")
        if t is None:
            time, correction = self.instants(model.sde, len(x0), generator)
        else:
            time = as_time(t)
            correction = torch.ones_like(time)
        if eps is None:
            eps = normal(tuple(x0.shape), generator, device=x0.device, dtype=x0.dtype)
        time = as_time(time.to(x0.device, widest(x0.device), non_blocking=True), x0)
        x = torch.where(time > 0, model.sde.perturb(x0, time, eps), x0)
        return -model(x, time, y) * correction.to(x0.device, x0.dtype, non_blocking=True)


__all__ = ["CrossEntropy"]
