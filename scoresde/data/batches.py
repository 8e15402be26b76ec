"""Which items a step trains on: a pure function of the seed and the step."""

from __future__ import annotations

import torch
from torch import Tensor

from scoresde.noise import step_seed


class Batches:
    """Endless shuffled passes over ``n`` items, cut into batches.

    Each pass is a fresh permutation; a batch may end one pass and begin the next. Nothing but
    ``(seed, step)`` decides the indices, so that a resumed run continues as if never stopped.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self._passes: dict[int, Tensor] = {}

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._passes:
            # Only the newest two are needed: steps advance.
            self._passes = {k: v for k, v in self._passes.items() if k >= epoch - 1}
            generator = torch.Generator().manual_seed(step_seed(self.seed, epoch, stream=1))
            self._passes[epoch] = torch.randperm(self.n, generator=generator)
        return self._passes[epoch]

    def indices(self, step: int) -> Tensor:
        """Indices of the batch of the given step (from 0), ``(batch_size,)``."""
        start, parts, left = step * self.batch_size, [], self.batch_size
        while left:
            epoch, offset = divmod(start, self.n)
            part = self._permutation(epoch)[offset : offset + left]
            parts.append(part)
            start, left = start + len(part), left - len(part)
        return torch.cat(parts)
