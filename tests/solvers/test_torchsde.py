"""The torchsde adapter: its steps, its noise, and how often it repeats."""

from itertools import pairwise

import pytest
import torch

import scoresde as sd
from scoresde import grids, solvers
from scoresde.noise import KeyedNoise
from scoresde.solvers.sde_torch import _METHODS

STEPS = 200


def setting(n=4000, steps=STEPS):
    sde = sd.VP()
    mean = torch.tensor([[0.5, -0.3]], dtype=torch.float64)
    score = sd.GaussianMixture([1.0], mean, torch.tensor([[0.4, 0.8]])).score(sde)
    times = grids.LogSNR()(sde, steps, 1.0, 1e-3)
    return score, KeyedNoise(9).normal((n, 2), dtype=torch.float64), times


def test_euler_on_the_path_of_torchsde_is_euler_maruyama():
    score, x, times = setting(5, 20)
    solver, reverse = solvers.TorchSDE(), score.sde.reverse(score)
    path = solver.init(reverse, x, times, KeyedNoise(1))
    for t, s in pairwise(times):
        found, _ = solver.step(reverse, x, t, s, None, path)
        expected = x + (s - t) * reverse.drift(x, t) + reverse.diffusion(t) * path(-t, -s)
        torch.testing.assert_close(found, expected)
        x = found


@pytest.mark.parametrize("method", list(_METHODS))
def test_moments_and_cost(method):
    score, x, times = setting()
    solver = solvers.TorchSDE(method)
    reverse = solver.reverse(score)
    out = solver.integrate(reverse, x, times, KeyedNoise(1))
    assert out.converged
    assert reverse.nfe == STEPS * solver.nfe_per_step
    z = (out.x - torch.tensor([0.5, -0.3])) / torch.tensor([0.4, 0.8])
    assert z.mean(0).abs().max() < 0.08
    assert (torch.cov(z.T) - torch.eye(2)).abs().max() < 0.12


def test_noise_repeats_with_seed_and_start():
    score, x, times = setting(5, 20)
    solver = solvers.TorchSDE()

    def run(*key):
        return solver.integrate(solver.reverse(score), x, times, KeyedNoise(*key)).x

    assert torch.equal(run(1), run(1))
    assert not torch.isclose(run(1), run(2)).any()
    assert not torch.isclose(run(1), run(1, 5)).any()  # the next batch of a series
    seeded = [torch.Generator().manual_seed(3) for _ in range(2)]
    a, b = (solver.integrate(solver.reverse(score), x, times, g).x for g in seeded)
    assert torch.equal(a, b)
