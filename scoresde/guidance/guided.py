"""A guided score, read as a score, as noise and as denoised data."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from ..wrapped import Wrapped
from .readings import Reading


class Guided(Wrapped):
    """Base of guided scores: a subclass gives :meth:`_guided`, one evaluation of any reading."""

    scale: float
    interval: tuple[float, float] | None

    @abstractmethod
    def _guided(self, kind: str, x: Tensor, t: float | Tensor, cond: dict[str, Any]) -> Reading:
        """A reading of the guided score, see :data:`~scoresde.guidance.readings.READINGS`."""

    def __call__(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """The guided score, of the shape of ``x``."""
        return self._guided("score", x, t, cond).value

    def denoise(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """The guided denoised data, of the shape of ``x``."""
        return self._guided("denoised", x, t, cond).value

    def noise_and_variance(
        self, x: Tensor, t: float | Tensor, **cond: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The guided noise, and what the wrapped score says of the variance, None if nothing."""
        return self._guided("noise", x, t, cond)

    def noise(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """The guided noise, of the shape of ``x``."""
        return self._guided("noise", x, t, cond).value
