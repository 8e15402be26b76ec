"""What the adaptive methods of other libraries step in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Clock:
    """What a method steps in: t, or the log-SNR where the rate of the process jumps in t."""

    def __init__(self, sde: Any, times: Tensor) -> None:
        self.sde, self.low, self.high = sde, float(times.min()), float(times.max())
        self.is_t = not sde.rate_jumps or self.low == 0  # where the log-SNR is infinite
        self.ends = times[[0, -1]] if self.is_t else sde.log_snr(times[[0, -1]])

    def time(self, u: Tensor) -> Tensor:
        """The time, exact at the ends; rounded, ``u`` may leave the interval."""
        if self.is_t:
            return u.clamp(self.low, self.high)
        t, ends = self.sde.time(u).clamp(self.low, self.high), self.ends.to(u)
        return torch.where(u <= ends.min(), self.high, torch.where(u >= ends.max(), self.low, t))

    def rate(self, t: Tensor) -> float | Tensor:
        """``dt/du``."""
        return 1.0 if self.is_t else -2 * (self.sde.sigma(t) / self.sde.diffusion(t)) ** 2
