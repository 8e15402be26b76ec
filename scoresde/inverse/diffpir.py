r"""DiffPIR: the denoised data are brought to agree with the measurement, without a derivative.

    x0' = argmin_x |y - A x|^2/(2 noise_std^2) + |x - x0_hat|^2/(2 rho^2),    rho^2 = q^2/strength
        = x0_hat + rho^2 A^T (noise_std^2 I + rho^2 A A^T)^{-1} r,    q = sigma/alpha

and the score is that of ``x0'``. No way back through the network: a call costs one evaluation.
Steps that draw most of the noise anew suit it best (:class:`.Renoise`, ``default_solver``): on
mixtures of narrow modes by far, on wide ones as well as solvers of the reverse SDE.

Source: Denoising Diffusion Models for Plug-and-Play Image Restoration (Zhu et al., 2023),
https://arxiv.org/abs/2305.08995; its ``lambda`` is ``strength``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .measured import Denoised, Measured, beside
from .renoise import Renoise


@dataclass(frozen=True, eq=False)
class DiffPIR(Measured):
    """A score whose denoised data agree with a measurement, at the price of an evaluation.

    Args:
        score, operator, y, noise_std: see :class:`.Measured`.
        strength: of the pull to ``x0_hat``, > 0: the paper's ``lambda``.
    """

    strength: float = 1.0

    products: ClassVar[int] = 0
    default_solver: ClassVar[Any] = Renoise(0.8)

    name: ClassVar[str] = "diffpir"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.strength < math.inf:
            raise ValueError(f"DiffPIR needs a finite strength > 0, got {self.strength}")

    def pull(self, at: Denoised, r: Tensor) -> Tensor:
        """``rho^2 A^T (noise_std^2 I + rho^2 A A^T)^{-1} r``."""
        power = at.noise_level**2 / self.strength
        w = self.operator.solve(r, self.noise_std**2, beside(power, r))
        return beside(power, at.x0) * self.operator.adjoint(w)
