r"""What a solver is, and the one loop that all of them share.

A solver moves a state from ``p_t`` to ``p_s``, ``s < t``, and is given its times by a grid:

    state = init(...);   x, state = step(reverse, x, t, s, noise, state)   for each (t, s)

``state`` is what a method carries from step to step (nothing, for a one-step method): solvers
themselves are constants. The loop reads nothing back from an accelerator until it has ended.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..brownian import PathNoise
from ..noise import NoiseSource, normal
from ..precision import name_of
from ..sde.base import Reverse

Callback = Callable[[int, float, Tensor], None]
"""``callback(step, t, x)`` after each step, which has brought ``x`` to time ``t``."""


class Solution(NamedTuple):
    """Where a solver arrived.

    ``t`` is the target unless the solver gave up on the way, and ``message`` then says why. A
    solver whose steps differ between samples gives ``t``, where that does, and ``nfe``, as
    tensors of shape ``(B,)``; otherwise the reversed process has counted its evaluations. Where
    many evaluations of a sample are made at once, ``rounds`` counts the calls of the score.
    """

    x: Tensor
    t: float | Tensor
    converged: bool = True
    message: str = ""
    nfe: Tensor | None = None
    rounds: int | None = None


@dataclass(frozen=True)
class Solver(ABC):
    """Method that steps a reversed process, from ``t`` to ``s < t``.

    A subclass gives :meth:`step`, and :meth:`init` if it is a multistep method. A method that
    chooses its own steps sets ``default_steps = default_grid = None`` and gives
    :meth:`integrate` instead, for ``times = (t_start, t_end)``.
    """

    order: ClassVar[float]
    """Order of convergence: weak if ``stochastic``, of the trajectory otherwise."""
    stochastic: ClassVar[bool]
    """Whether the steps draw noise."""
    brownian: ClassVar[bool] = False
    """Whether the noise follows a Brownian path in any case (see :mod:`scoresde.brownian`)."""
    nfe_per_step: ClassVar[int] = 1
    """Evaluations of the score in one step."""
    default_steps: ClassVar[int | None] = 1000
    """Steps that :func:`scoresde.sample` takes when not told; None if the method chooses."""
    default_grid: ClassVar[str | None] = "logsnr"
    """Name of the grid that suits the method on every process; None if the method chooses."""

    @property
    def eta(self) -> float:
        """The member of the reverse family that the method follows."""
        return 1.0 if self.stochastic else 0.0

    @abstractmethod
    def step(
        self,
        reverse: Reverse,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        noise: NoiseSource | None,
        state: Any,
    ) -> tuple[Tensor, Any]:
        """The state at ``s``, and what the next step needs.

        Args:
            reverse: the process.
            x: state at ``t``, shape ``(B, *shape)``.
            t: current time, shape ``()`` or ``(B, 1, ..., 1)``.
            s: target time ``< t``, of the shape of ``t``.
            noise: where noise comes from.
            state: what :meth:`init` or the step before returned.
        """

    def init(self, reverse: Reverse, x: Tensor, times: Tensor, noise: NoiseSource | None) -> Any:
        """What the first step needs."""
        return None

    def shifted(self, state: Any, change: Tensor) -> Any:
        """What the next step needs, if ``change`` has been added to ``x`` since the last."""
        return state

    def route(self, times: Tensor) -> Tensor:
        """The times that are visited, one after the other: those of the grid."""
        return times

    def denoise(self, reverse: Reverse, x: Tensor, t: Tensor) -> Tensor:
        """The data that a state stands for at the end: ``E[x_0 | x_t]``, one evaluation."""
        return reverse.denoise(x, t)

    def reverse(self, score: Any, **cond: Any) -> Reverse:
        """The process that this solver steps, for a score that carries its ``sde``."""
        return score.sde.reverse(score, eta=self.eta, **cond)

    def integrate(
        self,
        reverse: Reverse,
        x: Tensor,
        times: Tensor,
        noise: NoiseSource | None = None,
        callback: Callback | None = None,
    ) -> Solution:
        """Steps ``x`` through the times.

        Args:
            reverse: the process; its ``eta`` must be the solver's (see :meth:`reverse`).
            x: state at ``times[0]``, shape ``(B, *shape)``.
            times: decreasing, float64, shape ``(steps + 1,)``; a deterministic solver takes
                increasing ones as well, from data to noise.
            noise: where noise comes from; torch's global generator if None.
            callback: called as ``callback(step, t, x)`` after each step.

        Raises:
            ValueError: if ``reverse`` has another ``eta``.
        """
        self.check(reverse)
        state = self.init(reverse, x, times, noise)
        sums, times = [], self.route(times)
        for i, (t, s) in enumerate(pairwise(times.unbind()), 1):
            x, state = self.step(reverse, x, t, s, noise, state)
            sums.append(x.sum())  # finite while all of x is, and by far the cheapest such flag
            if callback is not None:
                callback(i, float(s), x)
        end = float(times[-1])
        finite = torch.stack(sums).isfinite().tolist()  # the only wait for the device
        if all(finite):
            return Solution(x, end)
        i = finite.index(False)
        return Solution(x, end, False, non_finite(x, float(times[i + 1]), i + 1, len(sums)))

    def check(self, reverse: Reverse) -> None:
        """Refuses a process of another ``eta``, which would silently be solved as this one."""
        if reverse.eta != self.eta:
            raise ValueError(
                f"{type(self).__name__} steps a process with eta={self.eta}, got one with "
                f"eta={reverse.eta}; solver.reverse(score) builds the right one"
            )


def non_finite(x: Tensor, t: float, step: int, steps: int | None = None) -> str:
    """The message for a state that is no longer finite."""
    of = f" of {steps}" if steps else ""
    return f"non-finite values from step {step}{of} on, at t={t:.6g}, in {name_of(x.dtype)}"


def gaussian(x: Tensor, noise: NoiseSource | None) -> Tensor:
    """Standard normal draws like ``x``."""
    return normal(tuple(x.shape), noise, device=x.device, dtype=x.dtype)


def increment(x: Tensor, noise: NoiseSource | None, sde: Any, t: Tensor, s: Tensor) -> Tensor:
    """Standard normals like ``x`` that drive the reverse SDE from ``t`` to ``s``.

    The increment of a :class:`scoresde.brownian.BrownianPath` over the step, scaled to unit
    variance; other sources give their next draw.
    """
    if isinstance(noise, PathNoise):
        a, b = sde.log_snr(t), sde.log_snr(s)
        return noise.increment(a, b, tuple(x.shape), x.device, x.dtype)
    return gaussian(x, noise)
