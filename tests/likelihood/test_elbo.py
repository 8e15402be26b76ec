"""Continuous-time bounds, against closed forms and quadrature."""

import dataclasses
import itertools
import math

import pytest
import torch
from scipy import integrate

import scoresde as sd
from scoresde.likelihood.continuous import TAU, elbo
from scoresde.likelihood.errors import stratified_stderr

f64 = torch.float64
DENSITIES = ("data", "smoothed")


def gaussian(mean, std, dims=1):
    return sd.GaussianMixture([1.0], torch.full((1, dims), float(mean), dtype=f64), [std])


def at(sde, t):
    return float(sde.alpha(t)), float(sde.sigma(t))


def grid(n):
    """Nodes ``(n^2, 2)`` and weights of Gauss and Hermite for the normal in two dimensions."""
    nodes, weights = (torch.tensor(v, dtype=f64) for v in _hermite(n))
    pairs = torch.cartesian_prod(nodes, nodes)
    return pairs, torch.cartesian_prod(weights, weights).prod(1)


def _hermite(n):
    from numpy.polynomial.hermite_e import hermegauss

    nodes, weights = hermegauss(n)
    return nodes, weights / weights.sum()


def over_noise(fn, mean, std, n=24):
    """``E fn(mean + std eps)`` of each row of ``mean (B, 2)``."""
    nodes, weights = grid(n)
    points = mean[:, None] + std * nodes
    return fn(points.reshape(-1, 2)).reshape(len(mean), -1) @ weights


def log_normal(x, mean, var):
    return -((x - mean) ** 2 / var + math.log(2 * math.pi * var)).sum(-1) / 2


def gap(mixture, sde, x, density, s=None):
    """What the bound of an exact score lies above ``-log p``, at each ``x``."""
    s, T = s or sde.t_min_likelihood, sde.t_max
    (alpha, sigma), (alpha_s, sigma_s) = at(sde, T), at(sde, s)
    a, v = (alpha, sigma) if density == "data" else (float(c) for c in sde.transition(T, s))
    mismatch = over_noise(lambda z: mixture.log_prob(z, sde, T) - sde.prior_log_prob(z), a * x, v)
    if density == "smoothed":
        return mismatch
    q, score = sigma_s / alpha_s, mixture.score(sde)

    def decoder(z):
        x0 = x.repeat_interleave(len(z) // len(x), 0)
        posterior = log_normal(z, alpha_s * x0, sigma_s**2) - mixture.log_prob(z, sde, s)
        mean = (z + sigma_s**2 * score(z, s)) / alpha_s
        return mixture.log_prob(x0) + posterior - log_normal(x0, mean, q**2)

    return mismatch + over_noise(decoder, alpha_s * x, sigma_s)


def exact_log_prob(mixture, sde, x, density, s=None):
    if density == "data":
        return mixture.log_prob(x)
    return mixture.log_prob(x, sde, sde.t_min_likelihood if s is None else s)


@pytest.mark.parametrize("density", DENSITIES)
def test_with_the_exact_score_it_is_the_density_up_to_prior_and_decoder(sde, mixture, density):
    x = mixture.sample(225, torch.Generator().manual_seed(0))
    out = elbo(mixture.score(sde), x, levels=None, density=density, terms=128, times="logistic",
               seed=5)  # fmt: skip
    expected = gap(mixture, sde, x, density) - exact_log_prob(mixture, sde, x, density)
    error = out.total - expected
    assert abs(error.mean()) < 4 * error.std() / 15
    assert error.std() / 15 < 0.03
    assert (error / out.stderr).square().mean() == pytest.approx(1.0, abs=0.4)
    assert torch.allclose(out.total, out.prior + out.diffusion + out.reconstruction)
    assert torch.allclose(out.diffusion, out.values.mean(1))


@pytest.mark.parametrize(
    ("density", "times"),
    [("data", "importance"), ("smoothed", "importance"), ("smoothed", "logistic")],
)
def test_a_late_start_counts_in_full(sde, mixture, density, times):
    """Where the noise at ``t_min`` is as fine as the mixture, kernel and decoder tell."""
    s = float(sde.time(torch.tensor(1.0, dtype=f64)))
    x = mixture.sample(400, torch.Generator().manual_seed(3))
    out = elbo(mixture.score(sde), x, levels=None, density=density, times=times, t_min=s)
    error = out.total - gap(mixture, sde, x, density, s)
    error = error + exact_log_prob(mixture, sde, x, density, s)
    assert abs(error.mean()) < 4 * error.std() / 20
    assert error.std() / 20 < 0.03
    assert out.t_min == s


@pytest.mark.parametrize("density", DENSITIES)
def test_a_gaussian_that_is_its_own_reference_has_no_noise_left(sde, density):
    mixture, x = gaussian(0.3, 0.6, 2), torch.linspace(-2, 2, 10, dtype=f64).reshape(5, 2)
    out = elbo(mixture.score(sde), x, levels=None, density=density, terms=3, reference=(0.3, 0.6))
    expected = gap(mixture, sde, x, density) - exact_log_prob(mixture, sde, x, density)
    assert torch.allclose(out.total, expected, atol=1e-6)
    assert out.stderr.max() < 1e-6


@pytest.mark.parametrize("times", ["importance", "logistic", "uniform"])
def test_the_parts_of_the_bound_of_data(sde, times):
    """For a wrong linear score, all parts at each ``x`` by quadrature."""
    wrong, x = gaussian(0.4, 0.7), torch.linspace(-2, 2, 5, dtype=f64)[:, None]
    many = x.repeat_interleave(400, 0)
    if times == "uniform" and type(sde).__name__ == "EDM":
        pytest.skip("nothing of the integral lies where uniform noise levels look")
    out = elbo(wrong.score(sde), many, levels=None, times=times, terms=64)
    start, end = (float(sde.log_snr(t)) for t in (sde.t_min_likelihood, sde.t_max))
    alpha, sigma = at(sde, sde.t_max)
    prior = torch.distributions.Normal(torch.zeros(5, 1, dtype=f64), sde.prior_std)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(alpha * x, sigma), prior)
    assert torch.allclose(out.prior.reshape(5, -1), kl.expand(-1, 400))
    for k, value in enumerate(x[:, 0].tolist()):

        def error(lam, value=value):
            snr = math.exp(2 * lam)
            power = 1 + snr * 0.7**2  # (alpha^2 c^2 + sigma^2)/sigma^2
            return (1 - 1 / power) ** 2 + snr * (value - 0.4) ** 2 / power**2

        diffusion = integrate.quad(error, end, start, epsabs=1e-9)[0]
        q = math.exp(-start)
        decoder = math.log(2 * math.pi * q**2) / 2 + error(start) / 2
        for found, expected in ((out.diffusion, diffusion), (out.reconstruction, decoder)):
            part = found.reshape(5, -1)[k]
            assert abs(part.mean() - expected) < 4.5 * part.std() / 20 + 1e-6
            assert part.std() / 20 < 0.1


