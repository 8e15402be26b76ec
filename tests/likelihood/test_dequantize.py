import math

import numpy as np
import pytest
import torch
from scipy import stats

import scoresde as sd
from scoresde.config import build, describe, names
from scoresde.data import Scaler
from scoresde.likelihood import dequantize
from scoresde.likelihood.dequantize import (
    Decoder,
    TruncatedNormal,
    Uniform,
    decode,
    importance_weighted,
    mean_bound,
)
from scoresde.noise import KeyedNoise

f64 = torch.float64
SEED = 1 << 40
ROUGH = sd.GaussianMixture(
    [1.0, 1.0, 1.0],
    torch.tensor([[-0.65], [0.1], [0.55]], dtype=f64),
    torch.tensor([0.1, 0.25, 0.08], dtype=f64),
)
FLAT = torch.distributions.Uniform(-1.0, 1.0)


def byte_scaler(levels):
    return Scaler((levels / 2,), (2 / levels,), levels)


def every(levels, draws):
    """Each level ``draws`` times, ``(levels * draws, 1)``, float64."""
    return torch.arange(levels, dtype=f64).repeat_interleave(draws)[:, None]


def log_mass(mixture, low, high):
    """Log of the mass of the boxes from ``low`` to ``high (N, D)``, exactly."""
    total = 0
    for w, m, s in zip(mixture.weights, mixture.means, mixture.stds, strict=True):
        between = torch.special.ndtr((high - m) / s) - torch.special.ndtr((low - m) / s)
        total = total + w * between.prod(1)
    return total.log()


def at(mixture, sde, t):
    """The mixture at time ``t``, as a mixture."""
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    stds = (alpha**2 * mixture.stds**2 + sigma**2).sqrt()
    return sd.GaussianMixture(mixture.weights, alpha * mixture.means, stds)


def values(dequantization, k, scaler, sde, mixture, seed=0, start=0):
    """``log p_t(x) - log q`` of each item: of the data themselves where no time is said."""
    out = dequantization.draw(k, scaler, sde, KeyedNoise(seed, start))
    where = () if out.t_min is None else (sde, out.t_min)
    return mixture.log_prob(out.x.to(f64), *where) - out.log_q


# --- the bounds against exact probabilities ---------------------------------------------------


def quadrature(log_p, log_q, x):
    """``log int p`` and ``int q (log p - log q)`` over the grid ``x`` by Simpson's rule."""
    from scipy.integrate import simpson

    p, q = log_p.exp(), log_q.exp()
    assert simpson(q.numpy(), x=x.numpy()) == pytest.approx(1, abs=1e-6)
    exact = math.log(simpson(p.numpy(), x=x.numpy()))
    return exact, simpson((q * (log_p - log_q)).numpy(), x=x.numpy())


@pytest.mark.parametrize("k", [0, 2, 3, 7])
def test_uniform_is_the_integral_over_the_bin(k):
    scaler, draws = byte_scaler(8), 20_000
    x = torch.linspace(k / 4 - 1, (k + 1) / 4 - 1, 2001, dtype=f64)
    exact, mean = quadrature(ROUGH.log_prob(x[:, None]), torch.full_like(x, math.log(4)), x)
    found = values(Uniform(), torch.full((draws, 1), k, dtype=f64), scaler, sd.VP(), ROUGH)
    assert abs(float(found.mean()) - mean) < 4 * float(found.std()) / draws**0.5
    assert mean < exact
    low, high = (torch.tensor([[v]], dtype=f64) for v in (k / 4 - 1, (k + 1) / 4 - 1))
    assert float(log_mass(ROUGH, low, high)) == pytest.approx(exact, rel=1e-8)
    together, error = importance_weighted(found[:, None])
    assert abs(float(together) - exact) < 4 * float(error)


