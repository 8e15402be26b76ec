import math

import pytest
import torch

import scoresde as sd
from scoresde import config
from scoresde.training import times as times_room
from scoresde.training import weights as weights_room

WEIGHTS = ["simple", "likelihood", "x0", "edm", "min-snr"]


class Exact(sd.Score):
    """A score that counts on nothing but the mixture, with noise() as the objective calls it."""

    def __init__(self, mixture, sde):
        self.sde, self.inner = sde, mixture.score(sde)

    def __call__(self, x, t):
        return self.inner(x, t)


def test_simple_loss_is_the_squared_error(sde, mixture):
    model = Exact(mixture, sde)
    x0 = mixture.sample(6, torch.Generator().manual_seed(0))
    eps = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = torch.linspace(sde.t_min_sampling, sde.t_max, 6, dtype=torch.float64)
    x = sde.alpha(t)[:, None] * x0 + sde.sigma(t)[:, None] * eps
    error = -sde.sigma(t)[:, None] * mixture.score(sde)(x, t) - eps
    torch.testing.assert_close(sd.DSM("simple")(model, x0, t=t, eps=eps), (error**2).sum(1))


def test_weights_are_their_papers_in_each_space(sde, mixture):
    """Each weight on the error of eps is the plain error of what its paper predicts."""
    model = Exact(mixture, sde)
    x0 = mixture.sample(6, torch.Generator().manual_seed(0))
    eps = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = torch.linspace(max(0.01, sde.t_min), sde.t_max, 6, dtype=torch.float64)
    column = t[:, None]
    x = sde.perturb(x0, column, eps)
    alpha, sigma = sde.alpha(column), sde.sigma(column)
    score_error = model(x, column) + eps / sigma
    data_error = model.denoise(x, column) - x0
    q, snr = sigma / alpha, (alpha / sigma) ** 2
    expected = {
        "simple": sigma**2 * score_error**2,
        "likelihood": sde.diffusion(column) ** 2 * score_error**2,
        "x0": data_error**2,
        # EDM: (sigma^2 + sigma_data^2)/(sigma sigma_data)^2 |D - x0|^2
        "edm": (q**2 + 0.25) / (0.5 * q) ** 2 * data_error**2,
        # min-SNR in data space: min(snr, 5) |x0_hat - x0|^2
        "min-snr": snr.clamp_max(5) * data_error**2,
    }
    for name in WEIGHTS:
        loss = sd.DSM(name)(model, x0, t=t, eps=eps)
        torch.testing.assert_close(loss, expected[name].sum(1), rtol=1e-8, atol=1e-10)


def test_likelihood_weight_is_the_slope_of_log_snr(sde):
    t = torch.linspace(max(0.01, sde.t_min), sde.t_max - 1e-4, 7, dtype=torch.float64)
    t = t.requires_grad_()
    (slope,) = torch.autograd.grad(sde.log_snr(t).sum(), t)
    weight = config.build("likelihood", weights_room, "weight")
    torch.testing.assert_close(weight(sde, t.detach()), -2 * slope, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["uniform", "low-discrepancy", "log-normal", "importance"])
def test_times_stay_within_the_trained_interval(sde, name):
    times = config.build(name, times_room, "times")
    t, correction = times(sde, 4096, torch.Generator().manual_seed(0))
    assert t.dtype == torch.float64
    assert t.min() >= sde.t_min * (1 - 1e-9)
    assert t.max() <= sde.t_max * (1 + 1e-9)
    assert correction.shape == t.shape


def test_low_discrepancy_covers_every_cell():
    t, _ = times_room.LowDiscrepancy()(sd.VP(), 64, torch.Generator().manual_seed(3))
    u = (t - 1e-5) / (1 - 1e-5)
    assert sorted((u * 64).long().tolist()) == list(range(64))


def test_log_normal_has_its_moments():
    sde = sd.EDM()
    t, _ = times_room.LogNormal()(sde, 200_000, torch.Generator().manual_seed(0))
    log_q = t.log()
    assert float(log_q.mean()) == pytest.approx(-1.2, abs=0.02)
    assert float(log_q.std()) == pytest.approx(1.2, abs=0.02)


def test_importance_times_are_uniform_in_log_snr(sde):
    t, _ = times_room.Importance()(sde, 1000, torch.Generator().manual_seed(0))
    log_snr = sde.log_snr(t)
    low, high = sde.log_snr(sde.t_max), sde.log_snr(sde.t_min)
    u = ((log_snr - low) / (high - low)).sort().values
    assert (u - (torch.arange(1000) + 0.5) / 1000).abs().max() < 1e-3


def test_importance_sampling_is_unbiased_with_constant_weight(sde, mixture):
    """Weight times correction is constant, and equals the integral that uniform times estimate."""
    t, correction = times_room.Importance()(sde, 64, torch.Generator().manual_seed(0))
    factor = weights_room.Likelihood()(sde, t) * correction
    torch.testing.assert_close(factor, factor[:1].expand(64), rtol=1e-9, atol=0)
    span = float(sde.log_snr(sde.t_min) - sde.log_snr(sde.t_max))
    # mean over uniform t of g^2/sigma^2 = 2 span / (t_max - t_min)
    assert float(factor[0]) == pytest.approx(2 * span / (sde.t_max - sde.t_min), rel=1e-9)


def test_optimal_loss_on_gaussian_data_is_the_closed_form():
    """E|eps_hat - eps|^2 = alpha^2 v / (alpha^2 v + sigma^2) a dimension, for data N(0, v)."""
    sde, v, t = sd.VP(), 0.49, 0.3
    mixture = sd.GaussianMixture([1.0], torch.zeros(1, 3).double(), [v**0.5])
    generator = torch.Generator().manual_seed(0)
    x0 = mixture.sample(100_000, generator)
    loss = sd.DSM("simple")(mixture.score(sde), x0, t=t, generator=generator)
    alpha2, sigma2 = float(sde.alpha(t)) ** 2, float(sde.sigma(t)) ** 2
    expected = 3 * alpha2 * v / (alpha2 * v + sigma2)
    error = float(loss.std()) / math.sqrt(len(loss))
    assert abs(float(loss.mean()) - expected) < 4 * error
    assert error < 0.01


def test_a_wrong_name_gives_the_nearest():
    with pytest.raises(sd.ConfigError, match="did you mean 'likelihood'"):
        sd.DSM(weight="likelyhood")
    with pytest.raises(sd.ConfigError, match=r"objective\.weight\.gama"):
        sd.DSM(weight={"name": "min-snr", "gama": 3})
