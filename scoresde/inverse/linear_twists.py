"""Twists of a linear measurement: its Gaussian is carried through exactly (see ``twist.py``)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .conjugate import solved
from .measured import Denoised, beside
from .operator import Spectrum, inverse
from .twist import Problem, Step, Twist, View, alike

LOG_2PI = math.log(2 * math.pi)
THINNEST = 1e-4
"""Smallest variance of a covariance that a score gives, in units of ``r_t^2``."""


@dataclass(frozen=True)
class Isotropic(Twist):
    """``C = r_t^2 I``: that of data ``N(0, sigma_data^2 I)``, as in pseudo-inverse guidance.

    Args:
        iterations: of conjugate gradients with the score's own covariance, for ``x0'`` and the
            square in ``psi``; 0 for ``r_t^2`` there, too.
    """

    iterations: int = 0

    linear: ClassVar[bool] = True

    def products(self, last: bool) -> int:
        """One for the gradient, or one an iteration; the last kernel has ``C`` and no other."""
        return 0 if last else max(1, self.iterations)

    def look(self, problem: Problem, at: Denoised, t: Tensor, last: bool) -> View:
        """By the spectrum of the operator."""
        operator, noise = problem.operator, problem.noise_std**2
        assert problem.spectrum is not None
        r, spread = problem.residual(at.x0), alike(at)
        value = told(problem, problem.spectrum, r, spread)
        if last:
            return View(at.x0, torch.zeros_like(at.x0), value, spread)
        variance = beside(at.variance, r)
        w = operator.solve(r, noise, variance)
        if not self.iterations:
            return View(at.x0, at.spread(operator.adjoint(w)), value, spread)
        own, shift = solved(operator, at.spread, r, noise, variance, self.iterations)
        value = value + ((w - own) * r).flatten(1).sum(1) / 2
        return View(at.x0, shift, value, spread)

    def move(
        self, problem: Problem, view: View, x: Tensor, step: Step, z: Tensor, back: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Coefficient by coefficient: what is measured spreads less."""
        if back is not None and not step.last:
            return super().move(problem, view, x, step, z, back)
        spectrum = problem.spectrum
        assert spectrum is not None
        z = spectrum.to(z)
        spread = beside(view.spread, z)
        less = lessened(problem, spectrum, spread)
        p, q = step.std**2 + step.data**2 * spread, step.std**2 + step.data**2 * less
        if step.last:
            shift = conditioned(problem, spectrum, view.x0, spread)
        else:
            shift = spectrum.to(view.shift)
        moved = step.data * shift + q.sqrt() * z
        found = step.state * x + step.data * view.x0 + spectrum.back(moved)
        if step.last:  # what y says of x_0 has been counted by the twist, exactly
            return found, torch.zeros_like(view.log_twist)
        ratio = (z.square() + (q / p).log()) / 2 - moved.square() / (2 * p)
        return found, ratio.flatten(1).sum(1)


def told(problem: Problem, spectrum: Spectrum, r: Tensor, spread: Tensor) -> Tensor:
    """``log N(r; 0, noise_std^2 I + spread A A^T)``, ``(B,)``; without noise, in the range."""
    noise = problem.noise_std**2
    c = spectrum.measured(r)
    power = noise + beside(spread, c) * spectrum.values**2
    inside = c.square() * inverse(power) + power.log() + LOG_2PI
    inside = torch.where(spectrum.values > 0, inside, 0)
    return unseen(problem, spectrum, r, c) - inside.flatten(1).sum(1) / 2


def unseen(problem: Problem, spectrum: Spectrum, r: Tensor, c: Tensor) -> Tensor:
    """``log N`` of the part of ``r`` that is no measurement of any item: noise alone, ``(B,)``."""
    rest, noise = problem.operator.count - problem.rank, problem.noise_std**2
    if not (rest and noise):
        return r.new_zeros(len(r))
    outside = problem.operator.seen(r - spectrum.measurement(c)).square().flatten(1).sum(1)
    return -(outside / noise + rest * (math.log(noise) + LOG_2PI)) / 2


def lessened(problem: Problem, spectrum: Spectrum, spread: Tensor) -> Tensor:
    """Variances of the coefficients of ``x_0`` that are left once ``y`` is known."""
    square = spectrum.values**2
    power = problem.noise_std**2 + spread * square
    return torch.where(square > 0, spread * problem.noise_std**2 * inverse(power), spread)


def conditioned(problem: Problem, spectrum: Spectrum, x0: Tensor, spread: Tensor) -> Tensor:
    """By how much ``y`` moves the coefficients of ``N(x0, spread I)``."""
    c = spectrum.measured(problem.residual(x0))
    values = spectrum.values
    return spread * values * inverse(problem.noise_std**2 + spread * values**2) * c


