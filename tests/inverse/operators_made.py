"""Small operators of every kind, with their names."""

from __future__ import annotations

import torch

from scoresde.inverse import operators as room
from scoresde.inverse.operator import Operator


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def made() -> dict[str, Operator]:
    r = _random
    return {
        "linear wide": room.Linear(r(5, 12)),
        "linear tall": room.Linear(r(12, 5)),
        "linear square": room.Linear(r(6, 6), (2, 3)),
        "linear of low rank": room.Linear(r(6, 2) @ r(2, 12, seed=1), (3, 2, 2)),
        "linear of low rank, tall": room.Linear(r(9, 2) @ r(2, 4, seed=1)),
        "linear with a zero row": room.Linear(torch.cat([torch.zeros(1, 7).double(), r(3, 7)])),
        "mask": room.Mask(r(2, 3, 4) > 0),
        "mask of places": room.Mask(r(1, 3, 4) > 0, (2, 3, 4)),
        "grayscale": room.Grayscale((3, 2, 3)),
        "grayscale equal": room.Grayscale((4, 5), "equal"),
        "channels": room.Channels((3, 2, 2), r(4, 3)),
        "channels of low rank": room.Channels((3, 2), r(4, 1) @ r(1, 3, seed=1)),
        "pool 1-D": room.AveragePool((2, 6), 3),
        "pool 2-D": room.AveragePool((2, 4, 6), 2),
        "pool 3-D": room.AveragePool((1, 4, 2, 2), 2),
        "pool of a vector": room.AveragePool((12,), 4),
        "bicubic 1-D": room.Bicubic((2, 16), 4, -0.75),
        "bicubic 2-D": room.Bicubic((1, 6, 8), 2),
        "blur 1-D": room.Blur((2, 7), 0.7, "zeros"),
        "blur 2-D": room.Blur((2, 5, 4), 0.6),
        "blur 3-D": room.Blur((1, 3, 4, 3), 0.5, "circular"),
        "fourier": room.Fourier(r(1, 4, 5) > 0, (2, 4, 5)),
        "fourier lines": room.FourierLines((1, 4, 12), 2.0),
        "convolution 1-D": room.Convolution((2, 7), r(4)),
        "convolution 2-D": room.Convolution((2, 4, 5), r(3, 2)),
        "convolution 3-D": room.Convolution((1, 3, 4, 2), r(2, 3, 1)),
        "convolution, singular": room.Convolution((2, 6), torch.ones(3) / 3),
        "motion blur": room.MotionBlur((1, 6, 7), 3.0, 30.0),
        "projection": room.RandomProjection((2, 3, 4), 5),
        "projection, gaussian": room.RandomProjection((6,), 9, orthonormal=False),
        "strokes": room.Strokes((2, 8, 8), strokes=1),
    }
