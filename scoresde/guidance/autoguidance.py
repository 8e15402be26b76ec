r"""Autoguidance: from a bad version of the model through the good one.

    D = D_bad + scale (D_good - D_bad)

The bad model, smaller or trained for a shorter time, errs where the good one does, and further:
from it through the good one leads away from these errors, without the loss of variety that the
unconditional score brings. ``scale = 1`` is the good score alone. As with every extrapolation, the
guided score is not, for ``scale != 1``, that of any diffused density.

Source: Guiding a Diffusion Model with a Bad Version of Itself (Karras et al., 2024),
https://arxiv.org/abs/2406.02507.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .extrapolation import Extrapolation, check_process
from .readings import check_settings


@dataclass(frozen=True, eq=False)
class Autoguidance(Extrapolation):
    """``D_bad + scale (D - D_bad)``: a score led away from the errors of a worse one.

    Args:
        score: ``score(x, t, **cond)`` that carries its ``sde``.
        bad: a worse score of the same process, given the same conditions.
        scale: 1 is ``score``, in one evaluation, 0 is ``bad``.
        interval: noise levels ``low < sigma/alpha <= high`` to guide at; elsewhere ``score``
            alone, in one evaluation. None for everywhere.

    Raises:
        ConfigError: for a setting out of range, or scores of different processes.
    """

    score: Any
    bad: Any
    scale: float = 2.0
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        object.__setattr__(self, "interval", check_settings(name, self.scale, self.interval))
        check_process(name, self.score, self.bad, "bad score")

    @property
    def parts(self) -> tuple[Any, ...]:
        """Both scores."""
        return self.score, self.bad

    def asks(self, cond: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
        """What each part is given of the conditions."""
        return [(self.score, cond), (self.bad, cond)]

    @property
    def _other(self) -> Any:
        return self.bad

    def _reference(self, cond: dict[str, Any], x: Tensor) -> tuple[Any, dict[str, Any]]:
        """The bad score, under the same conditions."""
        return self.bad, cond


__all__ = ["Autoguidance"]
