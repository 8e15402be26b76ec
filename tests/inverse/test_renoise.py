"""Steps that draw noise anew: DDIM at zeta 0, nothing kept but the denoised data at zeta 1."""

import pytest
import torch

import scoresde as sd
from scoresde.inverse.diffpir import DiffPIR
from scoresde.inverse.linear import Linear
from scoresde.inverse.renoise import Renoise
from scoresde.solvers import DDIM

f64 = torch.float64


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


@pytest.mark.parametrize("zeta", [0.0, 0.3, 1.0])
def test_step(sde, mixture, zeta):
    score = mixture.score(sde)
    t, s = torch.tensor(0.6, dtype=f64), torch.tensor(0.4, dtype=f64)
    x = draws(3, 2) * sde.sigma(t)
    moved, _ = Renoise(zeta).step(sde.reverse(score), x, t, s, torch.Generator().manual_seed(7))
    x0, z = score.denoise(x, t), draws(3, 2, seed=7)
    eps = (x - sde.alpha(t) * x0) / sde.sigma(t)
    mixed = (1 - zeta) ** 0.5 * eps + zeta**0.5 * z
    torch.testing.assert_close(moved, sde.alpha(s) * x0 + sde.sigma(s) * mixed)
    if zeta == 0:
        torch.testing.assert_close(moved, DDIM().step(sde.reverse(score, 0.0), x, t, s, None)[0])


def test_default_solver_of_diffpir_comes_closer():
    """Narrow modes on a ring: the exact posterior along what is not measured."""
    turns = torch.arange(8, dtype=f64) * torch.pi / 4
    ring = sd.GaussianMixture(
        [1.0] * 8, 1.3 * torch.stack([turns.cos(), turns.sin()], 1), [0.15] * 8
    )
    sde, a, y = sd.VP(), Linear([[1.0, 0.35]]), torch.tensor([[1.2325]], dtype=f64)
    across = torch.tensor([-0.33, 0.944], dtype=f64)
    wanted = ring.posterior(a, y, 0.1).sample(500, torch.Generator().manual_seed(0)) @ across
    led = DiffPIR(ring.score(sde), a, y, 0.1)
    error = []
    for solver in (led.default_solver, {"name": "ddim", "eta": 1.0}):
        x = sd.sample(led, (500, 2), solver=solver, steps=60, grid=led.default_grid).x @ across
        error.append((x.sort().values - wanted.sort().values).square().mean().sqrt())
    assert error[0] < 0.75 * error[1]


@pytest.mark.parametrize("zeta", [-0.1, 1.1, float("nan")])
def test_refuses_zeta(zeta):
    with pytest.raises(ValueError, match="zeta"):
        Renoise(zeta)