@pytest.mark.parametrize("density", DENSITIES)
def test_a_wrong_score_costs_its_fisher_divergence(sde, density):
    """Mean over data: int sigma^2 E|s - grad log p_t|^2 d lam + KL(p_T | prior) + decoder."""
    (m, c), (n, b) = (0.2, 0.5), (0.5, 0.7)
    data, wrong = gaussian(m, c), gaussian(n, b)
    s = sde.t_min_likelihood
    alpha_s, sigma_s = at(sde, s)
    x = data.sample(10_000, torch.Generator().manual_seed(2))
    if density == "smoothed":
        eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=f64)
        x = alpha_s * x + sigma_s * eps
    out = elbo(wrong.score(sde), x, levels=None, density=density, terms=16, times="logistic")

    def fisher(lam):
        t = float(sde.time(torch.tensor(lam, dtype=f64)))
        alpha, sigma = at(sde, t)
        p, h = alpha**2 * c**2 + sigma**2, alpha**2 * b**2 + sigma**2
        # s - grad log p = (x - alpha m)/p - (x - alpha n)/h
        return sigma**2 * (p * (1 / p - 1 / h) ** 2 + (alpha * (n - m) / h) ** 2)

    start, end = (float(sde.log_snr(t)) for t in (s, sde.t_max))
    expected = integrate.quad(fisher, end, start, epsabs=1e-8, limit=200)[0]
    alpha, sigma = at(sde, sde.t_max)
    normal = torch.distributions.Normal
    expected += float(torch.distributions.kl_divergence(
        normal(alpha * m, math.hypot(alpha * c, sigma)), normal(0.0, sde.prior_std)))  # fmt: skip
    if density == "data":
        q2 = (sigma_s / alpha_s) ** 2
        ratio = c**2 / (c**2 + q2)
        expected += (ratio - 1 - math.log(ratio) + fisher(start)) / 2
    found = out.total + exact_log_prob(data, sde, x, density)
    assert abs(found.mean() - expected) < 4 * found.std() / len(x) ** 0.5
    assert found.std() / len(x) ** 0.5 < 0.1 * expected


