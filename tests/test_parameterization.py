from dataclasses import replace

import pytest
import torch
from torch import nn

import scoresde as sd
from scoresde import config, parameterization
from scoresde.noise_labels import LogNoise, NoiseLevel
from scoresde.parameterization import ScaledScore
from scoresde.sde.base import as_time

f64 = torch.float64
STD = 0.4
KINDS = [sd.Eps(), sd.X0(), sd.V(), sd.RawScore(), sd.Karras(), sd.Karras(sigma_data=1.3)]
KINDS += [ScaledScore()]


class Oracle(nn.Module):
    """The network that a parameterization asks for, of known data and noise.

    ``target`` is what the paper of each says that its network predicts.
    """

    def __init__(self, kind, target):
        super().__init__()
        self.kind, self.target, self.seen = kind, target, None

    def forward(self, x, c_noise):
        self.seen = (x, c_noise)
        return self.target


def target(kind, x0, eps, alpha, sigma):
    name = type(kind).__name__
    if name == "Karras":  # EDM, equation 8, on y = x/alpha at the noise level q
        q, s = sigma / alpha, kind.sigma_data
        c_skip = s**2 / (q**2 + s**2)
        c_out = q * s / (q**2 + s**2).sqrt()
        return (x0 - c_skip * (x0 + q * eps)) / c_out
    return {
        "Eps": eps,
        "X0": x0,
        "V": alpha * eps - sigma * x0,
        "RawScore": -eps / sigma,
        "ScaledScore": -eps,
    }[name]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_exact_network_gives_the_noise_exactly(sde, kind):
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(5, 2, 3, generator=generator, dtype=f64) for _ in range(2))
    t = torch.linspace(0.02, 1, 5, dtype=f64) * sde.t_max
    for time in (t, t.reshape(-1, 1, 1), 0.3 * sde.t_max):
        u = as_time(time, x0)
        alpha, sigma = sde.alpha(u), sde.sigma(u)
        net = Oracle(kind, target(kind, x0, eps, alpha, sigma))
        model = sd.ScoreModel(net, sde, kind)
        x = sde.perturb(x0, u, eps)
        assert torch.allclose(model.noise(x, time), eps, rtol=1e-7, atol=1e-7)
        assert torch.allclose(model(x, time), -eps / sigma, rtol=1e-7, atol=1e-7)
        # c_in brings data of std sigma_data to unit variance, c_noise is -log_snr/4.
        c_in = (alpha**2 * kind.sigma_data**2 + sigma**2).rsqrt()
        assert torch.allclose(net.seen[0], c_in * x)
        expected = (-sde.log_snr(u) / 4).reshape(-1).expand(5).to(torch.float64)
        assert net.seen[1].shape == (5,)
        assert torch.allclose(net.seen[1].double(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_readings_of_the_model(sde, kind):
    x0, eps = torch.randn(4, 3, dtype=f64), torch.randn(4, 3, dtype=f64)
    t = as_time(0.4 * sde.t_max)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    model = sd.ScoreModel(Oracle(kind, target(kind, x0, eps, alpha, sigma)), sde, kind)
    x = sde.perturb(x0, t, eps)
    # At little signal the data follow from the noise only up to rounding times sigma/alpha.
    assert torch.allclose(model.denoise(x, t), x0, rtol=1e-6, atol=1e-9 * float(1 + sigma / alpha))
    velocity = sde.drift(x, t) + sde.diffusion(t) ** 2 / 2 * eps / sigma
    assert torch.allclose(model.velocity(x, t), velocity, rtol=1e-6)


def test_karras_is_edm_when_alpha_is_one():
    sigma = torch.logspace(-2.7, 1.9, 12, dtype=f64)
    alpha = torch.ones_like(sigma)
    for s in (0.5, 1.0):
        c = sd.Karras(sigma_data=s)(alpha, sigma)
        # Table 1 of Karras et al. (2022): D = c_skip x + c_out F(c_in x, c_noise).
        c_skip, c_out = s**2 / (sigma**2 + s**2), sigma * s / (sigma**2 + s**2).sqrt()
        assert torch.allclose(c.c_in, 1 / (sigma**2 + s**2).sqrt())
        assert torch.allclose(c.c_noise, sigma.log() / 4)
        # eps_hat = (x - D)/sigma, so that D = (1 - sigma c_skip) x - sigma c_out F.
        assert torch.allclose(1 - sigma * c.c_skip, c_skip, rtol=1e-9)
        assert torch.allclose(-sigma * c.c_out, c_out)
    assert sd.Karras().sigma_data == 0.5


def test_karras_target_has_unit_variance(sde):
    generator = torch.Generator().manual_seed(0)
    kind = sd.Karras(sigma_data=STD)
    x0 = STD * torch.randn(40_000, generator=generator, dtype=f64)
    eps = torch.randn(40_000, generator=generator, dtype=f64)
    for fraction in (0.02, 0.3, 1.0):
        t = fraction * sde.t_max
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        x = alpha * x0 + sigma * eps
        c = kind(alpha, sigma)
        assert float((c.c_in * x).std()) == pytest.approx(1, abs=0.02)
        assert float(((eps - c.c_skip * x) / c.c_out).std()) == pytest.approx(1, abs=0.02)


def test_v_of_a_variance_preserving_process_is_that_of_the_paper():
    theta = torch.linspace(0.1, 1.4, 5, dtype=f64)
    c = sd.V()(theta.cos(), theta.sin())
    # eps = sin(theta) z + cos(theta) v: Salimans and Ho, appendix D.
    assert torch.allclose(c.c_skip, theta.sin())
    assert torch.allclose(c.c_out, theta.cos())
    assert torch.allclose(c.c_in, torch.ones_like(theta))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_coefficients_are_finite_at_both_ends(sde, kind):
    for t in (sde.t_min, sde.t_max):
        for dtype in (torch.float32, f64):
            u = torch.tensor([t], dtype=dtype)
            for value in kind(sde.alpha(u), sde.sigma(u)):
                assert value.dtype == dtype
                assert value.isfinite().all()


def test_bad_sigma_data_and_shapes_are_refused():
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="sigma_data > 0"):
            sd.Karras(sigma_data=bad)
    model = sd.ScoreModel(nn.Identity(), sd.VP(), sd.Eps(), shape=(3,))
    with pytest.raises(ValueError, match=r"does not fit a model of \(B, \*\(3,\)\)"):
        model(torch.zeros(2, 4), 0.5)


def test_the_network_computes_in_its_own_dtype():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x, c_noise):
            assert x.dtype == c_noise.dtype == self.scale.dtype
            return self.scale * x

    for own, given in ((torch.float32, f64), (f64, torch.float32)):
        model = sd.ScoreModel(Net().to(own), sd.VP(), sd.V())
        assert model(torch.zeros(2, 3, dtype=given), torch.tensor([0.1, 0.9])).dtype == given


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_input_that_is_not_scaled_is_given_as_it_is(sde, kind):
    plain = replace(kind, scale_input=False)
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(5, 3, generator=generator, dtype=f64) for _ in range(2))
    t = as_time(torch.linspace(0.1, 1, 5, dtype=f64) * sde.t_max, x0)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    net = Oracle(plain, target(plain, x0, eps, alpha, sigma))
    x = sde.perturb(x0, t, eps)
    assert torch.allclose(sd.ScoreModel(net, sde, plain).noise(x, t), eps, rtol=1e-7, atol=1e-7)
    assert torch.equal(net.seen[0], x)
    for ours, scaled in zip(plain(alpha, sigma)[1:], kind(alpha, sigma)[1:], strict=True):
        assert torch.equal(ours, scaled)


