"""Random weights of a foreign network, drawn while its transcription runs for the first time."""

import math

import torch
from torch.nn import functional as F


class Tape(dict):
    """Tensors by foreign key; one that is taken first is drawn, so that the order is the wiring's.

    Weights have the variance 1/fan-in and norms are near the identity, so outputs are of order 1.
    """

    def __init__(self, seed=0):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def take(self, key, *shape, mean=0.0, std=None):
        if key not in self:
            if std is None:
                std = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.2
            self[key] = mean + std * torch.randn(shape, generator=self.generator)
        assert self[key].shape == shape, f"{key} is taken twice, in two shapes"
        return self[key]

    def keep(self, key, tensor):
        """A constant of the original that it stores as a buffer."""
        return self.setdefault(key, tensor)

    def affine(self, key, *shape):
        return self.take(f"{key}.weight", *shape), self.take(f"{key}.bias", shape[0])

    def conv(self, key, x, out, size=3, **options):
        options.setdefault("padding", size // 2)
        return F.conv2d(x, *self.affine(key, out, x.shape[1], size, size), **options)

    def linear(self, key, x, out):
        return F.linear(x, *self.affine(key, out, x.shape[1]))

    def norm(self, key, x, groups, eps):
        weight = self.take(f"{key}.weight", x.shape[1], mean=1.0)
        return F.group_norm(x, groups, weight, self.take(f"{key}.bias", x.shape[1]), eps)


def sinusoids(label, width):
    """[sin, cos] of label * 10000^(-i/(h - 1)), i < h = width/2."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half) * (-math.log(10000) / (half - 1)))
    angle = label.float()[:, None] * frequencies[None]
    return F.pad(torch.cat([angle.sin(), angle.cos()], 1), (0, width % 2))


def distance(found, expected):
    """The largest difference, relative to the largest value."""
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
