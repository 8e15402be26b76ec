r"""Thresholding: denoised data are kept in their range, and the noise is made to fit.

    x0 = E[x_0 | x_t],    s = bound (static)  or  max(bound, quantile of |x0|) (dynamic)
    x0' = clamp(x0, -s, s) bound/s
    score' = score - alpha/sigma^2 (x0 - x0')

which is ``eps' = (x - alpha x0')/sigma`` without its cancellation: where nothing is clipped the
score is the wrapped one, bit for bit. ``s`` is a sample's own. Few steps and strong guidance push
``x0`` out of the range of the data; whatever the solver, it is then led by data that could be.
Dynamic thresholds answer strong guidance, which saturates; on data that reach the bound of
themselves they cost contrast, and the static one suits few steps better.

Source: Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding (Saharia et
al., 2022), section 2.3, https://arxiv.org/abs/2205.11487.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import construct, unknown
from .sde.base import as_time, match
from .wrapped import Wrapped

MODES = ("static", "dynamic")


@dataclass(frozen=True, eq=False)
class Threshold(Wrapped):
    """A score whose denoised data stay within ``[-bound, bound]``.

    Args:
        score: ``score(x, t, **cond)`` that carries its ``sde``.
        mode: ``"static"`` clamps, ``"dynamic"`` clamps at the quantile and scales to the bound.
        quantile: of the absolute values of a sample's entries, in [0, 1]; for ``"dynamic"``.
        bound: end of the range of the data in model range, > 0; 1 for pictures.

    Raises:
        ConfigError: for an unknown mode.
        ValueError: for a quantile or bound out of range.
    """

    score: Any
    mode: str = "dynamic"
    quantile: float = 0.995
    bound: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown("threshold mode", self.mode, MODES)
        if not (0 <= self.quantile <= 1 and 0 < self.bound < math.inf):
            raise ValueError(
                "Threshold needs 0 <= quantile <= 1 and a finite bound > 0, "
                f"got quantile={self.quantile}, bound={self.bound}"
            )

    @classmethod
    def of(cls, score: Any, section: str | Mapping[str, Any] | None) -> Any:
        """``score`` as a section says: a mode, a mapping of the fields, or None for as it is."""
        if section is None:
            return score
        if isinstance(section, str):
            section = {"mode": section}
        if not isinstance(section, Mapping):
            raise unknown("threshold", section, MODES)
        if "score" in section:
            raise unknown("key threshold.score of Threshold:", "score", cls._options)
        return construct(cls, section, "threshold", score=score)

    _options = ("mode", "quantile", "bound")

    @property
    def section(self) -> dict[str, Any]:
        """The options, as :meth:`of` takes them."""
        return {name: getattr(self, name) for name in self._options}

    def __call__(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """``score - alpha/sigma^2 (x0 - x0')``, of the shape of ``x``; one evaluation."""
        t = as_time(t, x)
        alpha, power = self.sde.alpha(t), self.sde.sigma(t) ** 2
        score = self.score(x, t, **cond)
        x0 = (x + match(power, x) * score) / match(alpha, x)
        return score - match(alpha / power, x) * (x0 - self.clip(x0))

    def noise_and_variance(
        self, x: Tensor, t: float | Tensor, **cond: Any
    ) -> tuple[Tensor, Tensor | None]:
        """``eps' = eps + alpha/sigma (x0 - x0')``, and the ``v`` of the wrapped score, if any."""
        t = as_time(t, x)
        head = getattr(self.score, "noise_and_variance", None)
        if head is None:
            return self.noise(x, t, **cond), None
        eps, v = head(x, t, **cond)
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        x0 = (x - match(sigma, x) * eps) / match(alpha, x)
        return eps + match(alpha / sigma, x) * (x0 - self.clip(x0)), v

    def clip(self, x0: Tensor) -> Tensor:
        """``clamp(x0, -s, s) bound/s``, of the shape of ``x0 (B, *shape)``."""
        if self.mode == "static":
            return x0.clamp(-self.bound, self.bound)
        s = quantile(x0.flatten(1).abs(), self.quantile).clamp_min(self.bound)
        s = s.reshape(-1, *(1,) * (x0.ndim - 1))
        return torch.maximum(torch.minimum(x0, s), -s) * (self.bound / s)


def quantile(values: Tensor, q: float) -> Tensor:
    """The quantile of each row of ``values (B, D)``, linear between ranks, ``(B,)``.

    ``torch.quantile`` sorts everything and refuses more than 2^24 values.
    """
    rank = q * (values.shape[1] - 1)
    low = math.floor(rank)
    top = values.topk(values.shape[1] - low, dim=1).values  # ranks D-1, ..., low
    return torch.lerp(top[:, -1], top[:, -2:][:, 0], rank - low)


__all__ = ["Threshold"]