def test_the_label_is_what_the_network_is_told(sde):
    t = torch.linspace(0.1, 1, 5, dtype=f64) * sde.t_max
    q = sde.sigma(t) / sde.alpha(t)
    for label, expected in (
        ("noise-level", q),
        (NoiseLevel(), q),
        ({"name": "log-noise", "scale": 1.0, "unit": 2.0}, (q / 2).log()),
    ):
        net = Oracle(None, torch.zeros(5, 3, dtype=f64))
        sd.ScoreModel(net, sde, sd.Eps(label=label)).noise(torch.ones(5, 3, dtype=f64), t)
        assert torch.allclose(net.seen[1], expected, rtol=1e-9, atol=1e-9)


def test_options_survive_their_section():
    kind = ScaledScore(sigma_data=0.7, scale_input=False, label=LogNoise(1.0, 0.01))
    section = config.describe(kind)
    assert section["name"] == "scaled-score"
    assert config.build(section, parameterization, "parameterization") == kind
    assert config.build("scaled-score", parameterization, "parameterization") == ScaledScore()


def test_twice_the_channels_are_noise_and_variance():
    x, t = torch.randn(4, 3, dtype=f64), torch.linspace(0.1, 1, 4, dtype=f64)
    halves = torch.randn(4, 3, dtype=f64), torch.randn(4, 3, dtype=f64)
    for sign, kind in ((1, sd.Eps()), (-1, ScaledScore())):
        model = sd.ScoreModel(Oracle(kind, torch.cat(halves, 1)), sd.VP(), kind)
        eps, v = model.noise_and_variance(x, t)
        assert torch.equal(eps, sign * halves[0])
        assert torch.equal(v, halves[1])
        assert torch.equal(model.noise(x, t), eps)
        single = sd.ScoreModel(Oracle(kind, halves[0]), sd.VP(), kind)
        assert single.noise_and_variance(x, t)[1] is None
