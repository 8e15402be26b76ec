r"""Replacement: a solver runs as ever, and what is measured is set anew after each of its steps.

    x_s = step(x_t);    V^T x_s <- alpha m + sqrt(sigma^2 - alpha^2 tau^2) z    where q_s >= tau

with ``m = (U^T y)/s`` and ``tau = noise_std/s`` (see :mod:`.known`). Below ``tau`` the state is
left to the solver. The end is denoised, and what is measured is then ``m`` itself, or what is left
of its noise taken away: the unmeasured part is ``E[x_0 | x]``, not the state with its noise.

The unmeasured part is led by a draw of the measured part with the noise of the level, not by what
is known of it, so that the samples are too far from ``y`` in spirit, with any number of steps:
they are those of ``p(x_0 | y)`` where the two are independent. :class:`RePaint` spends evaluations
on that.

Source: Score-Based Generative Modeling through Stochastic Differential Equations (Song et al.,
2021), appendix I, https://arxiv.org/abs/2011.13456.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ..config import ConfigError, build, class_name
from ..noise import NoiseSource
from ..sde.base import Reverse
from ..solvers.base import Solver, gaussian
from .known import InverseSolver, Known, Level


class Carried(NamedTuple):
    """What is carried from step to step."""

    known: Known
    inner: Any
    """The state of the solver that makes the steps."""
    times: Tensor
    """The grid."""
    started: bool = False


@dataclass(frozen=True, eq=False)
class Replacement(InverseSolver):
    """Any solver on a grid, with the measured part replaced after each of its steps.

    On mixtures ``ancestral`` came closer to the exact posteriors than deterministic solvers.

    Args:
        operator: the linear map ``A`` from items to measurements; it must have a spectrum.
        y: the measurement in model range, ``(1, *operator.out)`` or ``(B, *operator.out)``.
        noise_std: standard deviation of the measurement's noise, >= 0.
        solver: the solver, its name or its section ``{name: ..., ...}``.

    Raises:
        ValueError: for a measurement that does not fit, a number out of range, or an operator
            without a spectrum.
        ConfigError: for an unknown solver, or one that chooses its own steps.
    """

    solver: Any = "ancestral"

    order: ClassVar[float] = 1.0
    stochastic: ClassVar[bool] = True
    default_steps: ClassVar[int | None] = 100

    def __post_init__(self) -> None:
        from .. import solvers

        super().__post_init__()
        solver = build(self.solver, solvers, "solver")
        if not isinstance(solver, Solver) or solver.default_steps is None:
            kind = solver if isinstance(solver, type) else type(solver)
            raise ConfigError(
                f"{class_name(kind)!r} cannot be the solver of {type(self).__name__}; accepted: "
                "a solver that steps along a grid"
            )
        for name, value in (
            ("solver", solver),
            ("brownian", solver.brownian),
            ("nfe_per_step", solver.nfe_per_step),
            ("default_grid", solver.default_grid),
        ):
            object.__setattr__(self, name, value)

    @property
    def eta(self) -> float:
        """That of the solver inside."""
        return self.solver.eta

    def init(
        self, reverse: Reverse, x: Tensor, times: Tensor, noise: NoiseSource | None
    ) -> Carried:
        """What is known, and the inner solver's state."""
        return Carried(self.known(x), self.solver.init(reverse, x, times, noise), times)

    def step(
        self,
        reverse: Reverse,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        noise: NoiseSource | None,
        state: Carried | None = None,
    ) -> tuple[Tensor, Carried]:
        """The inner step, then the replacement; before the first step as well."""
        if state is None:
            raise ValueError(f"{type(self).__name__} steps from the state that init gives")
        known, at, to = state.known, Level.at(reverse.sde, t), Level.at(reverse.sde, s)
        coefficients, items = known.spectrum.to, known.spectrum.back
        inner = state.inner
        if not state.started:
            c = coefficients(x)
            told = items(known.start(c, at, gaussian(c, noise)))
            x, inner = told, self.solver.shifted(inner, told - x)
        moved, inner = self.solver.step(reverse, x, t, s, noise, inner)
        c = coefficients(moved)
        told = items(known.down(coefficients(x), c, at, to, gaussian(c, noise)))
        inner = self.solver.shifted(inner, told - moved)
        return told, Carried(known, inner, state.times, True)
