"""What a score that wraps another has of it: its process, its shape, its device, its weights."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .model import Cost, Score, cost, home
from .sde.base import GaussianSDE


class Wrapped(Score):
    """Base of scores made from ``self.score``: a subclass gives ``__call__``.

    Whatever it does not define itself, it is asked of the wrapped score.
    """

    score: Any
    own: ClassVar[tuple[str, ...]] = ()
    """Names of conditions that it takes itself, and the wrapped score is not given."""

    @property
    def parts(self) -> tuple[Any, ...]:
        """The scores, and other networks, that it is made of."""
        return (self.score,)

    def asks(self, cond: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
        """The scores that it asks, each with the conditions, of those given, that it passes on."""
        return [(self.score, {k: v for k, v in cond.items() if k not in self.own})]

    @property
    def sde(self) -> GaussianSDE:  # type: ignore[override]
        """The process of the wrapped score."""
        return self.score.sde

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of one item, where known."""
        return getattr(self.score, "shape", None)

    @property
    def scaler(self) -> Any:
        """Map between data and model range, where known."""
        return getattr(self.score, "scaler", None)

    @property
    def weights(self) -> str | None:
        """Which weights the wrapped score carries."""
        return getattr(self.score, "weights", None)

    @property
    def given(self) -> Any:
        """What the wrapped model is given of an item beside its state, where anything is."""
        return getattr(self.score, "given", None)

    @property
    def tuned(self) -> tuple[dict[str, Any], ...]:
        """Entries of the time grids tuned to the wrapped score."""
        return getattr(self.score, "tuned", ())

    @property
    def device(self) -> torch.device:
        """Device of the wrapped score."""
        return home(self.score)[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that inputs are best kept in."""
        return home(self.score)[1]

    def cost(self, t: Tensor) -> Cost:
        """Of one call: that of the wrapped score, unless a subclass says otherwise."""
        return cost(self.score, t)
