"""The noise of one training step: a function of (seed, step, item), whoever draws it.

An item of the global batch gets the same noise on one process and on many, in one piece and in
micro-batches, so that all of these train alike. Items share a generator in blocks of ``BLOCK``:
seeding one for each item would cost more than the numbers, and one for the whole batch would make
every process draw all of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..noise import KeyedNoise, step_seed

BLOCK = 16


class StepNoise(KeyedNoise):
    """Draws for the items ``start, start + 1, ...`` of the global batch of a step.

    Each call is the next draw of every item. The numbers are those of the device's own generator.

    Args:
        seed: of the run.
        step: number of the step, from 0.
        start: index in the global batch of the first item drawn for.
        total: size of the global batch.
        device: where the numbers are made.
    """

    def __init__(
        self, seed: int, step: int, start: int, total: int, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(step_seed(seed, step, stream=2), start)
        self.total = total
        self.generator = torch.Generator(device)

    @property
    def device(self) -> torch.device:
        """Where the numbers are made."""
        return self.generator.device

    def shared(self) -> float:
        """One number in [0, 1) for the whole global batch."""
        self.draw += 1
        generator = torch.Generator().manual_seed(step_seed(self.seed, self.draw, stream=3))
        return float(torch.rand((), generator=generator, dtype=torch.float64))

    def normal(
        self,
        shape: tuple[int, ...],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Standard normal draws of ``shape = (B, ...)``."""
        return self._blocks(
            lambda out: out.normal_(generator=self.generator), shape, device, dtype
        )

    def uniform(
        self,
        shape: tuple[int, ...],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Uniform draws in [0, 1) of ``shape = (B, ...)``."""
        return self._blocks(
            lambda out: out.uniform_(generator=self.generator), shape, device, dtype
        )

    def _blocks(
        self,
        fill: Callable[[Tensor], object],
        shape: tuple[int, ...],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> Tensor:
        """Blocks of ``BLOCK`` items, filled one by one, of which the asked items are a slice."""
        first, last = self.start // BLOCK, -(-(self.start + shape[0]) // BLOCK)
        rows = torch.empty(
            (last - first) * BLOCK, *shape[1:], device=self.device,
            dtype=dtype or torch.get_default_dtype(),
        )  # fmt: skip
        self.draw += 1
        for block, part in enumerate(rows.split(BLOCK), first):
            self.generator.manual_seed(step_seed(self.seed, self.draw, stream=4 + block))
            fill(part)
        skip = self.start - first * BLOCK
        return rows[skip : skip + shape[0]].to(device or self.device)
