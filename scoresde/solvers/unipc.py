r"""UniPC: a multistep predictor, and a corrector that costs nothing.

After the evaluation at the new point, which the next step needs anyway, the step just taken is
redone through that value too: order ``points`` becomes ``points + 1``. The last step has no
evaluation after it, and is not corrected.

Source: UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models (Zhao
et al., 2023), https://arxiv.org/abs/2302.04867.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..config import unknown
from .multistep import Level, Multistep, secant

VARIANTS = ("bh1", "bh2", "exact")


@dataclass(frozen=True)
class UniPC(Multistep):
    """UniPC of order ``points + 1``, in the log-SNR.

    Args:
        variant: how a line through two values is weighed: as published with ``B(h)`` of the first
            or second kind, or exactly. Three values and more leave nothing to choose.
    """

    variable: str = "data"
    points: int = 3
    variant: str = "bh1"

    name: ClassVar[str] = "unipc"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise unknown("variant", self.variant, VARIANTS)
        object.__setattr__(self, "corrector", self.points + 1)
        super().__post_init__()

    def weights(
        self, levels: tuple[Level, ...], start: Level, end: Level, sde: Any, tau: float = 0.0
    ) -> list[Tensor]:
        """As :meth:`Multistep.weights`, but for the published lines."""
        if self.variant != "exact" and len(levels) == 2:
            return secant(self.variable, levels, start, end, tau, self.variant)
        return super().weights(levels, start, end, sde, tau)
