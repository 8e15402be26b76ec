"""The bound with a variance that the network learned."""

import math

import pytest
import torch

import scoresde as sd

f64 = torch.float64
STD = 0.6


class Headed:
    """An exact score with an error, a head, and an account of what it was asked."""

    def __init__(self, sde, head, std=STD, error=0.0, dims=3):
        mixture = sd.GaussianMixture([1.0], torch.zeros(1, dims, dtype=f64), [std])
        self.sde, self.head, self.error, self.mixture = sde, head, error, mixture
        self.exact, self.asked = mixture.score(sde), []

    def noise_and_variance(self, x, t):
        eps = self.exact.noise(x, t) + self.error * torch.sin(3 * x)
        v = self.head(x, t)
        self.asked.append((x, t, eps, v))
        return eps, v

    def __call__(self, x, t):
        return -self.noise_and_variance(x, t)[0] / self.sde.sigma(t)


def wavy(x, t):
    return torch.sin(5 * x)


def points(n=2, dims=3):
    return torch.linspace(-0.9, 0.9, n * dims, dtype=f64).reshape(n, dims)


@pytest.mark.parametrize(("v", "same"), [(-1.0, "small"), (1.0, "large")])
@pytest.mark.parametrize("terms", [None, 5])
def test_the_ends_are_the_fixed_variances(sde, v, same, terms):
    score = Headed(sde, lambda x, t: torch.full_like(x, v), error=0.2)
    how = {"steps": 12, "levels": None, "terms": terms}
    learned = sd.vlb(score, points(), variance="learned", **how)
    fixed = sd.vlb(score, points(), variance=same, **how)
    torch.testing.assert_close(learned.steps, fixed.steps, rtol=1e-9, atol=1e-12)
    assert torch.equal(learned.index, fixed.index)
    assert (learned.variance, learned.nfe) == ("learned", fixed.nfe)
    if same == "large":  # the small one of the decoder would be 0, and is another
        torch.testing.assert_close(learned.total, fixed.total, rtol=1e-9, atol=1e-12)


def test_every_step_is_a_divergence_of_gaussians_by_quadrature():
    sde, steps = sd.DDPM(num_steps=8, beta_start=0.02, beta_end=0.4), 8
    score, x0 = Headed(sde, wavy, error=0.3), points()
    out = sd.vlb(score, x0, steps=steps, levels=None, variance="learned")
    times = torch.arange(steps + 1, dtype=f64) / steps
    for row, (x, t, eps, v) in enumerate(score.asked[:-1]):
        s = times[row + 1]
        a, power = sde.alpha(t) / sde.alpha(s), 0.0
        power = sde.sigma(t) ** 2 - a**2 * sde.sigma(s) ** 2
        small = power * sde.sigma(s) ** 2 / sde.sigma(t) ** 2
        guess = (x - sde.sigma(t) * eps) / sde.alpha(t)
        means = [
            (a * sde.sigma(s) ** 2 * x + sde.alpha(s) * power * data) / sde.sigma(t) ** 2
            for data in (x0, guess)
        ]
        f = (v + 1) / 2
        std = torch.exp(f * power.log() + (1 - f) * small.log()).sqrt()
        posterior = torch.distributions.Normal(means[0], small.sqrt())
        model = torch.distributions.Normal(means[1], std)
        z = torch.linspace(-12, 12, 4001, dtype=f64)
        at = means[0] + small.sqrt() * z[:, None, None]
        log_q = posterior.log_prob(at)
        kl = torch.trapezoid(log_q.exp() * (log_q - model.log_prob(at)), z, dim=0) * small.sqrt()
        torch.testing.assert_close(out.steps[:, row], kl.sum(1), rtol=1e-8, atol=1e-10)


def decoder_std(sde, steps, v):
    """``sigma_1`` and the small standard deviation of step 2, mixed in their logarithms."""
    one, two = sde.t_max / steps, 2 * sde.t_max / steps
    large = sde.sigma(one) ** 2
    a = sde.alpha(two) / sde.alpha(one)
    small = (sde.sigma(two) ** 2 - a**2 * large) * large / sde.sigma(two) ** 2
    f = (v + 1) / 2
    return torch.exp(f * large.log() + (1 - f) * small.log()).sqrt()


