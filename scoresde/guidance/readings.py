"""The equivalent readings of a score that guidance combines, by one evaluation each."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import ConfigError
from ..sde.base import GaussianSDE, as_time, match

READINGS = ("score", "noise", "denoised")


class Reading(NamedTuple):
    """A value of the shape of ``x``, and what a network says of the variance, if it was asked."""

    value: Tensor
    variance: Tensor | None = None


def read(kind: str, score: Any, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Reading:
    """One evaluation of a score, read as :data:`READINGS` name it.

    ``"noise"`` brings along what a variance head says. A callable with a ``sde`` alone will do.
    """
    if kind == "noise":
        head = getattr(score, "noise_and_variance", None)
        if head is not None:
            return Reading(*head(x, t, **cond))
        return Reading(match(-score.sde.sigma(t), x) * score(x, t, **cond))
    if kind == "denoised":
        own = getattr(score, "denoise", None)
        if own is not None:
            return Reading(own(x, t, **cond))
        return Reading(denoised("score", score(x, t, **cond), score.sde, x, t))
    return Reading(score(x, t, **cond))


def denoised(kind: str, value: Tensor, sde: GaussianSDE, x: Tensor, t: Tensor) -> Tensor:
    """``E[x_0 | x_t]`` from a reading: ``(x - sigma eps)/alpha = (x + sigma^2 score)/alpha``."""
    if kind == "denoised":
        return value
    sigma = sde.sigma(t)
    factor = -sigma if kind == "noise" else sigma**2
    return (x + match(factor, x) * value) / match(sde.alpha(t), x)


def of_score(kind: str, sde: GaussianSDE, t: Tensor) -> Tensor:
    """What a change of the score is multiplied by in a reading: 1, -sigma, sigma^2/alpha."""
    if kind == "score":
        return torch.ones_like(as_time(t))
    sigma = sde.sigma(t)
    return -sigma if kind == "noise" else sigma**2 / sde.alpha(t)


def within(sde: GaussianSDE, t: Tensor, interval: tuple[float, float] | None) -> bool | Tensor:
    """Whether ``low < q <= high`` for the noise level ``q = sigma/alpha`` at ``t``.

    Returns:
        One answer, or one a sample, of the shape of ``t``, where they differ or lie on an
        accelerator, which is not waited for.
    """
    if interval is None:
        return True
    q = (-sde.log_snr(t)).exp()
    inside = (q > interval[0]) & (q <= interval[1])
    if inside.device.type == "cpu":
        if bool(inside.all()):
            return True
        if not bool(inside.any()):
            return False
    return inside


def check_settings(
    name: str, scale: float, interval: tuple[float, float] | None
) -> tuple[float, float] | None:
    """Refuses a scale that is no number, or an interval that is none; gives back the interval."""
    if not (isinstance(scale, (int, float)) and abs(scale) < float("inf")):
        raise ConfigError(f"{name} needs a finite scale, got {scale!r}")
    if interval is None:
        return None
    try:
        low, high = (float(end) for end in interval)
    except (TypeError, ValueError):
        low = high = float("nan")
    if not 0 <= low < high:
        raise ConfigError(
            f"{name} needs an interval (low, high) of noise levels with 0 <= low < high, "
            f"got {interval!r}"
        )
    return low, high
