"""Exponential moving average of the weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    r"""Average of a network's parameters; buffers are copied, never averaged.

        average <- d average + (1 - d) parameter,   d = min(decay, (1 + n)/(10 + n))

    at the n-th update: early on the average forgets the untrained start quickly.

    Args:
        net: the network to follow.
        decay: limit of ``d``, in [0, 1).
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the EMA needs a decay in [0, 1), got {decay}")
        self.decay = decay
        self.source = net
        self.net = copy.deepcopy(net).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, n: int) -> None:
        """Takes the parameters after the n-th step (n >= 1) into the average."""
        d = min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(
            list(self.net.parameters()), [p.detach() for p in self.source.parameters()], 1 - d
        )
        for copied, buffer in zip(self.net.buffers(), self.source.buffers(), strict=True):
            copied.copy_(buffer)
