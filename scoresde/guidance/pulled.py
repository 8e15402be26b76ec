"""Guidance by the gradient of a log-likelihood, which two methods share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..sde.base import as_time, match
from .guided import Guided
from .readings import Reading, of_score, read, within


class Pulled(Guided):
    """Base of ``score + scale v`` within an interval of noise levels, and ``score`` elsewhere."""

    @abstractmethod
    def _kept(self, cond: dict[str, Any]) -> dict[str, Any]:
        """The conditions that the wrapped score is given."""

    @abstractmethod
    def _pulled(
        self, kind: str, x: Tensor, t: Tensor, cond: dict[str, Any]
    ) -> tuple[Reading, Tensor]:
        """A reading of the wrapped score, and ``v``, of the shape of ``x``."""

    def _guided(self, kind: str, x: Tensor, t: float | Tensor, cond: dict[str, Any]) -> Reading:
        """A reading of the guided score."""
        t = as_time(t, x)
        inside = within(self.sde, t, self.interval)
        if inside is False or self.scale == 0:
            return read(kind, self.score, x, t, self._kept(cond))
        (value, variance), v = self._pulled(kind, x, t, cond)
        factor = self.scale * match(of_score(kind, self.sde, t), x)
        moved = value + (factor * v).to(value.dtype)
        if inside is not True:
            moved = torch.where(inside.to(x.device), moved, value)
        return Reading(moved, variance)

    def active(self, t: Tensor) -> bool:
        """Whether guidance may be at work at ``t``."""
        return self.scale != 0 and within(self.sde, t, self.interval) is not False
