"""What particles are weighed by: a linear measurement, or any likelihood of an item."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .linear import Linear
from .measured import check_items
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
        given = () if self.y is None else (self.y,)
        return one_an_item(self.log_likelihood(x0, *given), x0)

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
        return Problem(likelihood, one_each(y, draws, particles, "y", like))
    if y is None:
        raise ValueError("smc needs a measurement y beside an operator")
    y = likelihood.measurements(y).to(like)
    if len(y) > 1:  # one is compared with all particles as it is
        y = one_each(y, draws, particles, "y", like)
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


def item_of(score: Any, likelihood: Any, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """Shape of an item."""
    if isinstance(likelihood, Operator):
        check_items(score, likelihood)
    item = shape or getattr(likelihood, "shape", None) or getattr(score, "shape", None)
    if not item:
        raise ValueError("smc needs the shape= of an item, which this score does not know")
    return tuple(item)


def one_each(value: Any, draws: int, particles: int, name: str, like: Tensor) -> Any:
    """One value a particle of what is one a run, or one for all; what is no tensor, itself."""
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    value = value.to(like.device)
    if len(value) == 1:
        return value.expand(draws * particles, *value.shape[1:])
    if len(value) != draws:
        raise ValueError(f"{name} has {len(value)} values for draws={draws}: one a run")
    return value.repeat_interleave(particles, 0)


def one_an_item(value: Any, x0: Tensor) -> Tensor:
    """``value`` if it is one number an item: of anything else, numbers would be mixed up."""
    if not isinstance(value, Tensor) or tuple(value.shape) != (len(x0),):
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"a log-likelihood of {len(x0)} items has shape ({len(x0)},), got {found}"
        )
    return value
