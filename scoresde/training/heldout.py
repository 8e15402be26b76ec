"""How the averaged weights do on held-out items, at the same times and noise at every call."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..data.dataset import spread
from ..noise import step_seed
from .job import Job
from .learner import Learner
from .objective import DSM

BINS = 8
"""Bins of log-SNR, in which errors and losses are told apart."""


class Heldout:
    """The held-out items of a run, seen through its averaged weights.

    Args:
        job: the run, with its data.
        learner: what it trains.
        limit: at most so many items are looked at.
    """

    def __init__(self, job: Job, learner: Learner, limit: int = 512) -> None:
        self.job = job
        self.learner = learner
        self.items = spread(len(job.heldout), limit)  # they may lie class by class
        self.objective = replace(job.objective, drop=0.0)  # what they are given is not taken away

    def _generator(self, stream: int) -> torch.Generator:
        seed = step_seed(self.job.training.seed, 0, stream)
        return torch.Generator(self.job.device).manual_seed(seed)

    def _prepared(
        self, index: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = self.job.heldout.x, self.job.heldout.y
        labels = None if y is None else y[index]
        x0, cond = self.learner.prepared(x[index], labels, generator)
        return x0, cond | self.learner.given(x0, generator)

    @torch.no_grad()
    def loss(self) -> float:
        """The objective on held-out items, a dimension."""
        job, generator, losses = self.job, self._generator(4), []
        for part in self.items.split(job.training.batch_size):
            x0, cond = self._prepared(part, generator)
            losses.append(self.objective(self.learner.averaged, x0, generator=generator, **cond))
        return float(torch.cat(losses).mean()) / job.dims

    @torch.no_grad()
    def errors(self) -> list[float]:
        """Mean of ``|eps_hat - eps|^2 / D`` in equal bins of log-SNR, from high to low."""
        sde, n, generator = self.job.model.sde, len(self.items), self._generator(3)
        start, end = sde.log_snr(sde.t_min), sde.log_snr(sde.t_max)
        u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        times = sde.time(start + u * (end - start))
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        errors = torch.empty(n, dtype=torch.float64)
        simple = DSM(weight="simple")
        for part in torch.arange(n).split(self.job.training.batch_size):
            x0, cond = self._prepared(self.items[order[part]], generator)
            loss = simple(self.learner.averaged, x0, t=times[part], generator=generator, **cond)
            errors[part] = loss.cpu().double() / x0[0].numel()
        return [float(b.mean()) for b in errors.chunk(BINS)]
