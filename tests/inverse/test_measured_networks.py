"""Scores of networks led by a measurement: moves that are held, and second derivatives."""

import math

import pytest
import torch
from torch import nn

import scoresde as sd
from scoresde.inverse.linear import Linear
from scoresde.inverse.mask import Mask
from scoresde.inverse.mmps import MMPS
from scoresde.inverse.pgdm import PGDM
from scoresde.model import Score


def test_attention_has_the_second_derivatives_of_a_likelihood():
    net = sd.nets.UNet((1, 4, 4), width=8, multipliers=(1,), blocks=1, attention=(4,))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    score = sd.ScoreModel(net, sd.VP(), sd.V())
    led = PGDM(score, Mask(torch.eye(4)[None]), torch.ones(1, 1, 4, 4), 0.1)
    x = torch.randn(2, 1, 4, 4).requires_grad_()
    (product,) = torch.autograd.grad(led(x, 0.3).square().sum(), x)
    assert bool(product.isfinite().all())


def test_a_move_is_held_where_a_network_s_covariance_is_none():
    # A score whose denoised data hardly depend on the state: one step of conjugate gradients
    # would go a thousand times as far as what is left unknown.
    sde, flat = sd.VP(), 1e-6

    class Stubborn(nn.Module, Score):
        def __init__(self):
            super().__init__()
            self.sde, self.shape = sde, (4,)

        def forward(self, x, t):
            alpha, sigma = sde.alpha(torch.as_tensor(t)), sde.sigma(torch.as_tensor(t))
            spill = torch.tensor([1.0, 50.0, 0.0, 0.0], dtype=x.dtype)
            first = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=x.dtype)
            denoised = flat * (spill * x).sum(1, keepdim=True) * first
            return (alpha * denoised - x) / sigma**2

    operator = Linear(torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64))
    y, x = torch.tensor([[1.0]], dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
    for q in (0.1, 10.0):
        t = sde.time(-math.log(q))
        with torch.no_grad():
            moved = MMPS(Stubborn(), operator, y, 0.0).denoise(x, t) - Stubborn().denoise(x, t)
        most = 6 * 3 * q / math.hypot(3, q)
        assert float(moved.norm()) == pytest.approx(most, rel=1e-6)