def test_it_bounds_the_density_of_the_reverse_sde(sde):
    """For a linear score that is Gaussian, with moments by an ordinary differential equation."""
    m, c = 0.3, 0.5
    score = gaussian(m, c).score(sde)

    def tilted(x, t):
        return score(x, t) + 0.2 * x / (1 + sde.sigma(t) ** 2) ** 2

    tilted.sde = sde
    s, T = sde.t_min_likelihood, sde.t_max

    def rates(lam, state):
        t = float(sde.time(torch.tensor(lam, dtype=f64)))
        alpha, sigma = at(sde, t)
        g2 = float(sde.diffusion(t)) ** 2
        per_time = -2 * sigma**2 / g2  # dt / d lam
        f, h = float(sde.drift_rate(t)), alpha**2 * c**2 + sigma**2
        slope, push = -1 / h + 0.2 / (1 + sigma**2) ** 2, alpha * m / h
        mean, variance = state
        drift = f - g2 * slope
        return (drift * mean - g2 * push) * per_time, (2 * drift * variance - g2) * per_time

    ends = float(sde.log_snr(T)), float(sde.log_snr(s))
    state = [0.0, sde.prior_std**2]
    found = integrate.solve_ivp(rates, ends, state, method="LSODA", rtol=1e-8, atol=1e-10)
    mean, variance = found.y[:, -1]
    x = torch.linspace(mean - 3, mean + 3, 9, dtype=f64)[:, None] * variance**0.5
    many = x.repeat_interleave(200, 0)
    out = elbo(tilted, many, levels=None, density="smoothed", times="logistic", terms=32, seed=1,
               reference=(m, c))  # fmt: skip
    over = (out.total + log_normal(many, mean, variance)).reshape(9, -1)
    assert (over.mean(1) > -4 * over.std(1) / 200**0.5).all()
    # The gap is a Kullback-Leibler divergence of paths, the square of the error of the score.
    assert 4 * over.std() / len(many) ** 0.5 < over.mean() < 0.3
    assert over.std(1).max() / 200**0.5 < 0.03


def test_the_bound_of_data_is_the_mean_of_the_bound_of_smoothed_data():
    sde = dataclasses.replace(sd.VP(), t_min_likelihood=0.02)
    score = gaussian(0.4, 0.7).score(sde)
    x = torch.full((4000, 1), 0.9, dtype=f64)
    alpha, sigma = at(sde, 0.02)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=f64)
    smoothed = elbo(score, alpha * x + sigma * eps, levels=None, density="smoothed", terms=16)
    data = elbo(score, x, levels=None, terms=16, seed=1)
    entropy = math.log(2 * math.pi * math.e * sigma**2) / 2
    a, b = smoothed.total - entropy, data.prior + data.diffusion
    assert abs(a.mean() - b.mean()) < 4 * math.hypot(a.std(), b.std()) / 4000**0.5
    assert smoothed.reconstruction.abs().max() == 0


