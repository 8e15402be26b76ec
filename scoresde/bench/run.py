"""Running a trial from common start noise, and the converged solution that it is compared to."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .. import solvers as room
from ..noise import KeyedNoise
from ..sampling import Samples, join, sample
from ..sde.base import select
from ..solvers.base import Solver
from ..world import World
from .row import label

TIGHT = {torch.float32: 1e-6, torch.float64: 1e-9}
"""Tolerances of the reference; of a float32 network, what its rounding leaves."""
REFERENCE_NFE = 20000


class UnsolvedError(ValueError):
    """The reference solver did not converge."""


@dataclass(frozen=True, eq=False)
class Runner:
    """Everything that the rows have in common.

    Args:
        score: ``score(x, t, **cond)``.
        starts: states at ``t_max``, one set ``(N, *shape)`` for each repeat.
        seed: of the first repeat; the others count on.
        batch: samples drawn at once.
        cond: conditions, one value a sample.
    """

    score: Any
    starts: tuple[Tensor, ...]
    seed: int
    batch: int
    cond: dict[str, Any]

    @classmethod
    def prepare(
        cls,
        score: Any,
        shape: tuple[int, ...],
        samples: int,
        seed: int,
        repeats: int,
        batch: int | None,
        home: tuple[torch.device, torch.dtype],
        cond: dict[str, Any],
    ) -> Runner:
        """A runner whose starts are draws from the prior under ``seed, seed + 1, ...``."""
        device, dtype = home
        starts = tuple(
            score.sde.prior_sample((samples, *shape), KeyedNoise(s), device=device, dtype=dtype)
            for s in range(seed, seed + repeats)
        )
        return cls(score, starts, seed, batch or samples, cond)

    def __call__(self, solver: Solver, steps: int | None, grid: Any, repeat: int = 0) -> Samples:
        """All samples of a repeat, batch by batch; noise is keyed, so the batches do not show."""
        return join([self.part(solver, steps, grid, repeat, first) for first in self.firsts])

    @property
    def firsts(self) -> range:
        """The first sample of each batch."""
        return range(0, len(self.starts[0]), self.batch)

    def part(
        self, solver: Solver, steps: int | None, grid: Any, repeat: int, first: int
    ) -> Samples:
        """One batch of a repeat."""
        rows = slice(first, first + self.batch)
        return sample(
            self.score, x_T=self.starts[repeat][rows], solver=solver, steps=steps, grid=grid,
            seed=self.seed + repeat, start_index=first, **select(self.cond, rows),
        )  # fmt: skip

    def warm_up(self) -> None:
        """One step of the first batch, so that nothing timed loads libraries or kernels."""
        rows = slice(self.batch)
        first = replace(self, starts=(self.starts[0][rows],), cond=select(self.cond, rows))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one step is few, and nobody looks at its sample
            first(room.DDIM(), 1, None)


@dataclass(frozen=True, eq=False)
class Truth:
    """Where the probability-flow ODE leads from each start.

    Args:
        ends: one set ``(N, *shape)`` for each repeat, the last denoising included.
        error: RMS distance to a second solution at ten times the tolerances, so rather that of
            the second, and no less than the rounding of the state; None for a solver without
            tolerances.
        solver: how it was found.
    """

    ends: tuple[Tensor, ...]
    error: float | None
    solver: Solver

    @classmethod
    def find(cls, run: Runner, solver: Solver, world: World | None = None) -> Truth:
        """The solution by a solver that chooses its steps; the processes share the batches.

        Raises:
            ValueError: for a stochastic solver.
            UnsolvedError: if the solver does not converge.
        """
        if solver.stochastic:
            raise ValueError(f"the endpoint needs a solver of the ODE, and {label(solver)} is not")
        wanted = [solver]
        if hasattr(solver, "rtol") and hasattr(solver, "atol"):
            loose = replace(solver, rtol=10 * solver.rtol, atol=10 * solver.atol)  # type: ignore[call-arg]
            wanted.append(loose)
        ends, *again = _solved(run, wanted, world or World())
        squares = []
        for end, other in zip(ends, again[0] if again else (), strict=False):
            gap = (other - end).double()
            rounding = torch.finfo(end.dtype).eps * end.double()
            squares.append(float(torch.maximum(gap.square(), rounding.square()).mean()))
        error = math.sqrt(sum(squares) / len(squares)) if squares else None
        return cls(tuple(ends), error, solver)

    def errors(self, x: Tensor, repeat: int) -> Tensor:
        """Mean square over entries of the distance of ``x (N, *shape)``, ``(N,)`` in float64."""
        gap = x.detach().cpu().double() - self.ends[repeat].cpu().double()
        return gap.flatten(1).square().mean(1)


def reference_solver(dtype: torch.dtype) -> Solver:
    """The tight solver of a state of this type: order 8, steps of each sample's own."""
    tolerance = TIGHT[dtype]
    return room.RungeKutta(method="dop853", rtol=tolerance, atol=tolerance, max_nfe=REFERENCE_NFE)


def _solved(run: Runner, solvers: Sequence[Solver], world: World) -> list[list[Tensor]]:
    """For each solver the ends of every repeat, on the CPU; the processes take turns."""
    work = list(product(range(len(solvers)), range(len(run.starts)), run.firsts))
    own: dict[tuple[int, int, int], tuple[Tensor, str]] = {}
    for key in work[world.rank :: world.size]:
        which, repeat, first = key
        found = run.part(solvers[which], None, None, repeat, first)
        own[key] = found.x.cpu(), "" if found.converged else found.message or "no reason given"
        if not found.converged and world.size == 1:
            break
    done = dict(own)
    for theirs in world.broadcast(world.gather(own)):
        done |= theirs
    for key in sorted(done):
        if done[key][1]:
            name = label(solvers[key[0]])
            raise UnsolvedError(f"the endpoint by {name} did not converge: {done[key][1]}")
    return [
        [torch.cat([done[i, r, first][0] for first in run.firsts]) for r in range(len(run.starts))]
        for i in range(len(solvers))
    ]
