"""Averages of the weights over training, by the profile with which they remember it.

An average follows the parameters theta_n after the n-th step,

    average_n = average_{n-1} + w_n (theta_n - average_{n-1}),

and its profile gives the share w_n of the newest ones: a warmed-up decay, a half-life in items, or
a power of the training time, whose width grows with the run. Buffers are copied, never averaged.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..config import ConfigError

LONGEST = 12**-0.5
"""Relative length of the plain mean over all of training, which no power function exceeds."""


class Profile(Protocol):
    """How much an average takes of the newest parameters."""

    @property
    def name(self) -> str:
        """The name of the average, and of its files."""

    def weight(self, n: int, batch: int) -> float:
        """Share of the newest parameters at the n-th update (n = 1, 2, ...), in (0, 1]."""


@dataclass(frozen=True)
class Warm:
    r"""A decay that is warmed up: early on the average forgets the untrained start quickly.

        w_n = 1 - min(decay, (1 + n)/(10 + n))

    Args:
        decay: share of the average that stays, in the long run, in [0, 1).
    """

    decay: float

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError(f"the EMA needs a decay in [0, 1), got {self.decay}")

    @property
    def name(self) -> str:
        """``ema``: the main average of a run."""
        return "ema"

    def weight(self, n: int, batch: int) -> float:
        """Share of the newest parameters at the n-th update."""
        return 1 - min(self.decay, (1 + n) / (10 + n))


@dataclass(frozen=True)
class HalfLife:
    r"""A half-life in items, the same for any batch, that grows with the run at its start.

        w_n = 1 - 2^(-batch / h_n),   h_n = min(items, ramp n batch)

    Args:
        items: items after which half of the average is replaced.
        ramp: half-life as a share of the items so far, until ``items`` is reached; None for the
            same half-life from the start, which remembers the untrained network for long.

    Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al.,
    2022), https://arxiv.org/abs/2206.00364
    """

    items: float
    ramp: float | None = 0.05

    def __post_init__(self) -> None:
        if not (self.items > 0 and math.isfinite(self.items)):
            raise ConfigError(f"a half-life must be positive, got {self.items} items")
        if self.ramp is not None and not self.ramp > 0:
            raise ConfigError(f"the ramp of a half-life must be positive, got {self.ramp}")

    @property
    def name(self) -> str:
        """Such as ``ema-halflife-500000``."""
        return f"ema-halflife-{_digits(self.items)}"

    def weight(self, n: int, batch: int) -> float:
        """Share of the newest parameters at the n-th update."""
        ramped = math.inf if self.ramp is None else self.ramp * n * batch
        return -math.expm1(-math.log(2) * batch / min(self.items, ramped))


@dataclass(frozen=True)
class PowerFunction:
    r"""A power of the training time: the average keeps its shape, and widens with the run.

        p_n(tau) = (g + 1) tau^g / n^(g+1) on [0, n],   w_n = 1 - (1 - 1/n)^(g+1)

    is its exact profile for parameters that are constant between steps; its standard deviation is
    ``length n``, and the untrained start has no share in it:

        length^2 = (g + 1) / ((g + 2)^2 (g + 3))

    Args:
        length: standard deviation of the profile relative to the length of the run, in
            (0, 1/sqrt(12) = 0.2887), the upper end being the plain mean, g = 0.

    Source: Analyzing and Improving the Training Dynamics of Diffusion Models (Karras et al.,
    2024), https://arxiv.org/abs/2312.02696
    """

    length: float

    def __post_init__(self) -> None:
        if not 0 < self.length < LONGEST:
            raise ConfigError(
                f"the length of an average lies between 0 and {LONGEST:.4f}, got {self.length}"
            )

    @property
    def name(self) -> str:
        """Such as ``ema-length-0.05``."""
        return f"ema-length-{_digits(self.length)}"

    @cached_property
    def power(self) -> float:
        """The exponent ``g > 0`` of the profile: ``m = g + 2`` solves a cubic."""
        import numpy as np

        square = self.length**2
        # l^2 m^2 (m + 1) = m - 1 has a negative root, one in (1, 2) and, for g > 0, one above 2.
        return float(np.roots([square, square, -1.0, 1.0]).real.max()) - 2

    def weight(self, n: int, batch: int) -> float:
        """Share of the newest parameters at the n-th update: all at the first."""
        return 1.0 if n == 1 else -math.expm1((self.power + 1) * math.log1p(-1 / n))


class EMA:
    """Average of a network's parameters; buffers are copied, never averaged.

    The parameters are looked up where they lie at each update, and of sharded ones (FSDP2) each
    process averages its own part: make the average first, then shard ``net`` and ``ema.net``
    alike. Nothing waits for the device. After a step that was skipped the parameters are those
    of before, and an update with them is as good as any.

    Args:
        net: the network to follow.
        profile: how the average remembers; a number is the ``decay`` of :class:`Warm`.
        decay: the same, by its name.
    """

    def __init__(
        self, net: nn.Module, profile: Profile | float | None = None, *, decay: float | None = None
    ) -> None:
        if (profile is None) == (decay is None):
            raise TypeError("an EMA takes either a profile or a decay")
        given = decay if profile is None else profile
        self.profile: Profile = Warm(given) if isinstance(given, (int, float)) else given  # type: ignore[assignment]
        self.source = net
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self._parameters = self._places("_parameters", [n for n, _ in net.named_parameters()])
        self._buffers = self._places("_buffers", [n for n, _ in net.named_buffers()])

    @property
    def name(self) -> str:
        """The name of the average, and of its files."""
        return self.profile.name

    @torch.no_grad()
    def update(self, n: int, batch: int = 1) -> None:
        """Takes the parameters after the n-th step into the average.

        Args:
            n: steps done, 1, 2, ...
            batch: items a step, over all processes; a :class:`HalfLife` counts them.
        """
        for module in self.net.modules() if hasattr(self.net, "reshard") else ():
            reshard = getattr(module, "reshard", None)
            if reshard is not None:  # FSDP2 leaves a network whole after its evaluation
                reshard()
        torch._foreach_lerp_(*_tensors(self._parameters), self.profile.weight(n, batch))
        if self._buffers:
            torch._foreach_copy_(*_tensors(self._buffers))

    def _places(self, kind: str, names: Sequence[str]) -> list[Place]:
        """Where the tensors of those names lie, of the average and of the network."""
        found = []
        for name in names:
            owner, _, key = name.rpartition(".")
            modules = self.net.get_submodule(owner), self.source.get_submodule(owner)
            found.append((getattr(modules[0], kind), getattr(modules[1], kind), key))
        return found


Place = tuple[dict[str, Any], dict[str, Any], str]


def _tensors(places: Sequence[Place]) -> tuple[list[Tensor], list[Tensor]]:
    """What lies there now; of a sharded tensor this process's part."""
    averages = [_local(average[key]) for average, _, key in places]
    return averages, [_local(source[key]) for _, source, key in places]


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor (a DTensor), or the tensor."""
    part: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def averages(
    net: nn.Module, ema: float, half_lives: Sequence[float] = (), lengths: Sequence[float] = ()
) -> list[EMA]:
    """The averages that a configuration asks for, the first being the main one, ``ema``.

    Args:
        net: the network to follow.
        ema: decay of the main average.
        half_lives: half-lives of further ones, in items.
        lengths: relative lengths of further ones.

    Raises:
        ConfigError: for a value that makes no profile, or one that is there twice.
    """
    profiles: list[Profile] = [Warm(ema)]
    profiles += [HalfLife(items) for items in half_lives]
    profiles += [PowerFunction(length) for length in lengths]
    names = [profile.name for profile in profiles]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"training names the average {name} twice")
    return [EMA(net, profile) for profile in profiles]


def _digits(value: float) -> str:
    """A number as short as it can be said exactly, without an exponent where it is whole."""
    return str(int(value)) if value == int(value) else repr(float(value))
