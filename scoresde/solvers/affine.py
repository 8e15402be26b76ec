r"""Methods that are affine in one value a step, as the numbers that they are on a grid.

    u_{i+1} = u_i + sum_j c_ij V_{i-j} + kick_i,    x_i = m_i u_i,    V_i = V(x_i, t_i)

``V`` is a multistep method's own variable and the noise estimate for others. With a corrector
``x_i`` is the prediction, where the score is evaluated: the correction that follows is affine in
the same values, so the form stays. ``m`` and ``c`` are not derived anew for each method but read
off the method itself, which is run once with unit vectors for its values.
"""

from __future__ import annotations

from copy import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..noise import KeyedNoise
from ..sde.base import Reverse
from .ancestral import Ancestral, ReverseDiffusion
from .base import Solver
from .ddim import DDIM
from .euler import EulerMaruyama
from .multistep import Multistep
from .pndm import PNDM

AFFINE = (Multistep, DDIM, PNDM, Ancestral, ReverseDiffusion, EulerMaruyama)
"""Solvers whose steps are affine in one value each."""
LAGS = 8
"""Values that a step may depend on: at most seven points of a corrector, and one."""


def with_values(solver: Solver, value: Any) -> Solver:
    """The method with ``value(x)`` for what it would ask of the score."""
    probe = copy(solver)
    if isinstance(solver, Multistep):
        object.__setattr__(probe, "value", lambda reverse, x, here: value(x))
    return probe


class _Silent(KeyedNoise):
    """No noise."""

    def normal(
        self,
        shape: tuple[int, ...],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Zeros."""
        return torch.zeros(shape, device=device, dtype=dtype)


def increments(solver: Solver, sde: Any, times: Tensor) -> tuple[Tensor, Tensor]:
    """``m (N + 1,)`` and ``c (N, J)`` of a method on a grid, newest value first, float64.

    The state is kept as its coefficients in ``(x_0, V_0, ..., V_{N-1})``, and values are unit
    vectors.

    Raises:
        ValueError: for a method that is not of the form, which must be affine in one value a step.
    """
    steps, asked = len(times) - 1, 0

    def unit(index: int) -> Tensor:
        return torch.zeros(1, steps + 1, dtype=torch.float64).index_fill_(
            1, torch.tensor(index), 1
        )

    def value(x: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        return unit(min(asked, steps))

    probe = with_values(solver, value)
    reverse = Reverse(sde, lambda x, t: -value(x) / sde.sigma(t), solver.eta)
    x, noise = unit(0), _Silent(0)
    state, u = probe.init(reverse, x, times, noise), x
    scale, lags = torch.ones(steps + 1, dtype=torch.float64), torch.zeros(steps, LAGS).double()
    for i, (t, s) in enumerate(pairwise(times.unbind())):
        x, state = probe.step(reverse, x, t, s, noise, state)
        scale[i + 1] = x[0, 0]
        rise, u = (x / x[0, 0] - u)[0, 1:], x / x[0, 0]
        recent = rise[max(0, i + 1 - LAGS) : i + 1].flip(0)
        lags[i, : len(recent)] = recent
        older = rise.abs().sum() - recent.abs().sum()
        if asked != i + 1 or not older <= 1e-9 * rise.abs().sum():
            raise ValueError(f"{type(solver).__name__} is not affine in one value a step")
    significant = lags.abs().amax(0) > 1e-13 * lags.abs().max()
    return scale, lags[:, : int(significant.nonzero().max()) + 1]
