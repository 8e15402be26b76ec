r"""Predictor-corrector sampling, a predictor's steps with Langevin corrections.

The loop is that of the published code, which corrects first:

    for each (t, s):    x <- corrector at t;    x <- predictor from t to s

Source: Score-Based Generative Modeling through Stochastic Differential Equations (Song et al.,
2021), appendix G, https://arxiv.org/abs/2011.13456.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..config import ConfigError, build, class_name
from ..noise import NoiseSource
from ..sde.base import Reverse
from .base import Solver


@dataclass(frozen=True)
class PC(Solver):
    """Any solver on a grid as predictor, with a corrector before each of its steps.

    Args:
        predictor: a solver, its name, or its section ``{name: ..., ...}``.
        corrector: the same, for a solver that can correct (``langevin``).
    """

    predictor: Any = "reverse-diffusion"
    corrector: Any = "langevin"

    order: ClassVar[float] = 1.0
    stochastic: ClassVar[bool] = True
    nfe_per_step: ClassVar[int] = 2

    def __post_init__(self) -> None:
        from .. import solvers

        for role, method in (("predictor", "step"), ("corrector", "correct")):
            solver = build(getattr(self, role), solvers, role)
            if not hasattr(solver, method) or getattr(solver, "default_steps", None) is None:
                raise ConfigError(
                    f"{class_name(type(solver))!r} cannot be the {role} of PC; accepted: "
                    + ("a solver that steps along a grid" if method == "step" else "langevin")
                )
            object.__setattr__(self, role, solver)
        nfe = self.predictor.nfe_per_step + self.corrector.nfe_per_step
        object.__setattr__(self, "nfe_per_step", nfe)

    @property
    def eta(self) -> float:
        """That of the predictor."""
        return self.predictor.eta

    def init(self, reverse: Reverse, x: Tensor, times: Tensor, noise: NoiseSource | None) -> Any:
        """The predictor's state."""
        return self.predictor.init(reverse, x, times, noise)

    def step(
        self,
        reverse: Reverse,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        noise: NoiseSource | None,
        state: Any = None,
    ) -> tuple[Tensor, Any]:
        """The corrector at ``t``, then the predictor from ``t`` to ``s``."""
        a, _ = reverse.sde.transition(t, s)
        corrected = self.corrector.correct(reverse, x, t, a**2, noise)
        state = self.predictor.shifted(state, corrected - x)
        return self.predictor.step(reverse, corrected, t, s, noise, state)