def test_the_discrete_loss_tends_to_the_continuous():
    """Half the difference of the SNR times the squared error of the data, to first order."""
    sde, m, c = sd.VP(), 0.4, 0.7
    x = torch.full((4000, 1), 0.9, dtype=f64)
    out = elbo(gaussian(m, c).score(sde), x, levels=None, terms=32, times="logistic")
    start, end = (float(sde.log_snr(t)) for t in (sde.t_min_likelihood, sde.t_max))

    def discrete(steps):
        snr = torch.linspace(2 * end, 2 * start, steps + 1, dtype=f64).exp()
        power = 1 + snr[:-1] * c**2
        mse = (snr[:-1] * c**4 + (0.9 - m) ** 2) / power**2
        return float((snr.diff() * mse).sum() / 2)

    error = float(out.diffusion.std()) / 4000**0.5
    assert error < 0.01
    gaps = [discrete(steps) - float(out.diffusion.mean()) for steps in (50, 100, 200_000)]
    assert abs(gaps[2]) < 4 * error
    assert gaps[0] == pytest.approx(2 * gaps[1], rel=0.1)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_discrete_chain_costs_its_divergences(sde, variance):
    """On Gaussian data with the exact score, every step's true reversal has the model's mean."""
    steps, dims, c = 60, 3, 0.5
    data = gaussian(0.0, c, dims)
    if sde.t_max / steps < sde.t_min:
        pytest.skip("the grid starts below the trained times")
    x = data.sample(3000, torch.Generator().manual_seed(0))
    out = sd.vlb(data.score(sde), x, steps=steps, levels=None, variance=variance)

    def cost(ratio):
        return dims * (ratio - 1 - math.log(ratio)) / 2

    times = [sde.t_max * i / steps for i in range(steps + 1)]
    alpha, sigma = at(sde, sde.t_max)
    ratio = (alpha**2 * c**2 + sigma**2) / sde.prior_std**2
    expected = cost(ratio)
    for s, t in itertools.pairwise(times[1:]):
        (alpha_s, sigma_s), (alpha_t, sigma_t) = at(sde, s), at(sde, t)
        _, v = (float(value) for value in sde.transition(t, s))
        left = c**2 * sigma_t**2 / (alpha_t**2 * c**2 + sigma_t**2)  # Var[x_0 | x_t]
        small = (sigma_s * v / sigma_t) ** 2
        true = small + (alpha_s * v**2 / sigma_t**2) ** 2 * left
        expected += cost(true / (small if variance == "small" else v**2))
    alpha, sigma = at(sde, times[1])
    expected += cost(c**2 / (alpha**2 * c**2 + sigma**2))
    found = out.total + data.log_prob(x)
    assert abs(found.mean() - expected) < 4 * found.std() / len(x) ** 0.5
    assert found.std() / len(x) ** 0.5 < 0.05 * max(expected, 1.0)


def test_the_process_between_its_ends_does_not_matter(mixture):
    vp = sd.VP()
    ends = [vp.log_snr(t) for t in (vp.t_min_likelihood, vp.t_max)]
    start, end = (float(sd.Cosine().time(lam)) for lam in ends)
    cosine = sd.Cosine(t_max=end, t_min=start / 2, t_min_likelihood=start)
    edm = sd.EDM(*(math.exp(-float(lam)) for lam in ends))
    x = mixture.sample(300, torch.Generator().manual_seed(0))
    settings = {"levels": None, "terms": 64}
    outs = [elbo(mixture.score(s), x, **settings) for s in (vp, cosine, edm)]
    assert torch.allclose(outs[0].total, outs[1].total, atol=1e-5)
    assert torch.allclose(outs[0].diffusion, outs[2].diffusion, atol=1e-5)
    assert not torch.allclose(outs[0].t, outs[1].t, rtol=0.1)
    other = elbo(mixture.score(cosine), x, times="uniform", seed=1, **settings)
    difference = other.total - outs[0].total
    assert abs(difference.mean()) < 4 * difference.std() / 300**0.5


@pytest.mark.parametrize("density", DENSITIES)
def test_any_reference_has_the_same_mean(mixture, density):
    score = mixture.score(sd.VP())
    x = mixture.sample(1, torch.Generator().manual_seed(0)).expand(3000, 2).contiguous()
    settings = {"levels": None, "density": density, "terms": 16, "times": "logistic"}
    plain = elbo(score, x, **settings)
    other = elbo(score, x, seed=1, reference=(torch.tensor([0.5, -0.3]), 2.0), **settings)
    error = math.hypot(plain.total.std(), other.total.std()) / 3000**0.5
    assert abs(plain.total.mean() - other.total.mean()) < 4 * error
    assert error < 0.05


def test_the_reference_takes_most_of_the_noise_away():
    means = torch.randn(8, 64, generator=torch.Generator().manual_seed(0), dtype=f64)
    mixture = sd.GaussianMixture([1.0] * 8, 0.9 * means, [0.3] * 8)
    x = mixture.sample(1, torch.Generator().manual_seed(0)).expand(200, 64).contiguous()
    out = elbo(mixture.score(sd.VP()), x, levels=None)
    assert out.total.std() < 8  # that of |eps - eps_hat|^2 alone would be 13, of the decoder 4
    assert out.reconstruction.std() < 0.05