@dataclass(frozen=True)
class Full(Twist):
    """``C`` is the score's own covariance, whole: exact for Gaussian data, for few dimensions.

    Args:
        matrix: ``S V^T``, rows that say something of an item, ``(rank, D)``.
        index: of these rows among the coefficients, ``(rank,)``.
    """

    matrix: Tensor
    index: Tensor

    linear: ClassVar[bool] = True

    @classmethod
    def of(cls, problem: Problem, like: Tensor) -> Full:
        """For a problem, on the device of ``like (B, *shape)`` and in its dtype."""
        spectrum = problem.spectrum
        assert spectrum is not None
        shape = like.shape[1:]
        eye = torch.eye(math.prod(shape), dtype=like.dtype, device=like.device)
        turned = spectrum.to(eye.reshape(-1, *shape))
        values = spectrum.values.expand(turned.shape[1:]).flatten()
        index = values.nonzero()[:, 0]
        return cls(values[index, None] * turned.flatten(1).T[index], index)

    def products(self, last: bool) -> int:
        """One a dimension."""
        return self.matrix.shape[1]

    def look(self, problem: Problem, at: Denoised, t: Tensor, last: bool) -> View:
        """By the matrix of the operator."""
        x0, spectrum = at.x0, problem.spectrum
        assert spectrum is not None
        eye = torch.eye(self.matrix.shape[1], dtype=x0.dtype, device=x0.device)
        rows = [at.spread(e.reshape(1, *x0.shape[1:]).expand_as(x0)).flatten(1) for e in eye]
        own = torch.stack(rows, 1)
        values, vectors = torch.linalg.eigh((own + own.mT) / 2)
        # What a network gives need be no covariance.
        floor = THINNEST * at.variance.to(values).reshape(-1, 1)
        own = vectors * values.maximum(floor)[:, None] @ vectors.mT
        r = problem.residual(x0)
        c = spectrum.measured(r)
        inside = c.flatten(1)[:, self.index, None]
        gain, root = self._gain(problem, own)
        inner = torch.linalg.solve_triangular(root, inside, upper=False)
        value = unseen(problem, spectrum, r, c) - inner.square().flatten(1).sum(1) / 2
        value = value - len(self.matrix) * LOG_2PI / 2 - log_det(root)
        return View(x0, (gain @ inside).reshape(x0.shape), value, own)

    def move(
        self, problem: Problem, view: View, x: Tensor, step: Step, z: Tensor, back: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """By two triangular factors."""
        own = view.spread
        eye = torch.eye(own.shape[1], dtype=x.dtype, device=x.device)
        gain, _ = self._gain(problem, own)
        keep = eye - gain @ self.matrix
        less = keep @ own @ keep.mT + problem.noise_std**2 * gain @ gain.mT
        z = z.flatten(1)[..., None]
        root = factor(step.std**2 * eye + step.data**2 * less)
        spread = root @ z
        if step.last and not problem.noise_std:  # what the root's rounding has left of it
            spread = keep @ spread
        moved = step.data * view.shift.flatten(1)[..., None] + spread
        found = step.state * x + step.data * view.x0 + moved.reshape(x.shape)
        if step.last:
            return found, torch.zeros_like(view.log_twist)
        root_p = factor(step.std**2 * eye + step.data**2 * own)
        e = torch.linalg.solve_triangular(root_p, moved, upper=False)
        ratio = (z.square() - e.square()).flatten(1).sum(1) / 2
        return found, ratio + log_det(root) - log_det(root_p)

    def _gain(self, problem: Problem, own: Tensor) -> tuple[Tensor, Tensor]:
        """``C A^T (noise_std^2 I + A C A^T)^{-1}``, and the triangular root of the middle."""
        eye = torch.eye(len(self.matrix), dtype=own.dtype, device=own.device)
        across = own @ self.matrix.T
        root = factor(problem.noise_std**2 * eye + self.matrix @ across)
        return torch.cholesky_solve(across.mT, root).mT, root


def factor(matrix: Tensor) -> Tensor:
    """The lower triangular factor; of what rounding has made indefinite, of a bit more than it."""
    root, failed = torch.linalg.cholesky_ex(matrix)
    if not bool(failed.any()):
        return root
    more = 10 * torch.finfo(matrix.dtype).eps * matrix.diagonal(dim1=1, dim2=2).amax(1)
    eye = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.cholesky_ex(matrix + more[:, None, None] * eye)[0]


def log_det(root: Tensor) -> Tensor:
    """Of triangular factors ``(B, n, n)``, ``(B,)``."""
    return root.diagonal(dim1=1, dim2=2).log().sum(1)
