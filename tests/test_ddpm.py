"""DDPM's tables, and ancestral sampling, against diffusers, number by number."""

import math
from itertools import pairwise

import pytest
import torch
import yaml

import scoresde as sd
from scoresde import config, grids, solvers

try:
    import diffusers
except ImportError:
    diffusers = None

foreign = pytest.mark.skipif(diffusers is None, reason="needs diffusers")
TABLES = {
    "linear": sd.DDPM(),
    "scaled-linear": sd.DDPM(1000, 0.00085, 0.012, "scaled-linear"),
    "cosine": sd.DDPM(schedule="cosine"),
    "sigmoid": sd.DDPM(schedule="sigmoid"),
    "own": sd.DDPM(betas=(0.01, 0.3, 0.02, 0.9, 0.5)),
}
THEIRS = {"scaled-linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


@pytest.fixture(params=list(TABLES))
def kind(request):
    return request.param


def scheduler(betas, variance):
    """diffusers' scheduler on a table of ours, its arithmetic raised to float64."""
    found = diffusers.DDPMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas.tolist(),
        clip_sample=False,
        variance_type=f"fixed_{variance}",
    )
    found.betas, found.alphas = betas, 1 - betas
    found.alphas_cumprod = found.alphas.cumprod(0)
    found.one = torch.tensor(1.0, dtype=torch.float64)
    return found


def table(sde, steps):
    """``v^2`` of the transitions of a uniform grid, in DDPM's order, and its times from 0."""
    times = torch.linspace(0, sde.t_max, steps + 1, dtype=torch.float64)
    return torch.stack([sde.transition(t, s)[1] ** 2 for s, t in pairwise(times)]), times


def draw(seed, shape=(3, 2, 4)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@foreign
@pytest.mark.parametrize("kind", [k for k in TABLES if k != "own"])
def test_the_table_is_that_of_diffusers(kind):
    """They compute it in float32: each beta to 1e-7 beside 1, which is 1e-5 of the smallest.

    Of ``1 - f(t)/f(s)`` they round to float32 last, and of a product of 1000 factors every one.
    """
    sde = TABLES[kind]
    own = diffusers.DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=sde.beta_start,
        beta_end=sde.beta_end,
        beta_schedule=THEIRS.get(kind, kind),
    )
    betas, times = table(sde, 1000)
    torch.testing.assert_close(betas.float(), own.betas, rtol=1e-5, atol=0)
    power = sde.alpha(times[1:]) ** 2
    torch.testing.assert_close(power.float(), own.alphas_cumprod, rtol=1e-4, atol=0)


def test_tables_in_closed_form():
    n = 50
    index = torch.arange(1, n + 1, dtype=torch.float64)
    b, e = 0.01, 0.4
    u = (index - 1) / (n - 1)
    expected = {
        "linear": b + (e - b) * u,
        "scaled-linear": (b**0.5 + (e**0.5 - b**0.5) * u) ** 2,
        "sigmoid": b + (e - b) / (1 + torch.exp(6 - 12 * u)),
    }
    for schedule, betas in expected.items():
        found, _ = table(sd.DDPM(n, b, e, schedule), n)
        torch.testing.assert_close(found, betas, rtol=1e-12, atol=0)
    # The product telescopes to f(t)/f(0) up to the last, capped step.
    sde = sd.DDPM(n, schedule="cosine")
    t = torch.arange(n, dtype=torch.float64) / n
    f = torch.cos(math.pi / 2 * (t + 0.008) / 1.008) ** 2
    torch.testing.assert_close(sde.alpha(t) ** 2, f / f[0], rtol=1e-12, atol=0)
    ratio = sde.alpha(1.0) ** 2 / sde.alpha((n - 1) / n) ** 2
    assert float(ratio) == pytest.approx(0.001, rel=1e-12)


def test_a_table_of_ones_own():
    betas = (0.01, 0.3, 0.02, 0.9, 0.5)
    sde = sd.DDPM(betas=list(betas), schedule="cosine")
    assert sde.num_steps == 5
    assert sde.betas == betas
    torch.testing.assert_close(table(sde, 5)[0], torch.tensor(betas, dtype=torch.float64))
    assert sde == sd.DDPM(7, schedule="cosine", betas=betas)
    assert hash(sde) != hash(sd.DDPM(betas=betas[:4]))
    single = sd.DDPM(betas=torch.tensor(betas))  # of float32, which is not rounded again
    assert single.betas[1] == float(torch.tensor(0.3))


def test_the_default_and_its_positions_have_not_moved():
    assert sd.DDPM() == sd.DDPM(1000, 1e-4, 0.02)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    log_alpha = torch.log1p(-betas).cumsum(0) / 2
    assert torch.equal(sd.DDPM()._log_alphas[1:], log_alpha)


def test_yaml_round_trip(kind):
    sde = TABLES[kind]
    section = yaml.safe_load(yaml.safe_dump(config.describe(sde)))
    assert config.build(section, sd.sde, "sde") == sde
    assert section["name"] == "ddpm"
    if kind == "own":
        assert section["betas"] == list(sde.betas)


