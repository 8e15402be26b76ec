"""Likelihoods in units of the data: through the scaler, dequantised, weighted, to a target."""

import math

import pytest
import torch

import scoresde as sd
from scoresde.data.scaler import Scaler
from scoresde.likelihood.dequantize import Uniform
from scoresde.likelihood.discrete import PILOT

f64 = torch.float64
LEVELS = 8


class Scaled:
    """A score with the scaler of its data."""

    def __init__(self, score, scaler):
        self.score, self.sde, self.scaler = score, score.sde, scaler

    def __call__(self, x, t, **cond):
        return self.score(x, t, **cond)


@pytest.fixture
def mixture():
    means = torch.tensor([[0.4, -0.3], [-0.5, 0.2]], dtype=f64)
    stds = torch.tensor([[0.15, 0.3], [0.25, 0.2]], dtype=f64)
    return sd.GaussianMixture([0.6, 0.4], means, stds)


@pytest.fixture
def model(mixture):
    return Scaled(mixture.score(sd.VP()), Scaler((LEVELS / 2,), (2 / LEVELS,), LEVELS))


@pytest.fixture
def levels():
    k = torch.stack(torch.meshgrid(*[torch.arange(LEVELS)] * 2, indexing="ij"), -1).reshape(-1, 2)
    return k[::5]


def masses(mixture, k):
    """``log P(k)`` of a mixture of independent normals."""
    normal = torch.distributions.Normal(mixture.means[None], mixture.stds[None])
    low, high = (2 * (k + u) / LEVELS - 1 for u in (0, 1))
    mass = normal.cdf(high[:, None].double()) - normal.cdf(low[:, None].double())
    return (mixture.weights * mass.prod(2)).sum(1).log()


def elbo(mixture, k, points=64):
    """``E_u log p(k + u)`` in units of the data, by quadrature."""
    u = (torch.arange(points, dtype=f64) + 0.5) / points
    u = torch.stack(torch.meshgrid(u, u, indexing="ij"), -1).reshape(-1, 2)
    x = 2 * (k[:, None] + u) / LEVELS - 1
    values = mixture.log_prob(x.reshape(-1, 2), sd.VP(), sd.VP().t_min_likelihood)
    return values.reshape(len(k), -1).mean(1) + 2 * math.log(2 / LEVELS)


def test_uniform_draws_bound_the_mass_by_their_own_mean(model, mixture, levels):
    out = sd.data_log_prob(model, levels, draws=200, divergence="exact", rtol=1e-4, atol=1e-4)
    truth = elbo(mixture, levels)
    z = (out.log_prob - truth) / out.stderr_dequantization
    assert z.abs().max() < 4.5
    assert z.square().mean() < 2
    assert (truth < masses(mixture, levels)).all()
    assert out.estimates.shape == (len(levels), 200)
    assert torch.allclose(out.log_prob, out.prior + out.delta + out.dequantization, atol=1e-5)
    assert out.dequantization == pytest.approx(out.log_det)
    assert out.log_det == pytest.approx(2 * math.log(2 / LEVELS))
    assert out.bits_per_dim == pytest.approx(-out.log_prob / (2 * math.log(2)))
    assert (out.levels, out.draws, out.dequantizer) == (LEVELS, 200, {"name": "uniform"})


def test_importance_weights_come_close_to_the_mass(model, mixture, levels):
    settings = {"draws": 200, "divergence": "exact", "rtol": 1e-4, "atol": 1e-4}
    out = sd.data_log_prob(model, levels, importance=True, **settings)
    truth = masses(mixture, levels)
    assert ((out.log_prob - truth).abs() < 4.5 * out.stderr_dequantization + 0.01).all()
    assert out.importance
    assert (out.log_prob > sd.data_log_prob(model, levels, **settings).log_prob).all()


def test_the_first_draw_is_that_of_the_scaler(model, levels):
    """One draw is the density of what the keyed uniform noise of the seed makes of the data."""
    source = sd.likelihood.discrete.KeyedNoise(3 ^ (1 << 40), 5)
    x = Uniform().draw(levels, model.scaler, model.sde, source).x
    alone = sd.log_prob(model, x, seed=3, start_index=5)
    out = sd.data_log_prob(model, levels, seed=3, start_index=5)
    assert torch.allclose(out.log_prob.float(), alone.log_prob + out.log_det)
    assert out.stderr.isnan().all()
    assert alone.log_det == out.log_det


def test_an_item_does_not_depend_on_its_batch(model, levels):
    settings = {"draws": 3, "probes": 2, "seed": 1, "divergence": "hutchinson"}
    whole = sd.data_log_prob(model, levels, **settings)
    for i in (0, 4):
        alone = sd.data_log_prob(model, levels[i : i + 1], start_index=i, **settings)
        assert torch.allclose(alone.estimates, whole.estimates[i : i + 1], atol=1e-5)


def test_continuous_data_is_taken_through_the_scaler(mixture):
    model = Scaled(mixture.score(sd.VP()), Scaler((3.0, 1.0), (0.5, 0.1)))
    data = torch.tensor([[3.2, -2.0], [2.1, 4.0]], dtype=f64)
    out = sd.data_log_prob(model, data, divergence="exact", rtol=1e-8, atol=1e-8)
    x = (data - torch.tensor([3.0, 1.0])) * torch.tensor([0.5, 0.1])
    truth = mixture.log_prob(x, sd.VP(), 1e-5) + math.log(0.05)
    assert torch.allclose(out.log_prob, truth, atol=2e-3)
    assert out.levels is None
    with pytest.raises(ValueError, match="bits/dim are of discrete data"):
        _ = out.bits_per_dim


def test_a_target_is_reached_by_draws(model, mixture, levels):
    settings = {"divergence": "exact", "method": "unipc", "steps": 24}
    likely = levels[masses(mixture, levels) > -6]
    out = sd.data_log_prob(model, likely, target_stderr=0.25, **settings)
    assert PILOT < out.draws < 1024
    assert (out.stderr < 0.32).all()
    assert (out.stderr_solver > 0).all()
    error = (out.log_prob - elbo(mixture, likely)).abs()
    assert (error < 4 * out.stderr).all()
    far = sd.data_log_prob(model, levels[:1], target_stderr=1e-3, **settings)
    assert "was not reached for 1 of 1 items" in far.message
    easy = sd.data_log_prob(model, levels, target_stderr=5.0, **settings)
    assert easy.draws == PILOT
    assert easy.message == ""


def test_other_dequantisations_by_name_and_section(model, levels):
    for section in ("truncated-normal", {"name": "truncated-normal", "tau": 2.0}, "decoder"):
        out = sd.data_log_prob(model, levels, dequantization=section, draws=2)
        assert out.log_prob.isfinite().all()
        assert out.t_min >= 1e-5
    with pytest.raises(ValueError, match="sets t_min itself"):
        sd.data_log_prob(model, levels, dequantization="decoder", t_min=1e-3)


def test_refusals(model, mixture, levels):
    with pytest.raises(ValueError, match="needs a model with a scaler"):
        sd.data_log_prob(mixture.score(sd.VP()), levels)
    with pytest.raises(sd.ConfigError, match=r"unknown dequantization 'unform'.*'uniform'"):
        sd.data_log_prob(model, levels, dequantization="unform")
    with pytest.raises(ValueError, match="draws must be at least 1"):
        sd.data_log_prob(model, levels, draws=0)
    with pytest.raises(ValueError, match=r"whole levels 0\.\.7"):
        sd.data_log_prob(model, levels + 1)
