r"""Extrapolation from a worse score through a better one, which two methods share.

    guided = reference + scale (wanted - reference)      where low < sigma/alpha <= high
    guided = wanted                                      elsewhere

The same in every reading (score, noise, denoised data), since all are affine in each other.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..classifier import misfit
from ..config import ConfigError
from ..model import Cost, cost
from ..sde.base import as_time
from .guided import Guided
from .readings import Reading, read, within


class Extrapolation(Guided):
    """Base of guidance by two scores: a subclass gives both, and the reference alone."""

    @abstractmethod
    def _reference(self, cond: dict[str, Any], x: Tensor) -> tuple[Any, dict[str, Any]]:
        """The score to start from, and its conditions."""

    def _both(
        self, kind: str, x: Tensor, t: Tensor, cond: dict[str, Any]
    ) -> tuple[Reading, Reading]:
        """Readings of the wanted score and of the reference."""
        other, its = self._reference(cond, x)
        return read(kind, self.score, x, t, cond), read(kind, other, x, t, its)

    def _finished(self, kind: str, x: Tensor, t: Tensor, wanted: Tensor, guided: Tensor) -> Tensor:
        """What becomes of the extrapolated reading."""
        return guided

    def _guided(self, kind: str, x: Tensor, t: float | Tensor, cond: dict[str, Any]) -> Reading:
        """A reading of the guided score."""
        t = as_time(t, x)
        inside = within(self.sde, t, self.interval)
        if inside is False or self.scale == 1:
            return read(kind, self.score, x, t, cond)
        if inside is True and self.scale == 0:
            other, its = self._reference(cond, x)
            return read(kind, other, x, t, its)
        (wanted, variance), (reference, _) = self._both(kind, x, t, cond)
        guided = reference + self.scale * (wanted - reference)
        guided = self._finished(kind, x, t, wanted, guided)
        if inside is not True:
            guided = torch.where(inside.to(x.device), guided, wanted)
        return Reading(guided, variance)

    def cost(self, t: Tensor) -> Cost:
        """That of both scores within the interval, of the wanted one alone elsewhere."""
        inside = within(self.sde, t, self.interval)
        wanted, other = cost(self.score, t), cost(self._other, t)
        if inside is False or self.scale == 1:
            return wanted
        if inside is True and self.scale == 0:
            return other
        return Cost(wanted.forwards + other.forwards, wanted.products + other.products)

    @property
    @abstractmethod
    def _other(self) -> Any:
        """The score that the reference comes from."""


def check_process(guidance: str, score: Any, other: Any, name: str) -> None:
    """Refuses two scores that do not belong together.

    Raises:
        ConfigError: for another process, shape of the items or model range.
    """
    wrong = misfit(score, other, name)
    if wrong is not None:
        raise ConfigError(f"{guidance} needs scores of one process and one range: {wrong}")