@pytest.mark.parametrize("levels", [None, 5])
def test_the_decoder_takes_the_small_variance_of_step_2(levels):
    sde, steps = sd.VP(beta_max=4.0), 6
    k = torch.tensor([[0, 1, 2], [3, 4, 0]])
    x0 = (k.double() + 0.5) * 2 / 5 - 1
    score = Headed(sde, wavy, error=0.3)
    out = sd.vlb(score, x0, steps=steps, levels=levels, variance="learned")
    x, t, eps, v = score.asked[-1]
    assert float(t) == pytest.approx(1 / 6)
    std = decoder_std(sde, steps, v)
    mean = (x - sde.sigma(t) * eps) / sde.alpha(t)
    if levels is None:
        expected = -torch.distributions.Normal(mean, std).log_prob(x0).sum(1)
    else:
        edges = torch.linspace(-1, 1, levels + 1, dtype=f64)
        below = torch.special.ndtr((edges - mean[..., None]) / std[..., None])
        below[..., 0], below[..., -1] = 0, 1
        expected = -below.diff().gather(-1, k[..., None])[..., 0].log().sum(1) / (3 * math.log(2))
    torch.testing.assert_close(out.decoder, expected, rtol=1e-9, atol=1e-12)


def best(sde, steps):
    """The head whose variances are those of Gaussian data given the state, the decoder's too."""
    times = torch.arange(steps + 1, dtype=f64) * sde.t_max / steps

    def power(t):
        return sde.alpha(t) ** 2 * STD**2 + sde.sigma(t) ** 2

    def head(x, t):
        i = round(float(t) / sde.t_max * steps)
        if i == 1:
            wanted = STD**2 * sde.sigma(t) ** 2 / power(t)
            ends = [2 * decoder_std(sde, steps, torch.tensor(v)).log() for v in (-1.0, 1.0)]
        else:
            s = times[i - 1]
            a, v = sde.transition(t, s)
            wanted = power(s) - (a * power(s)) ** 2 / power(t)
            ends = [2 * (v * sde.sigma(s) / sde.sigma(t)).log(), 2 * v.log()]
        f = (wanted.log() - ends[0]) / (ends[1] - ends[0])
        return (2 * f - 1).expand_as(x)

    return head


def test_the_best_head_is_better_than_both_and_exact_for_a_gaussian():
    """Then the chain is the exact one, and only the prior's divergence is left."""
    sde, steps, n = sd.VP(beta_max=6.0), 10, 4000
    score = Headed(sde, best(sde, steps))
    x0 = score.mixture.sample(n, torch.Generator().manual_seed(0))
    gaps = {}
    for variance in ("small", "large", "learned"):
        out = sd.vlb(score, x0, steps=steps, levels=None, variance=variance)
        gaps[variance] = out.total + score.mixture.log_prob(x0)
    for other in ("small", "large"):
        better = gaps[other] - gaps["learned"]
        assert better.mean() > 5 * better.std() / n**0.5
    power = sde.alpha(1.0) ** 2 * STD**2 + sde.sigma(1.0) ** 2
    left = 3 * (power - 1 - power.log()) / 2
    error = gaps["learned"].std() / n**0.5
    assert error < 0.05
    assert abs(gaps["learned"].mean() - left) < 3.5 * error


def test_float32_and_many_steps():
    score = Headed(sd.DDPM(), wavy, error=0.1)
    double = sd.vlb(score, points(), steps=300, levels=None, variance="learned")
    single = sd.vlb(score, points().float(), steps=300, levels=None, variance="learned")
    assert single.total.dtype == torch.float32
    assert single.total.isfinite().all()
    assert (single.total - double.total).abs().max() < 0.05 * double.total.abs().max()


def test_a_score_without_a_head_is_refused():
    score = Headed(sd.VP(), wavy).exact
    with pytest.raises(sd.ConfigError, match=r"variance head.*MixtureScore is not"):
        sd.vlb(score, points(), steps=5, levels=None, variance="learned")
    with pytest.raises(sd.ConfigError, match=r"unknown variance 'huge'.*large, learned, small"):
        sd.vlb(score, points(), steps=5, levels=None, variance="huge")
