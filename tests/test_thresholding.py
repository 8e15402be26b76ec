"""Thresholding: the clipped data, the score that belongs to them, and what passes through."""

import pytest
import torch
from torch import nn

import scoresde as sd
from scoresde.thresholding import quantile

f64 = torch.float64


class Denoises(sd.Score):
    """The score whose denoised data are given."""

    def __init__(self, sde, x0):
        self.sde, self.x0, self.calls = sde, x0, 0

    def __call__(self, x, t, **cond):
        self.calls += 1
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        return (alpha * self.x0 - x) / sigma**2


def times(sde):
    return (torch.tensor(v, dtype=f64) for v in (sde.t_min_sampling, 0.3, sde.t_max))


def test_static_clamps_the_denoised_data(sde):
    x0 = torch.tensor([[0.2, -1.7, 1.2], [0.9, 0.1, -0.4]], dtype=f64)
    inner, x = Denoises(sde, x0), torch.randn(2, 3, dtype=f64)
    score = sd.Threshold(inner, "static", bound=1.1)
    for t in times(sde):
        torch.testing.assert_close(score.denoise(x, t), x0.clamp(-1.1, 1.1), atol=1e-7, rtol=1e-7)
        eps = (x - sde.alpha(t) * x0.clamp(-1.1, 1.1)) / sde.sigma(t)
        torch.testing.assert_close(score.noise(x, t), eps, rtol=1e-6, atol=1e-6)
    assert inner.calls == 6


def test_dynamic_scales_by_a_quantile_of_each_sample(sde):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(4, 2, 5, 3, generator=generator, dtype=f64)
    x0[1] *= 0.2
    x0[2] *= 5
    x = torch.randn(4, 2, 5, 3, generator=generator, dtype=f64)
    score = sd.Threshold(Denoises(sde, x0), quantile=0.9, bound=1.5)
    s = x0.flatten(1).abs().quantile(0.9, dim=1).clamp_min(1.5).reshape(4, 1, 1, 1)
    expected = torch.maximum(torch.minimum(x0, s), -s) * 1.5 / s
    assert expected.abs().max() == pytest.approx(1.5)
    for t in times(sde):
        torch.testing.assert_close(score.denoise(x, t), expected, rtol=1e-6, atol=1e-6)
    alone = sd.Threshold(Denoises(sde, x0[2:3]), quantile=0.9, bound=1.5)
    torch.testing.assert_close(alone(x[2:3], 0.3), score(x, 0.3)[2:3], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_what_is_in_range_is_left_bit_for_bit(sde, mixture, mode):
    inner = mixture.score(sde)
    x = torch.linspace(-0.3, 0.3, 8, dtype=torch.float32).reshape(4, 2)
    score = sd.Threshold(inner, mode, bound=3.0)
    for t in (sde.t_min, 1e-3, 0.4):
        assert torch.equal(score(x, t), inner(x, t))


@pytest.mark.parametrize("q", [0.0, 0.3, 0.5, 0.995, 1.0])
@pytest.mark.parametrize("dims", [1, 2, 7, 300])
def test_quantile(q, dims):
    values = torch.rand(3, dims, generator=torch.Generator().manual_seed(0), dtype=f64)
    torch.testing.assert_close(quantile(values, q), values.quantile(q, dim=1))


def test_times_of_each_sample(mixture):
    sde = sd.VP()
    score = sd.Threshold(mixture.score(sde), bound=0.5)
    x, t = torch.randn(3, 2, dtype=f64), torch.tensor([0.1, 0.5, 0.9], dtype=f64)
    for i in range(3):
        torch.testing.assert_close(score(x, t)[i : i + 1], score(x[i : i + 1], t[i]))


@pytest.mark.filterwarnings("ignore:.*noisy samples")
@pytest.mark.parametrize("solver", ["heun", "dpmpp-3m", "ancestral", "runge-kutta"])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_samples_end_in_range(sde, solver, mode):
    means = 1.4 * torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=f64)
    score = sd.GaussianMixture([1.0, 1.0], means, [0.3, 0.3]).score(sde)
    settings = {"solver": solver, "steps": None if solver == "runge-kutta" else 25}
    free = sd.sample(score, (20, 2), **settings)
    assert free.x.abs().max() > 1.4
    assert free.threshold is None
    out = sd.sample(score, (20, 2), threshold=mode, **settings)
    assert out.x.abs().max() <= 1 + 1e-9
    assert out.threshold == {"mode": mode, "quantile": 0.995, "bound": 1.0}
    wide = sd.sample(score, (20, 2), threshold={"mode": mode, "bound": 9.0}, **settings)
    torch.testing.assert_close(wide.x, free.x, rtol=1e-9, atol=1e-9)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.seen = nn.Parameter(torch.tensor(0.5)), []

    def forward(self, x, c_noise, y=None):
        self.seen.append((self.training, y))
        return x * self.scale + y.to(x)[:, None]


def test_a_network_is_evaluated_in_its_place():
    model = sd.ScoreModel(Net(), sd.VP(), sd.Eps(), shape=(2,), weights="ema").train()
    score, y = sd.Threshold(model, "static"), torch.arange(3)
    assert (score.sde, score.shape, score.weights, score.scaler) == (model.sde, (2,), "ema", None)
    assert (score.device, score.dtype) == (torch.device("cpu"), torch.float32)
    model.tuned = ({"steps": 3},)
    assert score.tuned == model.tuned
    sd.sample(score, (3, 2), steps=1, solver="ddim", y=y)  # asks whether the network uses y
    model.net.seen.clear()
    for led, section in ((score, None), (model, "static")):
        out = sd.sample(led, (3, 2), solver="ddim", steps=5, y=y, threshold=section)
        assert out.nfe == len(model.net.seen) == 6
        assert {training for training, _ in model.net.seen} == {False}
        assert all(torch.equal(given, y) for _, given in model.net.seen)
        assert model.training
        assert (out.weights, out.x.dtype) == ("ema", torch.float32)
        assert out.threshold["mode"] == "static"
        model.net.seen.clear()
    assert sd.encode(score, torch.zeros(3, 2), solver="ddim", y=y).weights == "ema"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("dynamc", "unknown threshold mode 'dynamc'; did you mean 'dynamic'"),
        ({"mode": "static", "bond": 2.0}, "threshold.bond of Threshold: 'bond'; did you mean"),
        ({"quantile": 1.5}, "0 <= quantile <= 1"),
        ({"bound": 0.0}, "finite bound > 0"),
        ({"bound": "wide"}, "threshold.bound"),
        ({"score": 1}, "unknown key threshold.score"),
        (3, "unknown threshold 3"),
    ],
)
def test_refusals(mixture, section, message):
    with pytest.raises(sd.ConfigError, match=message):
        sd.sample(mixture.score(sd.VP()), (2, 2), threshold=section)
    assert sd.Threshold.of("score", None) == "score"