@pytest.mark.parametrize("times", ["importance", "logistic"])
@pytest.mark.parametrize("density", DENSITIES)
def test_the_standard_error_is_honest(mixture, density, times):
    """One item many times: the spread of its bounds against what each says of its own."""
    x = mixture.sample(3, torch.Generator().manual_seed(4)).repeat_interleave(1000, 0)
    out = elbo(mixture.score(sd.VP()), x, levels=None, density=density, times=times, terms=24)
    spread = out.total.reshape(3, -1).std(1)
    told = out.stderr.reshape(3, -1).square().mean(1).sqrt()
    assert (told > 0.93 * spread).all()
    assert (told < 1.3 * spread).all()


def test_the_standard_error_of_strata():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, 6, generator=generator, dtype=f64)
    for at_one in range(6):  # wherever the noise is, the ends included
        values = noise * torch.nn.functional.one_hot(torch.tensor(at_one), 6)
        told = stratified_stderr(values).square().mean().sqrt()
        assert 0.97 < told / values.mean(1).std() < 1.25
    assert stratified_stderr(noise[:, :1]).isnan().all()
    # Strata that differ in their means alone, which stratification takes out.
    steep = torch.linspace(0, 1, 101, dtype=f64).expand(2, -1)
    assert stratified_stderr(steep).max() < 0.001


def centres(n, dims, levels):
    k = torch.randint(0, levels, (n, dims), generator=torch.Generator().manual_seed(0))
    return k, (k.double() + 0.5) * 2 / levels - 1


@pytest.mark.parametrize("levels", [2, 5, 256])
def test_decoder_integrates_over_the_bins(levels):
    seen = []

    class Asked:
        sde = sd.VP(t_min_likelihood=0.05)

        def __call__(self, x, t):
            seen.append((x, t))
            return -x / (0.3 + t)

    k, x0 = centres(3, 4, levels)
    out = elbo(Asked(), x0, levels=levels, terms=2, draws=2, t_min=0.05)
    masses = []
    for x, t in seen[-2:]:
        alpha, sigma = at(Asked.sde, 0.05)
        assert torch.allclose(t, torch.full_like(t, 0.05))
        mean = (x - sigma**2 * x / 0.35) / alpha
        edges = torch.linspace(-1, 1, levels + 1, dtype=f64)
        below = torch.special.ndtr((edges - mean[..., None]) * alpha / sigma)
        below[..., 0], below[..., -1] = 0, 1
        mass = below.diff()
        assert torch.allclose(mass.sum(-1), torch.ones_like(mean))
        masses.append(-mass.gather(-1, k[..., None])[..., 0].log().sum(1) / (4 * math.log(2)))
    assert torch.allclose(out.reconstruction, torch.stack(masses).mean(0), rtol=1e-5)
    assert (out.unit, out.nfe, len(seen)) == ("bits/dim", 4, 4)
    spread = (masses[0] - masses[1]).abs() / 2
    assert (out.stderr > 0.99 * spread).all()


def test_discrete_data_are_decoded_where_half_a_bin_is_some_noise_wide():
    score = sd.GaussianMixture([1.0], torch.zeros(1, 3, dtype=f64), [0.5]).score(sd.VP())
    found = elbo(score, centres(2, 3, 8)[1], levels=8, terms=2)
    alpha, sigma = at(sd.VP(), found.t_min)
    assert alpha / 8 / sigma == pytest.approx(TAU)
    assert elbo(score, torch.zeros(2, 3), levels=None, terms=2).t_min == 1e-5


def test_uniform_levels_need_their_bits():
    levels = 8
    means = ((torch.arange(levels, dtype=f64) + 0.5) * 2 / levels - 1)[:, None]
    points = sd.GaussianMixture(torch.ones(levels), means, torch.full((levels,), 1e-4))
    _, x0 = centres(2000, 1, levels)
    out = elbo(points.score(sd.Cosine()), x0, levels=levels, terms=32)
    error = float(out.total.std()) / 2000**0.5
    assert abs(float(out.total.mean()) - 3.0) < 4 * error + 0.002
    assert error < 0.05


