import math

import pytest
import torch

import scoresde as sd
from scoresde import analytic
from scoresde.model import home

f64 = torch.float64
SHAPES = [(3,), (2, 3), (1, 2, 3), (1, 2, 2, 2)]


def random_mixture(shape, k=3, full=True):
    generator = torch.Generator().manual_seed(len(shape))
    means = torch.randn(k, *shape, generator=generator, dtype=f64)
    spread = (k, *shape) if full else (k,)
    stds = torch.rand(*spread, generator=generator, dtype=f64) * 0.5 + 0.2
    return sd.GaussianMixture(torch.rand(k, generator=generator, dtype=f64) + 0.1, means, stds)


@pytest.mark.parametrize("shape", SHAPES)
def test_score_is_the_gradient_of_the_log_density(sde, shape):
    mixture = random_mixture(shape)
    score = mixture.score(sde)
    t = torch.tensor([1e-3, 0.1, 0.5, 1.0], dtype=f64) * sde.t_max
    x = torch.randn(4, *shape, dtype=f64) * (1 + sde.sigma(t).reshape(-1, *(1,) * len(shape)))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_prob(x, sde, t).sum(), x)
    value = score(x.detach(), t.reshape(-1, *(1,) * len(shape)))
    assert torch.allclose(value, gradient, rtol=1e-9, atol=1e-9)
    alone = score(x.detach()[1:2], float(t[1]))
    assert torch.allclose(alone, value[1:2], rtol=1e-12)


def test_log_density_against_torch_distributions():
    mixture = random_mixture((4,))
    reference = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(mixture.weights),
        torch.distributions.Independent(
            torch.distributions.Normal(mixture.means, mixture.stds), 1
        ),
    )
    x = torch.randn(9, 4, dtype=f64)
    assert torch.allclose(mixture.log_prob(x), reference.log_prob(x))


def test_marginal_is_the_data_convolved_with_the_kernel(sde):
    """Quadrature of ``p(x_t | x_0) p(x_0)`` over ``x_0``, in one dimension."""
    mixture = random_mixture((1,))
    t = 0.3 * sde.t_max
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    x0 = torch.linspace(-8, 8, 20_001, dtype=f64)
    x = torch.linspace(-2, 2, 7, dtype=f64)[:, None]
    kernel = torch.distributions.Normal(alpha * x0, sigma).log_prob(x)
    joint = (kernel + mixture.log_prob(x0[:, None])).exp()
    assert torch.allclose(torch.trapezoid(joint, x0).log(), mixture.log_prob(x, sde, t), rtol=1e-8)


def test_density_integrates_to_one(sde):
    mixture = random_mixture((1,))
    for fraction in (0.0, 0.2, 1.0):
        t = max(fraction * sde.t_max, sde.t_min)
        reach = 6 * float(sde.alpha(t)) + 12 * float(sde.sigma(t))
        x = torch.linspace(-reach, reach, 40_001, dtype=f64)
        density = mixture.log_prob(x[:, None], sde, t).exp()
        assert torch.trapezoid(density, x) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_sampling_has_the_moments(shape):
    mixture = random_mixture(shape)
    x = mixture.sample(60_000, torch.Generator().manual_seed(0))
    assert x.shape == (60_000, *shape)
    assert x.dtype == f64
    mean, covariance = mixture.moments()
    assert mean.shape == shape
    deviation = covariance.diag().sqrt()
    assert ((x.flatten(1).mean(0) - mean.flatten()).abs() < 0.02 * deviation + 0.005).all()
    assert torch.allclose(x.flatten(1).T.cov(), covariance, atol=0.03)
    again = mixture.sample(10, torch.Generator().manual_seed(3))
    assert torch.equal(again, mixture.sample(10, torch.Generator().manual_seed(3)))


def test_sampled_components_have_their_weights():
    means = torch.tensor([[-10.0], [0.0], [10.0]])
    mixture = sd.GaussianMixture([1.0, 2.0, 5.0], means, [0.1, 0.1, 0.1])
    x = mixture.sample(40_000, torch.Generator().manual_seed(0))
    shares = [float(((x - m).abs() < 2).double().mean()) for m in (-10, 0, 10)]
    assert shares == pytest.approx([0.125, 0.25, 0.625], abs=0.01)


