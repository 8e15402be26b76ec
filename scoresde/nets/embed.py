"""Embeddings of the noise level, and of values finer than a network's kernel resolves."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class NoiseEmbedding(nn.Module):
    r"""Sines and cosines of ``c_noise``, followed by a two-layer perceptron.

        [cos(w_k c_noise), sin(w_k c_noise)],   w_k geometric from 1/2 to 8

    ``c_noise = -log_snr/4`` spans about [-2, 2], so that the slowest wave is nearly linear in it
    and the fastest turns once in 3 units of log-SNR. Faster waves are not needed, since the score
    is smooth in it, and make the network rough along a trajectory: adaptive solvers pay for that.
    """

    frequencies: Tensor

    def __init__(self, dim: int, waves: int = 32) -> None:
        super().__init__()
        powers = torch.linspace(math.log(0.5), math.log(8.0), waves)
        self.register_buffer("frequencies", powers.exp(), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * waves, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, c_noise: Tensor) -> Tensor:
        """``(B,)`` to ``(B, dim)``; the waves are computed in the precision of ``c_noise``."""
        angle = c_noise[:, None] * self.frequencies.to(c_noise.dtype)
        waves = torch.cat([angle.cos(), angle.sin()], 1)
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))


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
        return super().forward(y)


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
