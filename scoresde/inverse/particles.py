"""Weighted particles: how they are chosen anew by their weights, and what a run of them gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import unknown
from ..model import Cost
from ..noise import KeyedNoise, step_seed

STREAM = 17
"""Of the uniforms that choose particles, apart from the noise that moves them."""
LAST = 1 << 20
"""Draw of the uniforms of :meth:`Particles.sample`, after those of any run."""


def systematic(u: Tensor, count: int) -> Tensor:
    """One uniform a run, at equal distances: ``(i + u)/count``."""
    return (torch.arange(count, device=u.device) + u[:, :1]) / count


def stratified(u: Tensor, count: int) -> Tensor:
    """A uniform in each of ``count`` equal parts."""
    return (torch.arange(count, device=u.device) + u) / count


def multinomial(u: Tensor, count: int) -> Tensor:
    """Independent uniforms."""
    return u


SCHEMES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "systematic": systematic,
    "stratified": stratified,
    "multinomial": multinomial,
}
"""Rules that give ``(draws, count)`` places in [0, 1) for uniforms ``(draws, count)``."""


def scheme(name: str) -> Callable[[Tensor, int], Tensor]:
    """The rule of that name.

    Raises:
        ConfigError: for an unknown one.
    """
    if name not in SCHEMES:
        raise unknown("resampling", name, SCHEMES)
    return SCHEMES[name]


def chosen(log_weights: Tensor, places: Tensor) -> Tensor:
    """Indices ``(draws, count)`` of the particles at the places of the cumulated weights.

    Args:
        log_weights: normalised, ``(draws, particles)``.
        places: in [0, 1), ``(draws, count)``.
    """
    total = log_weights.double().exp().cumsum(1)
    total = total / total[:, -1:]
    # The last is exactly 1, so that no place falls behind it or on a particle without weight.
    return torch.searchsorted(total, places.to(total).contiguous(), right=True)


def ess(log_weights: Tensor) -> Tensor:
    """Effective sample size ``1/sum w^2`` of normalised weights, ``(draws,)``."""
    return (-(2 * log_weights).logsumexp(1)).exp()


class Runs:
    """The weights of runs of particles as they go: weighed, and chosen anew.

    Args:
        draws: number of runs.
        particles: of each.
        like: its device and dtype are those of the weights.
    """

    def __init__(self, draws: int, particles: int, like: Tensor) -> None:
        self.shape = draws, particles
        self.log_weights = like.new_full(self.shape, -math.log(particles))
        self.log_evidence = like.new_zeros(draws)
        self.resampled = torch.zeros(draws, dtype=torch.long, device=like.device)
        self.ess: list[Tensor] = []

    def weigh(self, log_factor: Tensor) -> None:
        """Multiplies the weights by factors, ``(draws * particles,)``.

        A factor that is no number is 0. A run without weight has the evidence 0, and goes on with
        equal weights.
        """
        factor = torch.where(log_factor.isfinite(), log_factor, -math.inf).reshape(self.shape)
        weights = self.log_weights + factor
        total = weights.logsumexp(1)
        lost = total == -math.inf
        self.log_evidence = self.log_evidence + total
        equal = -math.log(self.shape[1])
        weights = torch.where(lost[:, None], equal, weights - total[:, None])
        # Once more, since large factors leave few digits.
        self.log_weights = weights = weights.log_softmax(1)
        self.ess.append(ess(weights))

    def select(self, places: Tensor, threshold: float) -> Tensor:
        """Indices ``(draws * particles,)`` of the particles that go on.

        Runs whose effective sample size is below ``threshold`` of their particles are chosen anew
        at the ``places``, and have equal weights then; the others go on as they are.
        """
        draws, count = self.shape
        anew = (self.ess[-1] < threshold * count)[:, None]
        same = torch.arange(count, device=places.device)
        index = torch.where(anew, chosen(self.log_weights, places), same)
        self.log_weights = torch.where(anew, -math.log(count), self.log_weights)
        self.resampled = self.resampled + anew[:, 0]
        runs = torch.arange(draws, device=places.device)[:, None]
        return (index + runs * count).flatten()


@dataclass(frozen=True, eq=False)
class Particles:
    """Runs of weighted particles, and how they were obtained.

    Args:
        x: the particles, ``(draws, particles, *shape)``, in model range.
        log_weights: normalised in each run, ``(draws, particles)``.
        log_evidence: estimates of ``log p(y)`` in nats, ``(draws,)``: ``exp`` of one has the mean
            ``p(y)`` of the chain of this many steps, whatever the number of particles.
        ess: effective sample sizes after each weighing, ``(steps + 1, draws)``.
        resampled: times that each run was resampled, ``(draws,)``.
        nfe: evaluations of the score for each particle.
        cost: what these asked of networks.
        seconds: wall-clock time.
        converged: whether all runs have ended with finite particles and weights.
        message: if not, what happened.
        solver: name and options of the method.
        grid: name and fields of the grid.
        steps: kernels from ``t_start`` to the data.
        seed: of all noise.
        start_index: of the first run.
        t_start: time of the prior.
        t_end: time from which the last kernel leads to the data.
        weights: ``"ema"`` or ``"raw"`` for a network, None for other scores.
    """

    x: Tensor
    log_weights: Tensor
    log_evidence: Tensor
    ess: Tensor
    resampled: Tensor
    nfe: int
    cost: Cost
    seconds: float
    converged: bool
    message: str
    solver: dict[str, Any]
    grid: dict[str, Any]
    steps: int
    seed: int
    start_index: int
    t_start: float
    t_end: float
    weights: str | None = None

    def sample(self, count: int = 1) -> Tensor:
        """Equally weighted samples, ``count`` of each run in turn, ``(draws * count, *shape)``.

        Those of one run come from the same particles: they are not independent of each other,
        and with more of them than its effective sample size some are the same.
        """
        draws = len(self.x)
        noise = KeyedNoise(step_seed(self.seed, 0, STREAM), self.start_index)
        noise.draw = LAST
        u = noise.uniform((draws, 1), self.x.device, torch.float64)
        index = chosen(self.log_weights, systematic(u, count))
        runs = torch.arange(draws, device=self.x.device)[:, None]
        return self.x[runs, index].flatten(0, 1)

    @property
    def log_evidence_of_all(self) -> float:
        """The estimate of all runs together: the log of their mean evidence."""
        return float(self.log_evidence.logsumexp(0)) - math.log(len(self.log_evidence))


def lost_message(lost: Tensor, start: int) -> str:
    """Which runs have failed."""
    if not bool(lost.any()):
        return ""
    runs = ", ".join(str(start + int(i)) for i in lost.nonzero()[:5, 0])
    more = ", ..." if int(lost.sum()) > 5 else ""
    return (
        f"{int(lost.sum())} of {len(lost)} runs lost all weight ({runs}{more}): the likelihood or "
        "the twist is 0 or no number wherever their particles are"
    )