@pytest.mark.parametrize("name", ["vp", "cosine", "edm", "linear"])
@pytest.mark.parametrize(("k", "tau"), [(0, 3.0), (3, 3.0), (6, 1.0)])
def test_truncated_normal_is_the_integral_over_the_shrunk_bin(name, k, tau):
    sde, scaler, draws = build(name, sd.sde, "sde"), byte_scaler(8), 20_000
    way = TruncatedNormal(tau)
    t = way.time(scaler, sde)
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    assert alpha * 0.125 / sigma == pytest.approx(tau, rel=1e-9)
    low, high = alpha * (k / 4 - 1), alpha * ((k + 1) / 4 - 1)
    x = torch.linspace(low, high, 2001, dtype=f64)
    reference = stats.truncnorm(-tau, tau, loc=(low + high) / 2, scale=sigma)
    log_q = torch.from_numpy(reference.logpdf(x.numpy().clip(low + 1e-12, high - 1e-12)))
    exact, mean = quadrature(ROUGH.log_prob(x[:, None], sde, t), log_q, x)
    found = values(way, torch.full((draws, 1), k, dtype=f64), scaler, sde, ROUGH)
    assert abs(float(found.mean()) - mean) < 4 * float(found.std()) / draws**0.5
    edges = (torch.tensor([[v]], dtype=f64) for v in (low, high))
    assert float(log_mass(at(ROUGH, sde, t), *edges)) == pytest.approx(exact, abs=1e-6)
    together, error = importance_weighted(found[:, None])
    assert abs(float(together) - exact) < 4 * float(error)


@pytest.mark.parametrize("t", [0.05, 0.3])
def test_decoder_is_the_integral_over_all_space(t):
    sde, levels, draws = sd.VP(), 8, 20_000
    scaler = byte_scaler(levels)
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    centres = alpha * ((torch.arange(levels, dtype=f64) + 0.5) / 4 - 1)
    x = torch.linspace(-6, 6, 40_001, dtype=f64)
    log_n = -(((x[:, None] - centres) / sigma) ** 2) / 2
    log_decoder = torch.log_softmax(log_n, 1)
    total = 0.0
    for k in range(levels):
        log_q = log_n[:, k] - math.log(sigma * math.sqrt(2 * math.pi))
        log_p = ROUGH.log_prob(x[:, None], sde, t) + log_decoder[:, k]
        exact, mean = quadrature(log_p, log_q, x)
        found = values(Decoder(t), torch.full((draws, 1), k, dtype=f64), scaler, sde, ROUGH)
        assert abs(float(found.mean()) - mean) < 4 * float(found.std()) / draws**0.5
        together, error = importance_weighted(found[:, None])
        assert abs(float(together) - exact) < 4 * float(error)
        total += math.exp(exact)
    assert total == pytest.approx(1, abs=1e-8)  # the decoder's probabilities are a distribution


@pytest.mark.parametrize("way", [Uniform(), TruncatedNormal(2.0), Decoder(0.02)])
def test_more_draws_are_tighter_and_never_pass_the_truth(way, mixture):
    """In two dimensions: IW bounds of 1, 4 and 16 draws rise towards the box's probability."""
    sde, levels, items = sd.VP(), 6, 400
    scaler = Scaler((3.0,), (0.8, 0.9), levels)
    x = mixture.sample(items, torch.Generator().manual_seed(0))
    k = scaler.decode(x).to(f64)
    drawn = torch.stack([values(way, k, scaler, sde, mixture, 1, j * items) for j in range(64)])
    bounds = []
    for count in (1, 4, 16, 64):
        parts = drawn.unflatten(0, (-1, count))
        bounds.append(torch.stack([importance_weighted(part)[0] for part in parts]).mean(0))
    means = [float(b.mean()) for b in bounds]
    assert means[0] == pytest.approx(float(mean_bound(drawn)[0].mean()), rel=1e-9)
    assert means[0] < means[1] < means[2] < means[3]
    if not isinstance(way, Decoder):
        alpha, law = 1.0, mixture
        if isinstance(way, TruncatedNormal):
            t = way.time(scaler, sde)
            alpha, law = float(sde.alpha(t)), at(mixture, sde, t)
        scale = torch.tensor(scaler.scale, dtype=f64)
        truth = log_mass(law, alpha * (k - 3) * scale, alpha * (k + 1 - 3) * scale)
        assert float(truth.mean()) > means[3]
        assert float(truth.mean() - means[3]) < 0.2 * float(truth.mean() - means[0])


def test_uniform_is_exact_where_the_density_is():
    scaler = byte_scaler(16)
    out = Uniform().draw(every(16, 4), scaler, sd.VP(), KeyedNoise(0))
    bound = FLAT.log_prob(out.x)[:, 0] - out.log_q
    assert torch.allclose(bound, torch.full_like(bound, -math.log(16)), rtol=1e-12)


