"""The measurement that tests of particles share."""

import math

import torch
from torch import Tensor

import scoresde as sd
from scoresde.inverse.linear import Linear

f64 = torch.float64
MEANS = torch.tensor([[0.6, 1.0], [0.7, 0.0], [-1.0, -0.6]], dtype=f64)
MIXTURE = sd.GaussianMixture([0.5, 0.2, 0.3], MEANS, [0.2, 0.5, 0.3])
A = Linear(torch.tensor([[1.0, 0.3]], dtype=f64))
Y, NOISE = torch.tensor([[0.7]], dtype=f64), 0.2
VP = sd.VP()
SCORE = MIXTURE.score(VP)


def ratio(found, exact: Tensor) -> tuple[float, float]:
    """Mean of estimated over exact evidence, and its standard error."""
    off = (found.log_evidence - exact).exp()
    return float(off.mean()), float(off.std() / math.sqrt(len(off)))
