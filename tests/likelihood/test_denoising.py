"""Densities by denoising alone, against closed forms and quadrature."""

import math

import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from scipy import integrate

import scoresde as sd
from scoresde.likelihood.denoising import denoising_log_prob

f64 = torch.float64


def gaussian(mean, std, dims=1):
    return sd.GaussianMixture([1.0], torch.full((1, dims), float(mean), dtype=f64), [std])


def test_with_the_exact_score_it_is_the_density(sde, mixture):
    x = mixture.sample(225, torch.Generator().manual_seed(0))
    out = denoising_log_prob(mixture.score(sde), x, terms=128, times="logistic", seed=5)
    error = out.log_prob - mixture.log_prob(x)
    assert abs(error.mean()) < 4 * error.std() / 15
    assert error.std() / 15 < 0.03
    assert (error / out.stderr).square().mean() == pytest.approx(1.0, abs=0.4)
    parts = out.reference - out.integral - out.tails.sum(1)
    assert torch.allclose(out.log_prob, parts)
    assert out.nfe == 132


def test_a_gaussian_that_is_its_own_reference_has_no_noise_left(sde):
    data, x = gaussian(0.3, 0.6, 2), torch.linspace(-2, 2, 10, dtype=f64).reshape(5, 2)
    out = denoising_log_prob(data.score(sde), x, terms=3, reference=(0.3, 0.6))
    assert torch.allclose(out.log_prob, data.log_prob(x), atol=1e-9)
    assert torch.allclose(out.reference, data.log_prob(x))
    assert out.stderr.max() < 1e-9


def test_the_integral_of_the_paper():
    """Equation 9 by quadrature in one dimension, then what it says of the estimate."""
    mixture = sd.GaussianMixture([0.4, 0.6], torch.tensor([[-0.9], [0.8]], dtype=f64), [0.3, 0.4])
    score, x = mixture.score(sd.EDM()), 0.5
    nodes, weights = (torch.tensor(v, dtype=f64) for v in hermegauss(60))
    weights = weights / weights.sum()

    def missing(log_snr):
        snr = math.exp(log_snr)
        t = snr**-0.5
        noisy = (x + t * nodes)[:, None]
        denoised = noisy + t**2 * score(noisy, t)
        mmse = float(weights @ (x - denoised[:, 0]) ** 2)
        return (1 / (1 + snr) - mmse) * snr

    total = integrate.quad(missing, -14, 14, epsabs=1e-8, limit=200)[0]
    paper = -(math.log(2 * math.pi * math.e) - total) / 2
    exact = float(mixture.log_prob(torch.tensor([[x]], dtype=f64)))
    assert paper == pytest.approx(exact, abs=1e-5)
    many = torch.full((4000, 1), x, dtype=f64)
    out = denoising_log_prob(score, many, terms=32, times="logistic")
    error = float(out.log_prob.std()) / 4000**0.5
    assert abs(float(out.log_prob.mean()) - paper) < 4 * error
    assert error < 0.01


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_the_tails_are_those_of_theory(value):
    """Of Gaussian data, beyond noise levels of 0.1 and 10, beside the reference (0, 1)."""
    m, c, sde = 0.3, 0.6, sd.EDM(0.1, 10.0)

    def difference(lam):
        snr = math.exp(2 * lam)

        def error(mean, std):
            power = 1 + snr * std**2
            return (1 - 1 / power) ** 2 + snr * (value - mean) ** 2 / power**2

        return error(m, c) - error(0.0, 1.0)

    low = integrate.quad(difference, -15, -math.log(10), epsabs=1e-10)[0]
    high = integrate.quad(difference, math.log(10), 15, epsabs=1e-10)[0]
    x = torch.full((4000, 1), value, dtype=f64)
    out = denoising_log_prob(gaussian(m, c).score(sde), x, terms=16, times="logistic")
    for k, exact in enumerate((low, high)):
        tail = out.tails[:, k]
        error = float(tail.std()) / 4000**0.5
        assert abs(float(tail.mean()) - exact) < 4 * error + 0.05 * abs(exact)
        assert abs(exact) > 10 * error  # so that a tail left out would be seen
    inside = integrate.quad(difference, -math.log(10), math.log(10), epsabs=1e-10)[0]
    error = float(out.integral.std()) / 4000**0.5
    assert abs(float(out.integral.mean()) - inside) < 4 * error