# --- uniform ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, f64])
def test_uniform_draws_the_numbers_it_always_drew(dtype):
    scaler = Scaler((4.0, 3.0, 5.0), (0.25, -0.5, 0.1), 8)
    k = torch.randint(0, 8, (5, 3, 2, 2), generator=torch.Generator().manual_seed(0)).to(dtype)
    out = Uniform().draw(k, scaler, sd.VP(), KeyedNoise(7 ^ SEED, 11))
    u = KeyedNoise(7 ^ SEED, 11).uniform(tuple(k.shape), None, torch.float32)
    assert torch.equal(out.x.float(), scaler.encode(k, noise=u).float())
    assert out.x.dtype == (f64 if dtype == f64 else torch.float32)
    expected = -4 * (math.log(0.25) + math.log(0.5) + math.log(0.1))
    assert out.log_q.tolist() == pytest.approx([expected] * 5, rel=1e-12)
    assert out.t_min is None


# --- truncated normal -------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.1, 1.0, 3.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.uint8, f64])
def test_truncated_normal_against_scipy(tau, dtype):
    levels, n = 4, 40_000
    sde, scaler, way = sd.Linear(), byte_scaler(levels), TruncatedNormal(tau)
    k = every(levels, n // levels).to(dtype)
    out = way.draw(k, scaler, sde, KeyedNoise(3))
    alpha, sigma = float(sde.alpha(out.t_min)), float(sde.sigma(out.t_min))
    centre = alpha * ((k.to(f64) + 0.5) / 2 - 1)
    eps = ((out.x.to(f64) - centre) / sigma)[:, 0]
    rounding = 2e-7 / sigma if dtype == torch.uint8 else 1e-12
    reference = stats.truncnorm(-tau, tau)
    assert float(eps.abs().max()) <= tau + rounding
    log_q = torch.from_numpy(reference.logpdf(eps.numpy().clip(-tau, tau))) - math.log(sigma)
    assert torch.allclose(out.log_q, log_q, rtol=0, atol=tau * rounding + 1e-7)
    assert stats.kstest(eps.numpy(), reference.cdf).pvalue > 1e-3
    for power in (1, 2, 3, 4):
        moment, error = eps**power, reference.moment(2 * power) ** 0.5 / n**0.5
        assert abs(float(moment.mean()) - reference.moment(power)) < 4 * error
    entropy = float(reference.entropy()) + math.log(sigma)
    assert way.entropy((1,), scaler, sde) == pytest.approx(entropy, abs=1e-9)
    assert float(-out.log_q.mean()) == pytest.approx(entropy, abs=4 * float(out.log_q.std()) / 200)


def test_the_tails_keep_their_precision():
    """The smallest and the largest uniform number, and the law beyond 2.9 standard deviations."""

    class Ends(KeyedNoise):
        def uniform(self, shape, device=None, dtype=None):
            return torch.tensor([[0.0], [1 - 2.0**-24]], dtype=dtype)

    scaler, sde = byte_scaler(2), sd.Linear()
    for tau in (3.0, 8.0):
        k = torch.zeros(2, 1, dtype=f64)
        out = TruncatedNormal(tau).draw(k, scaler, sde, Ends(0))
        alpha, sigma = float(sde.alpha(out.t_min)), float(sde.sigma(out.t_min))
        eps = (out.x[:, 0] + alpha / 2) / sigma
        end = stats.truncnorm(-tau, tau).ppf(2.0**-25)
        assert eps.tolist() == pytest.approx([end, -end], rel=1e-9)


def test_the_time_is_the_sdes_own(sde):
    scaler = byte_scaler(2)
    way = TruncatedNormal()
    t = way.time(scaler, sde)
    assert float(sde.log_snr(t)) == pytest.approx(math.log(6), abs=1e-6)
    assert sde.t_min <= t < sde.t_max


def test_channels_have_taus_of_their_own():
    scaler, sde = Scaler((2.0,), (0.5, -0.25), 4), sd.VP()
    k = torch.full((20_000, 2), 1.0, dtype=f64)
    out = TruncatedNormal(1.5).draw(k, scaler, sde, KeyedNoise(0))
    alpha, sigma = float(sde.alpha(out.t_min)), float(sde.sigma(out.t_min))
    centre = alpha * torch.tensor([-0.25, 0.125], dtype=f64)
    eps = ((out.x - centre) / sigma).numpy()
    laws = [stats.truncnorm(-tau, tau) for tau in (3.0, 1.5)]  # the narrow bin has the tau asked
    for i, law in enumerate(laws):
        assert stats.kstest(eps[:, i], law.cdf).pvalue > 1e-3
    log_q = sum(law.logpdf(eps[:, i]) - math.log(sigma) for i, law in enumerate(laws))
    assert np.allclose(out.log_q.numpy(), log_q, atol=1e-9)
    entropy = sum(float(law.entropy()) + math.log(sigma) for law in laws)
    assert TruncatedNormal(1.5).entropy((2,), scaler, sde) == pytest.approx(entropy, abs=1e-9)


# --- decoder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 5, 256])
@pytest.mark.parametrize("step", [0.05, -0.7, 6.0])
def test_decode_is_the_softmax_over_all_levels(levels, step):
    k = torch.arange(levels)[:, None]
    for eps in (-6.7, -0.3, 0.0, 4.0):
        here = torch.full((levels, 1), eps, dtype=f64)
        shift = torch.tensor([[step]], dtype=f64)
        distance = here - (torch.arange(levels) - k) * step
        expected = torch.log_softmax(-(distance**2) / 2, 1).diagonal()
        assert torch.allclose(decode(k, here, shift, levels)[:, 0], expected, atol=1e-12)
        single = decode(k, here.float(), shift.float(), levels)[:, 0]
        assert torch.allclose(single.to(f64), expected, rtol=1e-5, atol=1e-6)


def test_a_share_that_is_nearly_one_is_not_rounded_to_it():
    value = decode(torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([[8.0]]), 3)
    assert float(value) == pytest.approx(-2 * math.exp(-32), rel=1e-5, abs=0)


def test_decoder_at_little_noise_is_a_normal_at_the_centre():
    sde, scaler = sd.VP(), byte_scaler(8)
    k = every(8, 500)
    out = Decoder().draw(k, scaler, sde, KeyedNoise(5))
    assert out.t_min == sde.t_min_likelihood
    mean, std = float(sde.alpha(1e-5)) * ((k + 0.5) / 4 - 1), float(sde.sigma(1e-5))
    log_n = torch.distributions.Normal(mean, std).log_prob(out.x)[:, 0]
    assert torch.allclose(out.log_q, log_n, rtol=0, atol=1e-9)
    assert stats.kstest(((out.x - mean) / std).flatten().numpy(), "norm").pvalue > 1e-3


# --- averages over draws ----------------------------------------------------------------------


def test_averages_and_their_errors():
    generator = torch.Generator().manual_seed(0)
    drawn = 0.8 * torch.randn(256, 4000, generator=generator, dtype=f64) - 700
    log_prob, error = importance_weighted(drawn)
    truth = -700 + 0.32  # log E exp
    assert float(log_prob.mean()) == pytest.approx(
        truth - 0.5 * (math.exp(0.64) - 1) / 256, abs=2e-3
    )
    assert float(error.square().mean().sqrt()) == pytest.approx(float(log_prob.std()), rel=0.05)
    mean, spread = mean_bound(drawn)
    assert torch.equal(mean, drawn.mean(0))
    assert float(spread.square().mean().sqrt()) == pytest.approx(float(mean.std()), rel=0.05)
    same = drawn[:1].expand(7, -1)
    assert torch.allclose(importance_weighted(same)[0], same[0], rtol=1e-12)  # less log K
    assert float(importance_weighted(same)[1].max()) < 1e-9
    for rule in (importance_weighted, mean_bound):
        one, unknown = rule(drawn[:1])
        assert torch.allclose(one, drawn[0])
        assert unknown.isnan().all()
        with pytest.raises(ValueError, match=r"\(draws, B\), got \(3,\)"):
            rule(torch.zeros(3))


# --- what all share ---------------------------------------------------------------------------


@pytest.mark.parametrize("way", [Uniform(), TruncatedNormal(2.0), Decoder(0.01)])
@pytest.mark.parametrize("shape", [(3,), (2, 5), (1, 4, 3), (1, 2, 3, 2)])
def test_any_shape_alone_or_in_a_batch(way, shape):
    sde, scaler = sd.VP(), byte_scaler(16)
    k = torch.randint(0, 16, (4, *shape), generator=torch.Generator().manual_seed(0))
    whole = way.draw(k, scaler, sde, KeyedNoise(2, 5))
    alone = way.draw(k[2:3], scaler, sde, KeyedNoise(2, 7))
    assert torch.equal(alone.x[0], whole.x[2])
    assert torch.equal(alone.log_q[0], whole.log_q[2])
    assert whole.x.shape == k.shape
    assert whole.log_q.shape == (4,)
    assert whole.x.dtype == torch.float32
    assert whole.log_q.dtype == f64
    again = way.draw(k, scaler, sde, KeyedNoise(3, 5))
    assert not torch.equal(again.x, whole.x)


@pytest.mark.parametrize("way", [Uniform(), TruncatedNormal(), Decoder()])
def test_float32_is_float64_rounded(way):
    """At 256 levels, where a bin is 0.008 wide and the noise 0.0013."""
    sde, scaler = sd.VP(), byte_scaler(256)
    k = torch.arange(256)[:, None].expand(-1, 8)
    single = way.draw(k, scaler, sde, KeyedNoise(0))
    double = way.draw(k.to(f64), scaler, sde, KeyedNoise(0))
    inside = 2e-4 if isinstance(way, Uniform) else 1e-7  # encode keeps clear of the bin's ends
    assert float((single.x - double.x).abs().max()) < inside
    assert torch.allclose(single.log_q, double.log_q, rtol=1e-12)
    bound = sd.GaussianMixture([1.0], torch.zeros(1, 8, dtype=f64), [0.5])
    pair = [bound.log_prob(out.x.to(f64)) - out.log_q for out in (single, double)]
    assert float((pair[0] - pair[1]).abs().max()) < 1e-2


def test_names_and_sections():
    assert set(names(dequantize)) == {"uniform", "truncated-normal", "variational", "decoder"}
    way = build({"name": "truncated-normal", "tau": 2}, dequantize, "dequantization")
    assert way == TruncatedNormal(2.0)
    assert describe(way) == {"name": "truncated-normal", "tau": 2.0}
    assert build("uniform", dequantize, "dequantization") == Uniform()
    assert build({"name": "decoder", "t": 0.01}, dequantize, "dequantization") == Decoder(0.01)
    with pytest.raises(sd.ConfigError, match=r"did you mean 'uniform'"):
        build("unifrom", dequantize, "dequantization")


@pytest.mark.parametrize("way", [Uniform(), TruncatedNormal(), Decoder()])
def test_data_that_are_no_levels_are_refused(way):
    scaler, sde, source = byte_scaler(8), sd.VP(), KeyedNoise(0)
    for bad in (torch.tensor([[8]]), torch.tensor([[-1]]), torch.tensor([[0.5]])):
        with pytest.raises(ValueError, match=r"whole levels 0\.\.7"):
            way.draw(bad, scaler, sde, source)
    with pytest.raises(ValueError, match="continuous data has a density in nats"):
        way.draw(torch.zeros(1, 1), Scaler(), sde, source)
    with pytest.raises(ValueError, match=r"\(B, \*shape\)"):
        way.draw(torch.zeros(3), scaler, sde, source)


def test_times_that_are_not_trained_are_refused():
    k, source = torch.zeros(1, 1), KeyedNoise(0)
    with pytest.raises(
        ValueError, match=r"tau=3 starts below the trained t_min=1e-05 of VE.*0.39"
    ):
        TruncatedNormal().draw(k, byte_scaler(256), sd.VE(), source)
    with pytest.raises(ValueError, match=r"t_min=0.01 of VP"):
        TruncatedNormal().draw(
            k,
            byte_scaler(256),
            sd.VP(t_min=0.01, t_min_sampling=0.01, t_min_likelihood=0.01),
            source,
        )
    with pytest.raises(ValueError, match="beyond t_max"):
        TruncatedNormal(1e-4).draw(k, byte_scaler(2), sd.VP(), source)
    with pytest.raises(ValueError, match="tau > 0"):
        TruncatedNormal(0.0)
    with pytest.raises(ValueError, match=r"t=1e-06 lies outside.*VP"):
        Decoder(1e-6).draw(k, byte_scaler(2), sd.VP(), source)
    largest = math.exp(float(sd.VE().log_snr(1e-5))) / 256
    assert TruncatedNormal(largest * 0.999).draw(k, byte_scaler(256), sd.VE(), source).t_min > 1e-5


def test_the_last_of_256_levels_is_one_in_bytes():
    """256 itself does not fit into a byte, and must not be compared with one."""
    k = torch.tensor([[0, 255]], dtype=torch.uint8)
    scaler = Scaler((128.0,), (2 / 256,), 256)
    x = Uniform().draw(k, scaler, sd.VP(), KeyedNoise(0)).x
    assert ((x > -1) & (x < 1)).all()
