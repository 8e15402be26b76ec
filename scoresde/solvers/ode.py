r"""The probability-flow ODE by general-purpose adaptive methods of other libraries.

    dx/dt = f(x, t) - g(t)^2/2 score(x, t),    t from t_start to t_end

``ODE`` runs torchdiffeq on the device of the state; ``ODEScipy`` runs scipy on the CPU with a
float64 state. Both choose one step for all that they are given, so they are given one sample at a
time, which is then the same in any batch; ``together`` gives them the batch. Neither evaluates
outside ``[t_end, t_start]``, and both stop after ``max_nfe`` evaluations with the state that they
have reached. :class:`.adaptive.RungeKutta` has steps of each sample's own within one batch.

Where the rate of a process jumps in t, as that of :class:`scoresde.DDPM` does a thousand times,
no method keeps its order, and both step in the log-SNR instead, in which nothing jumps:

    dx/d log_snr = (f(x, t) - g(t)^2/2 score(x, t)) dt/d log_snr,    dt/d log_snr = -2 (sigma/g)^2

scipy's implicit methods (Radau, BDF, LSODA) are left out: they ask for the D x D Jacobian of the
score, D evaluations by differences, where explicit methods need a few dozen.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import unknown
from ..noise import NoiseSource
from ..precision import name_of, tolerance, widest
from ..sde.base import Reverse, as_time
from .base import Callback, Solution, Solver, non_finite
from .clock import Clock
from .runge_kutta import first_of, named


class _SpentError(Exception):
    """The budget of evaluations is spent."""


@dataclass(frozen=True)
class AdaptiveODE(Solver):
    """What the adaptive methods share: their options and their messages.

    Args:
        method: name of the method.
        rtol: relative tolerance, > 0.
        atol: absolute tolerance, > 0.
        max_nfe: evaluations after which to give up, >= 1.
    """

    method: str = ""
    rtol: float = 1e-5
    atol: float = 1e-5
    max_nfe: int = 1000

    methods: ClassVar[dict[str, tuple[int, int]]] = {}
    """Accepted methods, with order and evaluations per step."""
    order: ClassVar[float] = 5.0
    stochastic: ClassVar[bool] = False
    nfe_per_step: ClassVar[int] = 6
    default_steps: ClassVar[int | None] = None
    default_grid: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if self.method not in self.methods:
            raise unknown(f"method of {type(self).__name__}", self.method, self.methods)
        if not (self.rtol > 0 and self.atol > 0):
            raise ValueError(
                f"{type(self).__name__} needs rtol > 0 and atol > 0, "
                f"got rtol={self.rtol}, atol={self.atol}"
            )
        if self.max_nfe < 1:
            raise ValueError(f"{type(self).__name__} needs max_nfe >= 1, got {self.max_nfe}")
        order, nfe = self.methods[self.method]
        object.__setattr__(self, "order", float(order))
        object.__setattr__(self, "nfe_per_step", nfe)

    def step(
        self,
        reverse: Reverse,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        noise: NoiseSource | None,
        state: Any = None,
    ) -> tuple[Tensor, Any]:
        """Solves from ``t`` to ``s``, shape ``()``, by as many steps as it takes."""
        return self.integrate(reverse, x, torch.stack([t, s]), noise).x, state


@dataclass(frozen=True)
class Adapter(AdaptiveODE):
    """A library whose methods know one step and one error: a sample at a time, or all together.

    Args:
        together: whether the batch is solved as one state. Fewer, larger calls of the score are
            faster on an accelerator, but then a sample depends on the batch that it is drawn in,
            within the tolerances, and ``max_nfe`` is the batch's. By default each sample is solved
            by itself, and ``max_nfe`` is its own. A callback is told the time of the sample that
            has farthest to go, and is shown each at its own.
    """

    together: bool = False

    def integrate(
        self,
        reverse: Reverse,
        x: Tensor,
        times: Tensor,
        noise: NoiseSource | None = None,
        callback: Callback | None = None,
    ) -> Solution:
        """Solves from ``times[0]`` to ``times[-1]``; see :meth:`Solver.integrate`."""
        self.check(reverse)
        if self.together:
            return self.solve(reverse, x, times, callback)
        arrived, nfe, failures = x.clone(), [], {}
        at = torch.full((len(x),), float(times[0]), dtype=torch.float64)
        count = 0
        for i in range(len(x)):

            def report(step: int, t: float, state: Tensor, i: int = i) -> None:
                nonlocal count
                count += 1
                arrived[i], at[i] = state[0], t
                assert callback is not None
                farthest = at.max() if float(times[-1]) < float(times[0]) else at.min()
                callback(count, float(farthest), arrived.clone())

            part = reverse.part(torch.tensor([i], device=x.device))
            found = self.solve(part, x[i : i + 1], times, None if callback is None else report)
            arrived[i], at[i] = found.x[0], found.t
            nfe.append(part.nfe)
            if not found.converged:
                failures[i] = found.message
        counts = torch.tensor(nfe, device=x.device)
        if not failures:
            return Solution(arrived, float(times[-1]), nfe=counts)
        item, reason = first_of(failures)
        t = at.to(x.device, widest(x.device))
        return Solution(arrived, t, False, f"{named(item, noise)}: {reason}", counts)

    @abstractmethod
    def solve(
        self, reverse: Reverse, x: Tensor, times: Tensor, callback: Callback | None
    ) -> Solution:
        """Solves ``x`` as one state; the reversed process counts the evaluations."""

    def _field(self, reverse: Reverse, clock: Clock) -> Callable[[Tensor, Tensor], Tensor]:
        """The drift by the clock, kept inside the interval and within the budget."""
        limit = reverse.nfe + self.max_nfe

        def field(u: Tensor, x: Tensor) -> Tensor:
            if reverse.nfe >= limit:
                raise _SpentError
            t = clock.time(u)
            return reverse.drift(x, t) * clock.rate(t)

        return field

    def _spent(self, x: Tensor, t: float, end: float, steps: int) -> Solution:
        message = (
            f"stopped after {self.max_nfe} evaluations at t={t:.6g}, short of t={end:.6g}, "
            f"after {steps} steps, in {name_of(x.dtype)}: raise max_nfe, rtol or atol"
        )
        return Solution(x, t, False, message)

    def _stuck(self, x: Tensor, t: float, steps: int) -> Solution:
        if not bool(x.isfinite().all()):
            return Solution(x, t, False, non_finite(x, t, steps))
        message = (
            f"the step size underflowed at t={t:.6g} after {steps} steps, in {name_of(x.dtype)}: "
            "the score is not finite or not smooth there; use float64, or raise rtol and atol"
        )
        return Solution(x, t, False, message)


@dataclass(frozen=True)
class ODE(Adapter):
    """torchdiffeq on the device of the state.

    Sources: https://github.com/rtqichen/torchdiffeq; A family of embedded Runge-Kutta formulae
    (Dormand & Prince, 1980), https://doi.org/10.1016/0771-050X(80)90013-3.
    """

    method: str = "dopri5"

    methods: ClassVar[dict[str, tuple[int, int]]] = {
        "dopri8": (8, 13),
        "dopri5": (5, 6),
        "bosh3": (3, 3),
        "adaptive_heun": (2, 1),
    }

    def solve(
        self, reverse: Reverse, x: Tensor, times: Tensor, callback: Callback | None
    ) -> Solution:
        """Solves ``x`` as one state, its error that of its worst sample."""
        from torchdiffeq import odeint

        clock = Clock(reverse.sde, times)
        rtol, atol = tolerance(self.rtol, x.dtype), tolerance(self.atol, x.dtype)
        ends = clock.ends.to(x.device, widest(x.device))
        field = self._field(reverse, clock)
        end = float(times[-1])
        steps, at, state = 0, float(clock.time(ends[0])), x

        def step_begins(u: Tensor, y: Tensor, du: Tensor) -> None:
            nonlocal steps, at, state
            t = float(clock.time(u))
            if t == at:  # the first step, or one that is tried again
                return
            steps, at, state = steps + 1, t, y
            if callback is not None:
                callback(steps, at, y)

        # torchdiffeq looks for this attribute. Without step_t it would step past the end, outside
        # the trained times, and interpolate back.
        field.callback_step = step_begins  # type: ignore[attr-defined]
        options = {
            "norm": lambda error: reverse.error_norm(error.flatten(1)).max(),  # the worst sample's
            "step_t": ends[-1:],
            "dtype": ends.dtype,
        }
        try:
            state = odeint(
                field, x, ends, rtol=rtol, atol=atol, method=self.method, options=options
            )[-1]
        except _SpentError:
            return self._spent(state, at, end, steps)
        except AssertionError:  # a step too small or a state not finite, says torchdiffeq
            return self._stuck(state, at, steps)
        if callback is not None:
            callback(steps + 1, end, state)
        if not bool(state.isfinite().all()):
            return Solution(state, end, False, non_finite(state, end, steps + 1))
        return Solution(state, end)


@dataclass(frozen=True)
class ODEScipy(Adapter):
    """scipy's explicit Runge-Kutta methods, with a float64 state on the CPU.

    The score is evaluated on the device and in the dtype of ``x``.

    Source: https://docs.scipy.org/doc/scipy/reference/integrate.html.
    """

    method: str = "RK45"

    methods: ClassVar[dict[str, tuple[int, int]]] = {
        "RK45": (5, 6),
        "RK23": (3, 3),
        "DOP853": (8, 11),
    }

    def solve(
        self, reverse: Reverse, x: Tensor, times: Tensor, callback: Callback | None
    ) -> Solution:
        """Solves ``x`` as one state, its error the root mean square over the whole of it."""
        from scipy import integrate

        clock = Clock(reverse.sde, times)
        field = self._field(reverse, clock)
        begin, end = clock.ends.tolist()

        def back(y: Any) -> Tensor:
            return torch.from_numpy(y).reshape(x.shape).to(x)

        def flat(u: float, y: Any) -> Any:
            return field(as_time(u), back(y)).flatten().cpu().double().numpy()

        y, t, steps = x.flatten().cpu().double().numpy(), float(times[0]), 0
        try:
            method = getattr(integrate, self.method)(
                flat, begin, y, end, rtol=self.rtol, atol=self.atol
            )
            while method.status == "running":
                method.step()
                if method.status == "failed":
                    return self._stuck(back(y), t, steps)
                y, t, steps = method.y, float(clock.time(as_time(method.t))), steps + 1
                if callback is not None:
                    callback(steps, t, back(y))
        except _SpentError:
            return self._spent(back(y), t, float(times[-1]), steps)
        return Solution(back(y), float(times[-1]))