def test_a_wrong_score_is_on_the_low_side_by_its_error(sde):
    (m, c), (n, b) = (0.2, 0.5), (0.5, 0.7)
    data, wrong = gaussian(m, c), gaussian(n, b)
    x = data.sample(10_000, torch.Generator().manual_seed(2))
    out = denoising_log_prob(wrong.score(sde), x, terms=16, times="logistic")

    def fisher(lam):
        t = float(sde.time(torch.tensor(lam, dtype=f64)))
        alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
        p, h = alpha**2 * c**2 + sigma**2, alpha**2 * b**2 + sigma**2
        return sigma**2 * (p * (1 / p - 1 / h) ** 2 + (alpha * (n - m) / h) ** 2)

    start, end = (float(sde.log_snr(t)) for t in (sde.t_min_likelihood, sde.t_max))
    expected = integrate.quad(fisher, end, start, epsabs=1e-8, limit=200)[0]
    expected += (fisher(start) + fisher(end)) / 2  # the tails
    found = data.log_prob(x) - out.log_prob
    error = float(found.std()) / len(x) ** 0.5
    assert abs(float(found.mean()) - expected) < 4 * error
    assert error < 0.05 * expected + 0.005


@pytest.mark.parametrize("times", ["importance", "uniform"])
def test_the_standard_error_is_honest(mixture, times):
    x = mixture.sample(3, torch.Generator().manual_seed(4)).repeat_interleave(1000, 0)
    out = denoising_log_prob(mixture.score(sd.Linear()), x, times=times, terms=24)
    spread = out.log_prob.reshape(3, -1).std(1)
    told = out.stderr.reshape(3, -1).square().mean(1).sqrt()
    assert (told > 0.93 * spread).all()
    assert (told < 1.3 * spread).all()
    exact = mixture.log_prob(x)
    bias = (out.log_prob - exact).reshape(3, -1).mean(1)
    assert (bias.abs() < 4 * spread / 1000**0.5).all()


def test_the_standard_error_holds_that_of_the_tails(mixture):
    """Ends amid the structure of the data, where half of the noise is in the tails."""
    x = mixture.sample(1, torch.Generator().manual_seed(4)).expand(3000, 2).contiguous()
    out = denoising_log_prob(mixture.score(sd.EDM(0.3, 0.6)), x, terms=24)
    told = out.stderr.square().mean().sqrt()
    assert 0.93 < told / out.log_prob.std() < 1.3
    assert out.tails.sum(1).std() > 0.5 * out.log_prob.std()


def test_a_sample_does_not_depend_on_its_batch(mixture):
    x = mixture.sample(5, torch.Generator().manual_seed(0))
    whole = denoising_log_prob(mixture.score(sd.VP()), x, terms=8, seed=2)
    alone = denoising_log_prob(mixture.score(sd.VP()), x[3:4], terms=8, seed=2, start_index=3)
    assert torch.allclose(alone.log_prob, whole.log_prob[3:4], rtol=1e-12)
    assert torch.allclose(alone.tails, whole.tails[3:4])
    other = denoising_log_prob(mixture.score(sd.VP()), x, terms=8, seed=3)
    assert not torch.allclose(other.log_prob, whole.log_prob)


def test_any_shape_and_float32(sde):
    means = torch.full((1, 1, 2, 3), 0.1, dtype=f64)
    score = sd.GaussianMixture([1.0], means, [0.5]).score(sde)
    x = torch.linspace(-1, 1, 12).reshape(2, 1, 2, 3)
    out, fine = (denoising_log_prob(score, v, terms=8) for v in (x, x.double()))
    assert out.log_prob.shape == (2,)
    assert out.tails.shape == (2, 2)
    assert out.log_prob.dtype == torch.float32
    assert torch.allclose(out.log_prob.double(), fine.log_prob, atol=2e-3)


def test_the_network_is_evaluated_in_eval_mode_without_gradients():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, x, c_noise, y):
            assert not self.training
            assert not torch.is_grad_enabled()
            return self.layer(x) + y[:, None]

    model, seen = sd.ScoreModel(Net(), sd.VP(), sd.V(), weights="ema").train(), []
    out = denoising_log_prob(
        model, torch.zeros(2, 4), terms=5, draws=3, y=torch.ones(2),
        progress=lambda *state: seen.append(state),
    )  # fmt: skip
    assert model.training
    assert (out.weights, out.nfe) == ("ema", 11)
    assert [s[2] for s in seen] == list(range(5))


def test_what_does_not_fit_is_refused(mixture):
    score, x = mixture.score(sd.VP()), torch.zeros(2, 2, dtype=f64)
    with pytest.raises(ValueError, match="terms >= 1"):
        denoising_log_prob(score, x, terms=0)
    with pytest.raises(sd.ConfigError, match="unknown times 'logistik'; did you mean 'logistic'"):
        denoising_log_prob(score, x, times="logistik")
    with pytest.raises(ValueError, match="finite log-SNR"):
        denoising_log_prob(mixture.score(sd.Linear(t_min=0.0)), x, t_min=0.0)
    with pytest.raises(ValueError, match="int64"):
        denoising_log_prob(score, x.long())