def test_time_rate_and_transitions_hold_for_every_table(kind):
    sde = TABLES[kind]
    n = sde.num_steps
    t = torch.cat([torch.arange(1, n + 1), torch.rand(200).double() * n]).double() / n
    t = t.clamp_min(sde.t_min)
    torch.testing.assert_close(sde.time(sde.log_snr(t)), t, rtol=1e-11, atol=0)
    assert (sde.log_snr(t.sort().values.unique()).diff() < 0).all()
    inside = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    h = 0.1 / n
    slope = (sde.log_alpha(inside + h) - sde.log_alpha(inside - h)) / (2 * h)
    torch.testing.assert_close(sde.drift_rate(inside), slope, rtol=1e-8, atol=0)
    torch.testing.assert_close(sde.diffusion(inside) ** 2, -2 * slope, rtol=1e-8, atol=0)
    torch.testing.assert_close(sde.alpha(t) ** 2 + sde.sigma(t) ** 2, torch.ones_like(t))


SNR = {"linear": 4.036e-5, "scaled-linear": 4.682e-3, "cosine": 2.429e-9, "sigmoid": 3.968e-5}


def test_the_end_of_every_table_is_sane(kind):
    """The cosine table ends at a signal of 2.4e-9 of the noise, which float32 still resolves."""
    sde = TABLES[kind]
    snr = torch.exp(2 * sde.log_snr(1.0))
    if kind in SNR:
        assert float(snr) == pytest.approx(SNR[kind], rel=1e-3)
    assert sde.prior_std == 1
    for t in (sde.t_min, 1 / sde.num_steps, 0.5, 1 - 0.5 / sde.num_steps, 1.0):
        single = torch.tensor([t], dtype=torch.float32)
        exact = single.double()
        for name, rtol in (
            ("alpha", 1e-4),
            ("sigma", 1e-4),
            ("log_snr", 1e-5),
            ("diffusion", 1e-4),
        ):
            found, expected = getattr(sde, name)(single), getattr(sde, name)(exact)
            assert found.dtype == torch.float32
            assert found.isfinite().all()
            torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=1e-6)
        back = sde.time(sde.log_snr(single))
        torch.testing.assert_close(back, single, rtol=2e-5, atol=0)
    z = sde.prior_sample((3, 2), torch.Generator().manual_seed(0))
    assert z.isfinite().all()
    assert sde.prior_log_prob(z).isfinite().all()


@pytest.mark.parametrize("kind", ["cosine", "sigmoid", "scaled-linear"])
def test_a_mixture_is_sampled_on_every_table(mixture, kind):
    score = mixture.score(TABLES[kind])
    out = sd.sample(score, (2000, 2), solver="dpmpp-2m", steps=60, seed=0)
    mean, covariance = mixture.moments()
    assert (out.x.mean(0) - mean).abs().max() < 0.08
    assert (out.x.T.cov() - covariance).abs().max() < 0.08


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "cosin"}, "unknown schedule of DDPM 'cosin'; did you mean 'cosine'"),
        ({"betas": ()}, "1 <= num_steps <= 1000000"),
        ({"betas": (0.1, 1.0)}, r"beta in \(0, 1\), got 1.0 as number 2 of 2"),
        ({"betas": (math.nan, 0.1)}, "got nan as number 1 of 2"),
        ({"betas": (0.1, 0.0)}, "got 0.0 as number 2 of 2"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "0 < beta_start <= beta_end < 1"),
    ],
)
def test_bad_tables_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        sd.DDPM(**fields)
    with pytest.raises(sd.ConfigError, match=message):
        config.build({"name": "ddpm", **fields}, sd.sde, "sde")


@foreign
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize(
    ("sde", "steps"),
    [(sd.DDPM(), 1000), (sd.VP(), 1000), (sd.VP(), 20), (sd.Cosine(), 50)],
    ids=repr,
)
def test_steps_are_those_of_diffusers(sde, steps, variance):
    """Any variance-preserving process on its own N points, N = 20 included."""
    betas, times = table(sde, steps)
    theirs, ours = scheduler(betas, variance), solvers.Ancestral(variance)
    x, eps = draw(0), draw(1)
    reverse = sde.reverse(lambda x, t: -eps / sde.sigma(t))
    for i in sorted({1, 2, steps // 2, steps - 2, steps - 1}):
        generators = (torch.Generator().manual_seed(i) for _ in range(2))
        expected = theirs.step(eps, i, x, generator=next(generators)).prev_sample
        found, _ = ours.step(reverse, x, times[i + 1], times[i], next(generators), None)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@foreign
@pytest.mark.parametrize("variance", ["small", "large"])
def test_a_whole_chain_with_the_last_denoising(mixture, variance):
    """N - 1 steps and Tweedie's formula are DDPM's N steps, the last without noise."""
    sde = sd.DDPM(num_steps=12, beta_start=0.01, beta_end=0.5, t_min_sampling=1 / 12)
    score, solver = mixture.score(sde), solvers.Ancestral(variance)
    betas, table_times = table(sde, 12)
    theirs = scheduler(betas, variance)
    generator = torch.Generator().manual_seed(5)
    expected = x = draw(0, (4, 2))
    for i in reversed(range(12)):
        eps = score.noise(expected, table_times[i + 1])
        expected = theirs.step(eps, i, expected, generator=generator).prev_sample
    reverse = solver.reverse(score)
    times = grids.Uniform()(sde, 11, 1.0, sde.t_min_sampling)
    out = solver.integrate(reverse, x, times, torch.Generator().manual_seed(5))
    found = reverse.denoise(out.x, times[-1])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@foreign
def test_perturb_is_add_noise():
    sde = sd.DDPM()
    betas, times = table(sde, 1000)
    x, eps = draw(0), draw(1)
    for i in (0, 499, 999):
        expected = scheduler(betas, "small").add_noise(x, eps, torch.tensor([i] * len(x)))
        torch.testing.assert_close(
            sde.perturb(x, times[i + 1], eps), expected, rtol=1e-8, atol=1e-8
        )
