"""What particles are weighed by: a linear measurement, or any likelihood of an item."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .linear import Linear
from .operator import Operator, Spectrum

DENSE = 4096
"""Numbers of an item or a measurement up to which an operator's matrix is decomposed."""


class Problem(NamedTuple):
    """What was measured: a linear map with its spectrum, or a likelihood alone."""

    log_likelihood: Callable[..., Tensor]
    y: Tensor | None = None
    operator: Any = None
    noise_std: float = 0.0
    spectrum: Spectrum | None = None
    rank: int = 0
    """How many numbers of the measurement say something of an item."""

    def rows(self, index: slice) -> Problem:
        """That of some particles."""
        y = self.y
        return self if y is None or len(y) == 1 else self._replace(y=y[index])

    def likelihood(self, x0: Tensor) -> Tensor:
        """``log p(y | x_0)``, ``(B,)``."""
        if self.operator is not None:
            y = self.y
            return self.operator.log_likelihood(y, self.operator(x0), self.noise_std)
        return self.log_likelihood(x0) if self.y is None else self.log_likelihood(x0, self.y)

    def residual(self, x0: Tensor) -> Tensor:
        """``y - A x_0``, on what is measured."""
        return self.operator.seen(self.y - self.operator(x0))


def problem_of(
    likelihood: Any, y: Tensor | None, noise_std: float, draws: int, particles: int, like: Tensor
) -> Problem:
    """What was measured, with one measurement a particle if there is one a run."""
    if not isinstance(likelihood, Operator):
        if not callable(likelihood):
            raise ValueError(
                "smc needs an operator or a function x_0 -> log p(y | x_0), "
                f"got {type(likelihood).__name__}"
            )
        many = None if y is None else one_each(y, draws, particles, "y", like)
        return Problem(likelihood, many)
    if y is None:
        raise ValueError("smc needs a measurement y beside an operator")
    y = one_each(likelihood.measurements(y).to(like), draws, particles, "y", like)
    spectrum = likelihood.spectrum(like)
    if spectrum is None:
        if max(math.prod(likelihood.shape), math.prod(likelihood.out)) > DENSE:
            raise ValueError(
                f"smc needs an operator with a spectrum, or one of at most {DENSE} numbers, "
                f"which {type(likelihood).__name__} is not"
            )
        y = y.flatten(1)
        likelihood = Linear(likelihood.dense(), likelihood.shape)
        spectrum = likelihood.spectrum(like)
    values = spectrum.values.expand(spectrum.to(like).shape[1:])
    rank = int((values > 0).sum())
    return Problem(likelihood, y, likelihood, noise_std, spectrum, rank)


def one_each(value: Any, draws: int, particles: int, name: str, like: Tensor) -> Any:
    """One value a particle of what is one a run; of what is one for all, or no tensor, itself."""
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    value = value.to(like.device)
    if len(value) == 1 and name == "y":
        return value
    if len(value) != draws:
        raise ValueError(f"{name} has {len(value)} values for draws={draws}: one a run")
    return value.repeat_interleave(particles, 0)
