import math
from dataclasses import dataclass

import pytest
import torch

import scoresde as sd
from scoresde.sde.base import as_time

f64 = torch.float64


def times(sde, n=41):
    """Times from ``t_min`` to ``t_max``, half of them near ``t_min``, off DDPM's kinks."""
    low = torch.logspace(math.log10(sde.t_min), math.log10(sde.t_max), n, dtype=f64)
    even = torch.linspace(sde.t_min, sde.t_max, n, dtype=f64)
    t = torch.cat([low, even]).clamp(sde.t_min * (1 + 1e-3), sde.t_max * (1 - 1e-6))
    if isinstance(sde, sd.DDPM):
        t = ((t * sde.num_steps).floor() + 0.37) / sde.num_steps
    return t.unique()


def slope(fn, t):
    """Central difference of fourth order, its step small beside ``t``, the end and a kink."""
    end = 1.01 * t.max()
    h = torch.minimum(5e-3 * torch.minimum(t, end - t), 1e-4 * end)
    inner, outer = fn(t + h) - fn(t - h), fn(t + 2 * h) - fn(t - 2 * h)
    return (8 * inner - outer) / (12 * h)


def test_drift_and_diffusion_are_those_of_the_kernel(sde):
    """``dm/dt = f`` for the mean, ``dv/dt = 2 f' v + g^2`` for the variance."""
    t = times(sde)
    x0 = torch.tensor([[0.7]], dtype=f64)
    mean = x0 * sde.alpha(t)[:, None]
    rate = (sde.drift(mean, t) / x0)[:, 0]
    assert torch.allclose(slope(sde.alpha, t), rate, rtol=1e-6, atol=1e-9)
    variance = sde.sigma(t) ** 2
    growth = 2 * sde.drift(torch.ones_like(mean), t)[:, 0] * variance + sde.diffusion(t) ** 2
    assert torch.allclose(slope(lambda u: sde.sigma(u) ** 2, t), growth, rtol=1e-6, atol=1e-9)


def test_drift_rate_and_diffusion_agree_with_the_derivation(sde):
    """The closed forms that subclasses give against what alpha and sigma imply."""
    t = times(sde)
    base = sd.GaussianSDE
    rate, g = base.drift_rate(sde, t), base.diffusion(sde, t)
    assert torch.allclose(sde.drift_rate(t), rate, rtol=1e-8, atol=1e-12)
    assert torch.allclose(sde.diffusion(t), g, rtol=1e-8)
    expected = (-2 * sde.sigma(t) ** 2 * slope(sde.log_snr, t)).sqrt()
    assert torch.allclose(sde.diffusion(t), expected, rtol=1e-5)


def test_float32_keeps_its_digits_down_to_t_min(sde):
    t64 = times(sde)
    t32 = t64.float()
    t64 = t32.double()  # the same times exactly
    for name in ("alpha", "sigma", "log_snr", "diffusion", "drift_rate"):
        single, double = getattr(sde, name)(t32), getattr(sde, name)(t64)
        assert single.dtype == torch.float32
        assert double.dtype == f64
        # Cosine's tan and Linear's 1/(1 - t) amplify the rounding of float32 near t_max, and
        # DDPM's rate is a difference of neighbours in its table.
        steep = {sd.Cosine: 1e-3, sd.Linear: 1e-3, sd.DDPM: 1e-4}.get(type(sde), 3e-5)
        assert torch.allclose(single.double(), double, rtol=steep, atol=1e-6), name
    relative = (sde.sigma(t32).double() / sde.sigma(t64) - 1).abs()
    assert relative[t64 < 0.1].max() < 2e-5


def test_time_inverts_log_snr(sde):
    t = times(sde)
    snr = sde.log_snr(t)
    assert (snr.diff() < 0).all()
    assert torch.allclose(sde.time(snr), t, rtol=1e-9, atol=1e-14)
    by_bisection = sd.GaussianSDE.time(sde, snr)
    assert torch.allclose(by_bisection, t, rtol=1e-9, atol=1e-14)
    assert torch.allclose(snr, (sde.alpha(t) / sde.sigma(t)).log(), atol=1e-12)
    assert torch.allclose(snr, sde.log_alpha(t) - sde.sigma(t).log(), atol=1e-12)


def test_transition_composes_to_the_kernel(sde):
    """Chapman-Kolmogorov: 0 -> s -> t has the mean and variance of 0 -> t."""
    t = times(sde)
    s, t = t[:-1], t[1:]
    a, v = sde.transition(t, s)
    assert torch.allclose(a * sde.alpha(s), sde.alpha(t), rtol=1e-12)
    assert torch.allclose((a * sde.sigma(s)) ** 2 + v**2, sde.sigma(t) ** 2, rtol=1e-9)
    short = s * (1 + 1e-9)
    _, v = sde.transition(short, s)
    exact = sde.diffusion(s) * (short - s).sqrt()
    assert torch.allclose(v, exact, rtol=1e-3)