@pytest.mark.parametrize("density", DENSITIES)
def test_a_sample_does_not_depend_on_its_batch(mixture, density):
    x = mixture.sample(5, torch.Generator().manual_seed(0))
    settings = {"levels": None, "density": density, "seed": 2, "terms": 8}
    whole = elbo(mixture.score(sd.VP()), x, **settings)
    alone = elbo(mixture.score(sd.VP()), x[3:4], start_index=3, **settings)
    assert torch.allclose(alone.total, whole.total[3:4], rtol=1e-12)
    assert torch.allclose(alone.stderr, whole.stderr[3:4], rtol=1e-9)
    other = elbo(mixture.score(sd.VP()), x, **settings | {"seed": 3})
    assert not torch.allclose(whole.total, other.total)
    assert not torch.allclose(whole.t, other.t, rtol=1e-3)


@pytest.mark.parametrize("density", DENSITIES)
def test_any_shape_and_float32(sde, density):
    means = torch.full((1, 1, 2, 3), 0.1, dtype=f64)
    score = sd.GaussianMixture([1.0], means, [0.5]).score(sde)
    x0 = (torch.arange(12).reshape(2, 1, 2, 3) + 0.5) / 128 - 1
    settings = {"levels": None, "density": density, "terms": 8}
    out, fine = elbo(score, x0, **settings), elbo(score, x0.double(), **settings)
    assert out.total.shape == (2,)
    assert out.total.dtype == torch.float32
    assert out.values.shape == out.t.shape == (2, 8)
    assert torch.allclose(out.total.double(), fine.total, atol=2e-3)
    edges = torch.linspace(0, 1, 9, dtype=f64)
    start, end = (sde.log_snr(t) for t in (sde.t_min_likelihood, sde.t_max))
    if density == "data":
        share = (sde.log_snr(out.t) - start) / (end - start)
        assert (share > edges[:-1] - 1e-9).all()
        assert (share < edges[1:] + 1e-9).all()


def test_the_network_is_evaluated_in_eval_mode_without_gradients():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.drop = torch.nn.Linear(4, 4), torch.nn.Dropout(0.5)

        def forward(self, x, c_noise, y):
            assert not self.training
            assert not torch.is_grad_enabled()
            return self.drop(self.layer(x)) + y[:, None]

    model = sd.ScoreModel(Net(), sd.VP(), sd.Eps()).train()
    seen, x0 = [], centres(2, 4, 256)[1].float()
    out = elbo(model, x0, terms=6, y=torch.ones(2), progress=lambda *state: seen.append(state))
    assert model.training
    assert out.weights == "raw"
    assert [s[2] for s in seen] == list(range(6))
    assert [s[0] for s in seen] == pytest.approx([i / 8 for i in range(6)])
    assert not out.total.requires_grad
    with pytest.raises(ValueError, match="'y' has 3 values for 2 samples"):
        elbo(model, x0, y=torch.ones(3))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"levels": 256}, "centres of 256 bins"),
        ({"levels": None, "density": "ode"}, "unknown density 'ode'; accepted: data, smoothed"),
        ({"levels": None, "times": "quadratic"}, "unknown times.*importance, logistic, uniform"),
        ({"levels": None, "terms": 0}, "terms >= 1 and draws >= 1, got 0 and 2"),
        ({"levels": None, "draws": 0}, "got 64 and 0"),
        ({"levels": None, "t_min": 1e-6}, r"t_min=1e-06 must lie in the trained times \[1e-05"),
        ({"levels": None, "t_min": 1.0}, "t_min=1 must lie"),
        ({"levels": None, "density": "smoothed", "times": "uniform"}, "no finite variance"),
        ({"levels": None, "reference": (0.0, 0.0)}, "std > 0"),
        ({"levels": None, "reference": (torch.zeros(3), 1.0)}, r"item of shape \(2,\)"),
    ],
)
def test_what_does_not_fit_is_refused(mixture, settings, match):
    x = torch.full((2, 2), 0.1, dtype=f64)
    with pytest.raises(ValueError, match=match):
        elbo(mixture.score(sd.VP()), x, **settings)
    on = centres(2, 2, 256)[1]
    with pytest.raises(ValueError, match="give levels=None"):
        elbo(mixture.score(sd.VP()), on, density="smoothed")


def test_one_term_tells_nothing_of_its_error(mixture):
    x = mixture.sample(2)
    for settings in ({"terms": 1}, {"draws": 1}):
        out = elbo(mixture.score(sd.VP()), x, levels=None, **settings)
        assert out.stderr.isnan().all()
        assert out.total.isfinite().all()
