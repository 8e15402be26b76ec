r"""Denoising score matching.

    loss(x_0) = w(t) |eps_hat(alpha x_0 + sigma eps, t) - eps|^2,    eps ~ N(0, I), t ~ p(t)

The error is taken where it does not cancel, at the network's output ``F``: with
``eps_hat - eps = c_out (F - F*)`` the loss is ``(w c_out^2) |F - F*|^2``, and the factor is one
float64 number.

Sources: A Connection Between Score Matching and Denoising Autoencoders (Vincent, 2011),
https://doi.org/10.1162/NECO_a_00142; Score-Based Generative Modeling through Stochastic
Differential Equations (Song et al., 2021), https://arxiv.org/abs/2011.13456; Classifier-Free
Diffusion Guidance (Ho & Salimans, 2021), https://arxiv.org/abs/2207.12598 (``drop``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import config
from ..conditions import classes_of
from ..config import ConfigError
from ..model import Score
from ..noise import NoiseSource, normal
from ..precision import widest
from ..sde.base import as_time
from . import distributions as times_room
from . import weights as weights_room
from .times import uniform


@dataclass(frozen=True)
class DSM:
    """The denoising loss of any Gaussian process.

    Args:
        weight: factor on the squared error: ``simple``, ``likelihood``, ``x0``, ``edm``,
            ``min-snr``, ``velocity``, a section such as ``{name: min-snr, gamma: 5}``, or an
            object.
        times: distribution of ``t``: ``uniform``, ``low-discrepancy``, ``log-normal``,
            ``logit-normal``, ``importance``, ``velocity-importance``, ``learned``, ``steps``, a
            section, or an object.
        drop: share of the items that are trained without their label, for classifier-free
            guidance: the class is replaced by the index ``num_classes``, a vector by zeros.
    """

    weight: Any = "simple"
    times: Any = "low-discrepancy"
    drop: float = 0.0

    variance: ClassVar[bool] = False
    """Whether it trains what the network says of the variance."""
    twice: ClassVar[bool] = False
    """Whether the network is differentiated twice."""

    def __post_init__(self) -> None:
        weight = config.build(self.weight, weights_room, "objective.weight")
        times = config.build(self.times, times_room, "objective.times")
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "times", times)
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop must be in [0, 1], got {self.drop}")

    @property
    def module(self) -> nn.Module | None:
        """What the objective itself has to train: the schedule of ``learned`` times, or None."""
        return getattr(self.times, "module", None)

    def __call__(
        self,
        model: Score,
        x0: Tensor,
        *,
        t: float | Tensor | None = None,
        eps: Tensor | None = None,
        generator: NoiseSource | None = None,
        **cond: Any,
    ) -> Tensor:
        """Loss of each item, summed over its dimensions, shape ``(B,)``.

        Args:
            model: the score model in training.
            x0: data in model range, ``(B, *shape)``.
            t: times to use in place of drawn ones, ``()`` or ``(B,)``.
            eps: noise to use in place of drawn noise, of the shape of ``x0``.
            generator: source of both.

        Raises:
            ConfigError: if labels are to be dropped and there are none, or the network does not
                give what the objective trains.
        """
        time, correction, eps, cond = self.draw(model, x0, t, eps, generator, cond)
        return self.loss(model, x0, time, correction, eps, generator, cond)

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
        """The loss of each item at given times and noise: what an objective is."""
        error, c_out, _ = model.denoising_error(x0, eps, time, **cond)
        return self.factor(model, time, correction, c_out, x0) * squared(error)

    def draw(
        self,
        model: Score,
        x0: Tensor,
        t: float | Tensor | None,
        eps: Tensor | None,
        source: NoiseSource | None,
        cond: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """Times with their correction, noise and conditions, those that are not given drawn."""
        if t is None:
            time, correction = self.times(model.sde, len(x0), source)
        else:
            time = as_time(t)
            time = time.to(widest(time.device)).flatten() if time.ndim else time
            correction = torch.ones_like(time)
        if self.drop > 0:
            cond = {**cond, "y": dropped(cond.get("y"), self.drop, model, source)}
        if eps is None:
            eps = normal(tuple(x0.shape), source, device=x0.device, dtype=x0.dtype)
        return time, correction, eps, cond

    def factor(
        self, model: Score, time: Tensor, correction: Tensor, c_out: Tensor, like: Tensor
    ) -> Tensor:
        """``w(t) c_out^2``, made in float64, as it multiplies the loss of ``like``."""
        factor = self.weight(model.sde, time) * correction * c_out**2
        return factor.to(like.device, like.dtype, non_blocking=True)


def squared(error: Tensor) -> Tensor:
    """``|error|^2`` of each item, ``(B,)``."""
    return error.flatten(1).square().sum(1)


def dropped(y: Tensor | None, rate: float, model: Score, source: NoiseSource | None) -> Tensor:
    """Labels of which each is replaced, at the given rate, by what stands for none.

    Args:
        y: classes ``(B,)``, of which the network's ``num_classes`` stands for none, or vectors
            ``(B, d)``, of which zeros do.

    Raises:
        ConfigError: for a batch without labels, or a network that does not say how many classes.
    """
    if y is None:
        raise ConfigError(f"objective.drop={rate} drops labels, but the network is given none")
    gone = uniform(len(y), source).to(y.device, non_blocking=True) < rate
    if y.ndim > 1:
        return y.masked_fill(gone.reshape(-1, *(1,) * (y.ndim - 1)), 0)
    classes = classes_of(model)
    if classes is None:
        raise ConfigError(f"objective.drop={rate} needs a network that has num_classes")
    return y.masked_fill(gone, classes)


__all__ = ["DSM"]