def test_published_closed_forms():
    t = torch.linspace(0.01, 0.99, 9, dtype=f64)
    vp = sd.VP(0.1, 20.0)
    integral = 0.1 * t + 19.9 * t**2 / 2
    assert torch.allclose(vp.alpha(t), torch.exp(-integral / 2))
    assert torch.allclose(vp.sigma(t), (1 - torch.exp(-integral)).sqrt())
    assert torch.allclose(vp.diffusion(t), (0.1 + 19.9 * t).sqrt())
    sub = sd.SubVP(0.1, 20.0)
    assert torch.allclose(sub.sigma(t), 1 - torch.exp(-integral))
    g2 = (0.1 + 19.9 * t) * (1 - torch.exp(-2 * integral))
    assert torch.allclose(sub.diffusion(t) ** 2, g2)
    ve = sd.VE(0.01, 50.0)
    assert torch.allclose(ve.sigma(t), 0.01 * 5000.0**t)
    assert torch.allclose(ve.diffusion(t), 0.01 * 5000.0**t * math.sqrt(2 * math.log(5000)))
    cosine = sd.Cosine()
    nichol = (
        torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    )
    assert torch.allclose(cosine.alpha(t) ** 2, nichol)
    assert torch.allclose(cosine.sigma(t) ** 2, 1 - nichol)
    edm = sd.EDM()
    assert (edm.t_min, edm.t_max) == (0.002, 80.0)
    assert torch.allclose(edm.sigma(t), t)
    assert torch.allclose(edm.diffusion(t), (2 * t).sqrt())
    assert torch.allclose(sd.Linear().alpha(t) + sd.Linear().sigma(t), torch.ones_like(t))
    assert float(vp.alpha(1.0)) == pytest.approx(math.exp(-10.05 / 2), rel=1e-12)


def test_ddpm_table_is_exact_at_its_points():
    sde = sd.DDPM()
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=f64)
    bars = (1 - betas).cumprod(0)
    t = torch.arange(1001, dtype=f64) / 1000
    assert torch.allclose(sde.alpha(t[1:]) ** 2, bars, rtol=1e-12)
    assert torch.allclose(sde.sigma(t[1:]) ** 2, 1 - bars, rtol=1e-11)
    assert float(sde.alpha(0.0)) == 1
    a, v = sde.transition(t[2:], t[1:-1])
    assert torch.allclose(v**2, betas[1:], rtol=1e-9)
    assert torch.allclose(a**2, 1 - betas[1:], rtol=1e-12)
    # Its limit for many steps is VP with N beta.
    assert float(sde.alpha(1.0)) == pytest.approx(float(sd.VP().alpha(1.0)), rel=0.06)


def test_ddpm_table_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000)
    t = torch.arange(1, 1001, dtype=f64) / 1000
    assert torch.allclose(sd.DDPM().alpha(t).float() ** 2, scheduler.alphas_cumprod, rtol=2e-5)


def test_priors(sde):
    expected = {"VE": 50.0, "EDM": 80.0}.get(type(sde).__name__, 1.0)
    assert sde.prior_std == pytest.approx(expected)
    z = sde.prior_sample((20_000, 2, 3), torch.Generator().manual_seed(0), dtype=f64)
    assert z.shape == (20_000, 2, 3)
    assert float(z.mean() / expected) == pytest.approx(0, abs=0.02)
    assert float(z.std() / expected) == pytest.approx(1, abs=0.01)
    normal = torch.distributions.Normal(torch.zeros((), dtype=f64), expected)
    assert torch.allclose(sde.prior_log_prob(z), normal.log_prob(z).flatten(1).sum(1))
    # What sampling starts from is close to what the data become.
    end = sde.alpha(sde.t_max) ** 2 * 0.25 + sde.sigma(sde.t_max) ** 2
    assert float(end.sqrt() / expected) == pytest.approx(1, abs=2e-3)
    generator = [torch.Generator().manual_seed(5) for _ in range(2)]
    draws = [sde.prior_sample((4, 3), g, dtype=f64) for g in generator]
    assert torch.equal(*draws)


def test_perturbed_data_have_the_moments_of_the_kernel(sde):
    t = 0.4 * sde.t_max
    generator = torch.Generator().manual_seed(0)
    x0 = torch.full((40_000, 1), 1.5, dtype=f64)
    x = sde.perturb(x0, t, torch.randn(x0.shape, generator=generator, dtype=f64))
    sigma = float(sde.sigma(t))
    assert float(x.mean()) == pytest.approx(1.5 * float(sde.alpha(t)), abs=0.02 * sigma)
    assert float(x.std()) == pytest.approx(sigma, rel=0.015)


