r"""UniPC: a multistep predictor, and a corrector that costs nothing.

After the evaluation at the new point, which the next step needs anyway, the step just taken is
redone through that value too: order ``points`` becomes ``points + 1``. The last step has no
evaluation after it, and is not corrected.

Source: UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models (Zhao
et al., 2023), https://arxiv.org/abs/2302.04867.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .multistep import Multistep


@dataclass(frozen=True)
class UniPC(Multistep):
    """UniPC of order ``points + 1``, in the log-SNR, of the data or of the noise."""

    points: int = 3
    corrector: int = field(default=4, init=False, repr=False)
    coordinate: str = field(default="logsnr", init=False, repr=False)
    line: str = "bh1"

    name: ClassVar[str] = "unipc"

    def __post_init__(self) -> None:
        object.__setattr__(self, "corrector", self.points + 1)
        super().__post_init__()
