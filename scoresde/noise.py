r"""Gaussian noise keyed by (seed, sample, draw): a sample never depends on its batch.

A counter-based generator, Philox4x32-10, maps the counter ``(block, draw, sample)`` under the key
``seed`` to four 32-bit words; Box-Muller turns them into normals. It is evaluated by tensor
operations on the device of the state, without a stream that devices or batches would share: the
same seed gives the same noise in any batch, in any order and on any device.

Source: Parallel Random Numbers: As Easy as 1, 2, 3 (Salmon et al., 2011),
https://doi.org/10.1145/2063384.2063405.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

from .precision import widest

_MASK = 0xFFFFFFFF


def step_seed(seed: int, step: int, stream: int = 0) -> int:
    """A 63-bit seed for a step of a stream; splitmix64 keeps neighbours unrelated."""
    mask = (1 << 64) - 1
    z = (
        seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + stream * 0x8CB92BA72F3D8DD7
    ) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of four broadcastable int64 counters (32 bits each): four 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps modulo 2^64, as wanted
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def words(seed: int, sample: Tensor, draw: Tensor, count: int) -> Tensor:
    """``count`` words of 32 bits, a multiple of 4, for broadcastable samples and draws.

    Args:
        seed: its low 64 bits are the key.
        sample: indices, int64, ``(..., 1)``.
        draw: numbers below 2^32, int64, ``(..., 1)``.
        count: length of the last axis of the result.
    """
    block = torch.arange(count // 4, device=draw.device)
    key = (seed & _MASK, (seed >> 32) & _MASK)
    out = philox((block, draw, sample & _MASK, sample >> 32), key)
    return torch.stack(torch.broadcast_tensors(*out), -1).flatten(-2)


def box_muller(bits: Tensor) -> Tensor:
    """Standard normals, float64, from words of 32 bits of the same shape ``(..., 2 n)``."""
    uniform = (bits.double() + 0.5) / 2**32
    half = bits.shape[-1] // 2
    radius = (-2 * uniform[..., :half].log()).sqrt()
    angle = 2 * math.pi * uniform[..., half:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()], -1)


def workplace(device: torch.device) -> torch.device:
    """Where normals for a device are made: there, or on the CPU if it has no float64."""
    return device if widest(device) == torch.float64 else torch.device("cpu")


class KeyedNoise:
    """Source of noise for the samples ``start, start + 1, ...`` of a seed.

    Each call is the next draw of every sample; sample ``i`` of draw ``n`` is a function of
    ``(seed, i, n)`` and of its shape alone.

    Args:
        seed: any integer; its low 64 bits are the key.
        start: index of the first sample of this batch.
    """

    def __init__(self, seed: int, start: int = 0) -> None:
        self.seed = seed
        self.start = start
        self.draw = 0

    def _words(self, batch: int, count: int, device: torch.device | None) -> Tensor:
        """``(batch, count)`` words of 32 bits of the next draw, ``count`` a multiple of 4."""
        draw = torch.full((1, 1), self.draw, device=device)
        self.draw += 1
        return words(self.seed, self._samples(batch, device)[:, None], draw, count)

    def _samples(self, batch: int, device: torch.device | None) -> Tensor:
        """Indices of the samples of this batch, ``(batch,)``."""
        return torch.arange(self.start, self.start + batch, device=device)

    def _dims(self, shape: tuple[int, ...]) -> tuple[int, int]:
        dims = math.prod(shape[1:])
        return dims, -(-dims // 4) * 4

    def normal(
        self,
        shape: tuple[int, ...],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Standard normal draws of ``shape = (B, ...)``."""
        device = torch.device(device or "cpu")
        dims, count = self._dims(shape)
        pair = box_muller(self._words(shape[0], count, workplace(device)))
        return pair[:, :dims].reshape(shape).to(device, dtype or torch.get_default_dtype())

    def uniform(
        self,
        shape: tuple[int, ...],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Uniform draws in [0, 1) of ``shape = (B, ...)``."""
        device = torch.device(device or "cpu")
        dims, count = self._dims(shape)
        words = self._words(shape[0], count, device)[:, :dims].reshape(shape)
        # 24 bits are exact in float32, so that 1.0 itself is never reached.
        return (words >> 8).to(dtype or torch.get_default_dtype()) / 2**24

    def rademacher(
        self,
        shape: tuple[int, ...],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Draws of -1 or 1 with equal probability, of ``shape = (B, ...)``."""
        device = torch.device(device or "cpu")
        dims, count = self._dims(shape)
        words = self._words(shape[0], count, device)[:, :dims].reshape(shape)
        return (1 - 2 * (words & 1)).to(dtype or torch.get_default_dtype())


NoiseSource: TypeAlias = "torch.Generator | KeyedNoise"


def normal(
    shape: tuple[int, ...],
    source: NoiseSource | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Standard normal draws from a keyed source, a torch generator, or torch's global one."""
    if isinstance(source, KeyedNoise):
        return source.normal(shape, device, dtype)
    # A generator draws on its own device, so that it works with any target.
    home = source.device if source is not None else device
    return torch.randn(shape, generator=source, device=home, dtype=dtype).to(device or home)


def uniform(
    shape: tuple[int, ...],
    source: NoiseSource | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Uniform draws in [0, 1), from where :func:`normal` has its own."""
    if isinstance(source, KeyedNoise):
        return source.uniform(shape, device, dtype)
    home = source.device if source is not None else device
    return torch.rand(shape, generator=source, device=home, dtype=dtype).to(device or home)