def test_readings_of_the_score_agree(sde):
    mixture = random_mixture((3,))
    score = mixture.score(sde)
    x, t = torch.randn(4, 3, dtype=f64), 0.2 * sde.t_max
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    assert torch.allclose(score.noise(x, t), -sigma * score(x, t))
    assert torch.allclose(alpha * score.denoise(x, t) + sigma * score.noise(x, t), x)
    velocity = sde.drift(x, t) - sde.diffusion(t) ** 2 / 2 * score(x, t)
    assert torch.allclose(score.velocity(x, t), velocity)


def test_denoised_is_the_posterior_mean():
    """``E[x_0 | x_t]`` by quadrature over ``x_0``."""
    mixture, sde, t = random_mixture((1,)), sd.VP(), 0.4
    x0 = torch.linspace(-8, 8, 20_001, dtype=f64)
    x = torch.tensor([[-1.0], [0.2], [2.0]], dtype=f64)
    kernel = torch.distributions.Normal(sde.alpha(t) * x0, sde.sigma(t)).log_prob(x)
    posterior = (kernel + mixture.log_prob(x0[:, None])).exp()
    mean = torch.trapezoid(posterior * x0, x0) / torch.trapezoid(posterior, x0)
    assert torch.allclose(mixture.score(sde).denoise(x, t)[:, 0], mean, rtol=1e-8)


def test_far_from_the_data_nothing_underflows():
    mixture = random_mixture((2,))
    x = torch.full((1, 2), 1e4, dtype=f64)
    assert mixture.log_prob(x).isfinite().all()
    assert mixture.score(sd.VP())(x, 1e-5).isfinite().all()


def test_dtype_and_home():
    mixture = random_mixture((2,))
    score = mixture.score(sd.VP())
    assert score(torch.zeros(3, 2), 0.5).dtype == torch.float32
    assert score(torch.zeros(3, 2, dtype=f64), 0.5).dtype == f64
    assert home(score) == (torch.device("cpu"), f64)
    single = mixture.to(dtype=torch.float32)
    x = torch.randn(3, 2, dtype=f64)
    assert torch.allclose(single.log_prob(x).double(), mixture.log_prob(x), rtol=1e-4)


def test_isotropic_stds_are_those_of_every_entry():
    mixture = random_mixture((2, 2), full=False)
    wide = sd.GaussianMixture(mixture.weights, mixture.means, mixture.stds.clone())
    x = torch.randn(3, 2, 2, dtype=f64)
    assert mixture.stds.shape == (3, 2, 2)
    assert torch.equal(mixture.log_prob(x), wide.log_prob(x))


def test_weights_are_normalised():
    one = sd.GaussianMixture([1.0, 3.0], torch.zeros(2, 1), [1.0, 2.0])
    two = sd.GaussianMixture([0.25, 0.75], torch.zeros(2, 1), [1.0, 2.0])
    x = torch.randn(4, 1)
    assert torch.allclose(one.log_prob(x), two.log_prob(x))
    peak = one.log_prob(torch.zeros(1, 1))
    assert float(peak) == pytest.approx(math.log((0.25 + 0.75 / 2) / math.sqrt(2 * math.pi)))


def test_bad_mixtures_are_refused():
    means = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="one weight a component"):
        sd.GaussianMixture([1.0], means, [1.0, 1.0])
    with pytest.raises(ValueError, match=r"\(K,\) or \(K, \*shape\)"):
        sd.GaussianMixture([1.0, 1.0], means, torch.ones(3))
    with pytest.raises(ValueError, match="positive"):
        sd.GaussianMixture([1.0, 0.0], means, [1.0, 1.0])
    with pytest.raises(ValueError, match="positive"):
        sd.GaussianMixture([1.0, 1.0], means, [1.0, -1.0])
    with pytest.raises(ValueError, match="needs a time"):
        sd.GaussianMixture([1.0, 1.0], means, [1.0, 1.0]).log_prob(means, sd.VP())


def test_batches_in_parts_give_the_same_score(sde, mixture, monkeypatch):
    x = torch.randn(11, 2, dtype=torch.float64)
    times = torch.linspace(0.1, 0.9, 11, dtype=torch.float64) * sde.t_max
    score = mixture.score(sde)
    whole = [score(x, t) for t in (times[3], times, times[:, None])]
    monkeypatch.setattr(analytic, "CACHED", 4 * mixture.means.numel())
    for one, t in zip(whole, (times[3], times, times[:, None]), strict=True):
        assert torch.equal(score(x, t), one)
    assert torch.equal(whole[1][5], score(x[5:6], times[5])[0])