def test_t_broadcasts_to_any_shape(sde):
    t = torch.tensor([0.2, 0.5]) * sde.t_max
    for shape in ((3,), (2, 3), (1, 2, 3), (1, 2, 2, 2)):
        x0, eps = torch.randn(2, *shape), torch.randn(2, *shape)
        x, f = sde.perturb(x0, t, eps), sde.drift(x0, t)
        assert x.shape == f.shape == (2, *shape)
        assert x.dtype == f.dtype == torch.float32
        for i in range(2):
            alone = sde.perturb(x0[i : i + 1], float(t[i]), eps[i : i + 1])
            assert torch.allclose(alone[0], x[i], rtol=1e-5, atol=1e-6)
            assert torch.allclose(sde.drift(x0[i : i + 1], float(t[i]))[0], f[i], rtol=1e-4)


def test_reverse_drift_and_noise(sde):
    mixture = sd.GaussianMixture([1.0], torch.zeros(1, 2, dtype=f64), [0.5])
    score = mixture.score(sde)
    x, t = torch.randn(3, 2, dtype=f64), as_time(0.3 * sde.t_max)
    for eta in (0.0, 0.7, 1.0):
        reverse = sde.reverse(score, eta)
        g2 = sde.diffusion(t) ** 2
        expected = sde.drift(x, t) - (1 + eta**2) / 2 * g2 * score(x, t)
        assert torch.allclose(reverse.drift(x, t), expected)
        assert torch.allclose(reverse.diffusion(t), eta * sde.diffusion(t))
        assert reverse.nfe == 1
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    denoised = reverse.denoise(x, t)
    shrink = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
    assert torch.allclose(denoised, shrink * x)
    assert torch.allclose(alpha * denoised + sigma * reverse.noise(x, t), x)


@dataclass(frozen=True)
class OnlyTheTwo(sd.GaussianSDE):
    """A process of a user's own: nothing but alpha and sigma."""

    def alpha(self, t):
        return 1 / (1 + as_time(t) ** 2)

    def sigma(self, t):
        return as_time(t) * (1 + 0.5 * as_time(t))


def test_a_process_with_only_alpha_and_sigma_derives_the_rest():
    sde = OnlyTheTwo()
    t = torch.linspace(0.01, 0.99, 25, dtype=f64)
    rate = -2 * t / (1 + t**2)
    growth = 2 * t * (1 + 0.5 * t) * (1 + t)
    assert torch.allclose(sde.drift_rate(t), rate)
    assert torch.allclose(sde.diffusion(t) ** 2, growth - 2 * rate * sde.sigma(t) ** 2)
    assert torch.allclose(sde.time(sde.log_snr(t)), t, rtol=1e-12)
    assert torch.allclose(sde.drift(torch.ones(25, 1, dtype=f64), t)[:, 0], rate)
    assert sde.prior_std == 1.5
    a, v = sde.transition(t[1:], t[:-1])
    composed = (a * sde.sigma(t[:-1])) ** 2 + v**2
    assert torch.allclose(composed, sde.sigma(t[1:]) ** 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sd.VP(beta_min=0.0), "0 < beta_min <= beta_max, got beta_min=0"),
        (lambda: sd.VP(beta_min=5.0, beta_max=1.0), "beta_min <= beta_max"),
        (lambda: sd.SubVP(beta_min=-1.0), "SubVP needs"),
        (lambda: sd.VE(sigma_min=0.0), "0 < sigma_min < sigma_max"),
        (lambda: sd.VE(sigma_min=2.0, sigma_max=1.0), "VE needs"),
        (lambda: sd.EDM(sigma_min=90.0), "EDM needs"),
        (lambda: sd.Cosine(s=0.0), "s > 0"),
        (lambda: sd.Cosine(t_max=1.0), "t_max < 1"),
        (lambda: sd.Linear(t_max=1.0), "t_max < 1"),
        (lambda: sd.DDPM(num_steps=0), "1 <= num_steps"),
        (lambda: sd.DDPM(beta_end=1.0), "beta_end < 1"),
        (lambda: sd.VP(t_min=1.0), "0 <= t_min < t_max"),
        (lambda: sd.VP(t_min=-0.1), "0 <= t_min < t_max"),
        (
            lambda: sd.VP(t_min_sampling=1e-7),
            "t_min_sampling=1e-07 lies outside the trained times",
        ),
        (lambda: sd.VP(t_min=1e-3, t_min_likelihood=1e-4), "t_min_likelihood"),
        (lambda: sd.VP(beta_min=math.nan), "beta_min"),
    ],
)
def test_bad_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_processes_are_frozen_and_compare_by_value():
    assert sd.VP() == sd.VP(0.1, 20.0)
    assert sd.VP() != sd.VP(beta_max=19.0)
    with pytest.raises(AttributeError):
        sd.VP().beta_min = 1.0
