r"""The probability-flow ODE with steps and an error control of each sample's own.

    dz/ds = rate(s) (eps_hat - sin(th) z),    s from 1 to 0, or from 0 to 1 to encode

in the coordinates of :mod:`scoresde.path`, in which every Gaussian process is the same, by the
methods of :mod:`.runge_kutta`. A sample costs what it needs, and is the same in any batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..noise import NoiseSource
from ..path import Path
from ..precision import name_of, tolerance, widest
from ..sde.base import Reverse
from .base import Callback, Solution
from .ode import AdaptiveODE
from .runge_kutta import PAIRS, Solved, first_of, named, solve

FIRST_STEP = 0.05
"""First step tried away from noise, as a fraction of the way: the state is nearly white noise."""


@dataclass(frozen=True)
class RungeKutta(AdaptiveODE):
    """Embedded Runge-Kutta pair with per-sample steps on a Gaussian process.

    ``rtol`` and ``atol`` bound the root mean square of a sample's error in a step, in units of
    its standard deviation ``sqrt(alpha^2 + sigma^2)``; not below 1e-6 for a float32 state.
    ``max_nfe`` is a sample's own. A callback is told the time of the sample that has farthest to
    go, and is shown each at its own.

    Sources: see :mod:`scoresde.solvers.runge_kutta`.
    """

    method: str = "dopri5"

    methods: ClassVar[dict[str, tuple[int, int]]] = {
        "dopri5": (5, 6),
        "bosh3": (3, 3),
        "dop853": (8, 12),
    }

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
        start, end = float(times[0]), float(times[-1])
        path = Path(reverse.sde, min(start, end), max(start, end))
        first, last = (1.0, 0.0) if end < start else (0.0, 1.0)

        def field(s: Tensor, y: Tensor, rows: Tensor) -> Tensor:
            z = y.reshape(-1, *x.shape[1:])
            p = path(s).beside(z)
            eps = reverse.part(rows).noise(z / p.scale, p.t)
            return p.velocity(eps, z).flatten(1).to(y.dtype)

        def state(done: Solved) -> Tensor:
            return done.y.reshape(x.shape) / path(done.s).beside(x).scale

        attempts = 0

        def report(done: Solved) -> None:
            nonlocal attempts
            attempts += 1
            assert callback is not None
            farthest = done.s.max() if end < start else done.s.min()
            callback(attempts, float(path.time(farthest)), state(done))

        done = solve(
            field,
            x.flatten(1) * path(first).scale,
            first,
            last,
            PAIRS[self.method](),
            norm=lambda error, s: reverse.error_norm(error, path.cos(s)),
            rtol=tolerance(self.rtol, x.dtype),
            atol=tolerance(self.atol, x.dtype),
            first_step=FIRST_STEP if end < start else path.first_step,
            max_nfe=self.max_nfe,
            report=None if callback is None else report,
        )
        arrived, nfe = state(done), done.nfe.to(x.device)
        if not done.failures:
            return Solution(arrived, end, nfe=nfe)
        t, (item, reason) = path.time(done.s), first_of(done.failures)
        tried = (int(done.nfe[item]) - 1) // PAIRS[self.method]().nfe_per_step
        where = f"t={float(t[item]):.6g} after {tried} steps tried, short of t={end:.6g}"
        where = f"{where}, in {name_of(x.dtype)}"
        message = f"{named(item, noise)} stopped at {where}: {reason}"
        return Solution(arrived, t.to(x.device, widest(x.device)), False, message, nfe)
