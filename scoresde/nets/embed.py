"""Embeddings of the noise level, and of values finer than a network's kernel resolves."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..config import unknown


class Features(nn.Module):
    """Base of features whose frequencies stay in float32 when the network goes to half precision.

    Half precision would turn a step of 1000, or a wide random frequency, by whole radians.
    """

    frequencies: Tensor

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = self.frequencies
        super()._apply(fn, recurse)
        if self.frequencies.dtype in (torch.bfloat16, torch.float16):
            self.frequencies = kept.to(self.frequencies.device)
        return self


class Waves(Features):
    """``[cos(w_k c), sin(w_k c)]``, ``w_k`` geometric from 1/2 to 8; for ``c`` in [-2, 2]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        even(width)
        powers = torch.linspace(math.log(0.5), math.log(8.0), width // 2)
        self.register_buffer("frequencies", powers.exp(), persistent=False)

    def forward(self, c_noise: Tensor) -> Tensor:
        """``(B,)`` to ``(B, width)``, in the precision of ``c_noise``."""
        angle = c_noise[:, None] * self.frequencies.to(c_noise.dtype)
        return torch.cat([angle.cos(), angle.sin()], 1)


class NoiseEmbedding(nn.Module):
    r"""Sines and cosines of ``c_noise``, followed by a two-layer perceptron.

        [cos(w_k c_noise), sin(w_k c_noise)],   w_k geometric from 1/2 to 8

    ``c_noise = -log_snr/4`` spans about [-2, 2], so that the slowest wave is nearly linear in it
    and the fastest turns once in 3 units of log-SNR. Faster waves are not needed, since the score
    is smooth in it, and make the network rough along a trajectory: adaptive solvers pay for that.
    """

    def __init__(self, dim: int, waves: int = 32) -> None:
        super().__init__()
        self.waves = Waves(2 * waves)
        self.mlp = nn.Sequential(nn.Linear(2 * waves, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, c_noise: Tensor) -> Tensor:
        """``(B,)`` to ``(B, dim)``; the waves are computed in the precision of ``c_noise``."""
        return self.mlp(self.waves(c_noise).to(next(self.mlp.parameters()).dtype))


class Positional(Features):
    """Sines and cosines of a label of about 0 to 1000, a step of a discrete chain.

        w_k = 10000^(-k / (width/2 - shift)),   [sin(w_k c), cos(w_k c)] or the cosines first

    Args:
        width: number of features; an odd one ends in a zero.
        shift: 1 in the networks of Ho et al. and Song et al., 0 in ADM.
        cos_first: whether the cosines come first, as in ADM.

    Source: Attention Is All You Need (Vaswani et al., 2017), https://arxiv.org/abs/1706.03762.
    """

    def __init__(self, width: int, shift: float = 1.0, cos_first: bool = False) -> None:
        super().__init__()
        half = width // 2
        if not half > shift:
            raise ValueError(f"the noise label needs more features than {width}")
        powers = torch.arange(half, dtype=torch.float32) * (-math.log(10000.0) / (half - shift))
        self.register_buffer("frequencies", powers.exp(), persistent=False)
        self.odd, self.cos_first = width % 2, cos_first

    def forward(self, c_noise: Tensor) -> Tensor:
        """``(B,)`` to ``(B, width)``, in the precision of ``c_noise``."""
        angle = c_noise[:, None] * self.frequencies.to(c_noise.dtype)
        waves = [angle.cos(), angle.sin()] if self.cos_first else [angle.sin(), angle.cos()]
        return functional.pad(torch.cat(waves, 1), (0, self.odd))


class Fourier(Features):
    """Random Fourier features ``[sin(2 pi w_k c), cos(2 pi w_k c)]``, ``w_k ~ N(0, scale^2)``.

    Args:
        width: number of features, even.
        scale: standard deviation of the frequencies.
        log: whether ``c`` is the logarithm of the label, which then is a noise level.

    Source: Fourier Features Let Networks Learn High Frequency Functions in Low Dimensional
    Domains (Tancik et al., 2020), https://arxiv.org/abs/2006.10739.
    """

    def __init__(self, width: int, scale: float = 16.0, log: bool = False) -> None:
        super().__init__()
        even(width)
        self.log = log
        self.register_buffer("frequencies", torch.randn(width // 2) * scale)

    def forward(self, c_noise: Tensor) -> Tensor:
        """``(B,)`` to ``(B, width)``, in the precision of ``c_noise``."""
        w = self.frequencies.to(c_noise.dtype)
        if self.log:
            # Angles are large: the order of the products, that of the published code of each
            # kind, shows in the fifth digit.
            angle = c_noise.log()[:, None] * w * 2 * math.pi
        else:
            angle = c_noise[:, None] * (2 * math.pi * w)
        return torch.cat([angle.sin(), angle.cos()], 1)


def even(width: int) -> None:
    """Refuses a number of features that are no pairs of sine and cosine."""
    if width < 2 or width % 2:
        raise ValueError(f"features of the noise label come in pairs: {width} is not even")


def noise_features(kind: str, width: int, scale: float = 16.0) -> nn.Module:
    """``"waves"`` of log-SNR, ``"positional"`` of a step, ``"fourier"``, ``"log-fourier"``."""
    if kind == "waves":
        return Waves(width)
    if kind == "positional":
        return Positional(width)
    if kind in ("fourier", "log-fourier"):
        return Fourier(width, scale, log=kind == "log-fourier")
    raise unknown("embedding", kind, ("waves", "positional", "fourier", "log-fourier"))


def class_rows(y: Tensor, num_classes: int) -> Tensor:
    """Indices ``(B,)`` as one-hot rows ``(B, num_classes)``; rows stay what they are.

    Index ``num_classes`` is no class, a row of zeros, as in :class:`ClassEmbedding`.
    """
    if y.ndim > 1:
        return y
    return functional.one_hot(y.long(), num_classes + 1)[:, :num_classes]


class ClassEmbedding(nn.Embedding):
    """Vectors of ``num_classes`` classes; class ``num_classes`` means "no condition"."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__(num_classes + 1, dim)
        self.num_classes = num_classes

    def forward(self, y: Tensor | None, batch: int = 1) -> Tensor:
        """Indices ``(B,)``, one-hot rows ``(B, num_classes)`` or None, to ``(B, dim)``."""
        if y is None:
            return self.weight[-1].expand(batch, -1)
        if y.ndim == 2:
            return y.to(self.weight.dtype) @ self.weight[: self.num_classes]
        return super().forward(y.long())


def fourier_features(x: Tensor, noise: Tensor, powers: tuple[int, ...]) -> Tensor:
    """``x`` with channels of waves appended on axis 1, each as strong as the noise leaves it.

        exp(-(w noise)^2/2) sin(w x),  exp(-(w noise)^2/2) cos(w x),    w = 2^n pi

    They let a convolution see single grey levels, which the likelihood of quantised data needs.
    The factor is what is left of a wave on average, ``E[exp(i w (x_0 + noise eps))] =
    exp(i w x_0 - (w noise)^2/2)``. Without it, waves shorter than the noise carry nothing, and
    turn so fast along a trajectory that adaptive solvers take several times the steps.

    Args:
        x: items, ``(B, C, *spatial)``.
        noise: standard deviation of the noise in them, about, ``(B,)``.
        powers: the n.

    Source, but for the factor: Variational Diffusion Models (Kingma et al., 2021),
    https://arxiv.org/abs/2107.00630.
    """
    if not powers:
        return x
    noise = noise.reshape(-1, *(1,) * (x.ndim - 1))
    waves = []
    for n in powers:
        w = 2**n * math.pi
        left = torch.exp(-((w * noise) ** 2) / 2).to(x.dtype)
        waves += [left * torch.sin(w * x), left * torch.cos(w * x)]
    return torch.cat([x, *waves], 1)
