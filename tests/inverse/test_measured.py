"""What the scores led by a measurement share: batches, conditions, costs, gradients, errors."""

import pytest
import torch
from torch import nn

import scoresde as sd
from scoresde.inverse.diffpir import DiffPIR
from scoresde.inverse.dps import DPS
from scoresde.inverse.linear import Linear
from scoresde.inverse.mask import Mask
from scoresde.inverse.mmps import MMPS
from scoresde.inverse.pgdm import PGDM
from scoresde.inverse.tmpd import TMPD
from scoresde.model import Cost, cost

f64 = torch.float64
METHODS = {
    "dps": DPS,
    "dps-zeta": lambda *a, **k: DPS(*a, zeta=0.5, **k),
    "pgdm": PGDM,
    "tmpd": TMPD,
    "mmps": MMPS,
    "mmps-3": lambda *a, **k: MMPS(*a, iterations=3, **k),
    "diffpir": DiffPIR,
}


@pytest.fixture(params=list(METHODS))
def method(request):
    """Every score that a measurement leads, and variants."""
    return METHODS[request.param]


def operator():
    return Linear(torch.tensor([[1.0, 0.4], [0.2, -1.5]], dtype=f64))


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


def test_gradient_of_a_log_likelihood(method, mixture):
    """The guidance is the derivative of a scalar of ``x_t``, as an independent one says."""
    if method is DiffPIR or method is METHODS["dps-zeta"]:
        pytest.skip("no gradient of a Gaussian log-likelihood")
    sde, y, std = sd.VP(), draws(1, 2, seed=1), 0.3
    score, a = mixture.score(sde), operator()
    x, t = draws(4, 2), 0.3
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    led = method(score, a, y, std, **({"iterations": 1} if method is MMPS else {}))
    found = led(x, t) - score(x, t)
    # w as a constant, the derivative by central differences of w . A x0_hat.
    jacobian = torch.stack(
        [
            (score.denoise(x + 1e-5 * e, t) - score.denoise(x - 1e-5 * e, t)) / 2e-5
            for e in torch.eye(2, dtype=f64)
        ],
        2,
    )  # d x0_i / d x_j
    r = y - a(score.denoise(x, t))
    spread = float(sigma**2 / alpha) * jacobian
    noise, m = std**2 * torch.eye(2, dtype=f64), a.matrix
    q2 = float(sigma**2 / alpha**2)
    r2 = q2 / (1 + q2)
    if method is DPS:
        along = (r[:, None] @ m @ spread @ m.T @ r[:, :, None]) / (r**2).sum(1)[:, None, None]
        held = ((std**2 + along) / 2).clamp_min(std**2)  # up to twice the best length
        covariance = held * torch.eye(2, dtype=f64)
    elif method is PGDM:
        within = 0.36 * q2 / (0.36 + q2) / 8
        covariance = (noise + within * m @ m.T).expand(4, 2, 2)
    elif method is TMPD:
        covariance = noise + m @ torch.diag_embed(spread.sum(2).clamp_min(0)) @ m.T
    else:
        covariance = noise + m @ spread @ m.T
    w = torch.linalg.solve(covariance, r[:, :, None])
    if method in (TMPD, PGDM):  # as far as the whole covariance says along w, or up to twice that
        best = (w.mT @ r[:, :, None]) / (w.mT @ (noise + m @ spread @ m.T) @ w)
        w = w * (best if method is TMPD else (2 * best).clamp_max(1))
    if method is MMPS:  # one iteration from the preconditioner
        p = torch.linalg.solve(noise + r2 * m @ m.T, r[:, :, None])
        w = p * (p.mT @ r[:, :, None]) / (p.mT @ covariance @ p)
    expected = (jacobian.mT @ m.T @ w)[:, :, 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("std", [0.0, 0.2])
def test_a_sample_is_independent_of_its_batch(method, mixture, std):
    score, y = mixture.score(sd.VP()), draws(3, 2, seed=1)
    x, t = draws(3, 2), torch.tensor([0.05, 0.4, 0.9], dtype=f64)
    together = method(score, operator(), y, std)(x, t)
    for i in range(3):
        one = slice(i, i + 1)
        alone = method(score, operator(), y[one], std)
        torch.testing.assert_close(alone(x[one], t[one]), together[one], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(alone(x[one], float(t[i])), together[one])
        given = alone(x, t, measurement=y)
        torch.testing.assert_close(given, together, rtol=1e-9, atol=1e-9)


def test_denoise_is_that_of_the_score(method, mixture, sde):
    led = method(mixture.score(sde), operator(), draws(1, 2), 0.1)
    x, t = draws(3, 2) * sde.prior_std, 0.4
    plain = (x + sde.sigma(t) ** 2 * led(x, t)) / sde.alpha(t)
    torch.testing.assert_close(led.denoise(x, t), plain, rtol=1e-6, atol=1e-6)


def test_without_noise_it_stays_finite_down_to_the_end(method, sde, mixture):
    for a in (operator(), Linear([[1.0, 0.5]])):
        y = a(draws(4, 2))
        led = method(mixture.score(sde), a, y, 0.0)
        for t in (sde.t_min, sde.t_min_sampling, 0.5, sde.t_max):
            for start in (draws(4, 2), 100 * draws(4, 2)):
                assert bool(led(start, t).isfinite().all())


def test_samples_meet_an_exact_measurement(method, mixture):
    if method is METHODS["dps-zeta"]:
        pytest.skip("a rule of its own, that knows no noise level")
    a = Linear([[0.8, -0.6]])
    led = method(mixture.score(sd.VP()), a, torch.tensor([[0.3]], dtype=f64), 0.0)
    out = sd.sample(led, (64, 2), solver={"name": "ddim", "eta": 1.0}, steps=60)
    assert out.converged
    assert (a(out.x) - 0.3).abs().mean() < 0.02


def test_cost(method):
    net = Counted()
    model = sd.ScoreModel(net, sd.VP(), sd.Eps(), shape=(2,)).double()
    led = method(model, operator(), draws(1, 2), 0.1)
    x = draws(3, 2)
    with torch.no_grad():
        led(x, 0.5)
    one = Cost(net.forwards, net.products)
    assert led.cost(torch.tensor(0.5)) == one
    out = sd.sample(led, (3, 2), solver="ddim", steps=4)
    assert out.cost == Cost(5, 5 * one.products)
    assert (net.forwards, net.products) == (6, 6 * one.products)


def test_cost_of_what_is_led_twice(mixture):
    inner = PGDM(mixture.score(sd.VP()), operator(), draws(1, 2), 0.1)
    outer = MMPS(inner, operator(), draws(1, 2), 0.1, iterations=2)
    assert cost(outer, torch.tensor(0.5)) == Cost(1, 1 + 2 * 3)
    x = draws(2, 2)
    assert bool(outer(x, 0.5).isfinite().all())


def test_dtypes_and_shapes(method):
    means, stds = draws(3, 2, 3, 4), 0.3 + draws(3, 2, 3, 4).abs()
    mixture = sd.GaussianMixture([1.0, 1.0, 2.0], means, stds)
    a = Mask(draws(2, 3, 4, seed=2) > 0)
    y = a(draws(1, 2, 3, 4, seed=3))
    x, t = draws(5, 2, 3, 4), torch.linspace(0.1, 0.9, 5)
    led = method(mixture.score(sd.VP()), a, y, 0.1)
    precise = led(x, t)
    assert precise.dtype == f64
    single = method(mixture.to(dtype=torch.float32).score(sd.VP()), a, y, 0.1)(x.float(), t)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), precise, rtol=2e-3, atol=2e-3)


def test_what_is_not_measured_has_no_say(method, mixture):
    a = Mask(torch.tensor([1, 0]))
    y = torch.tensor([[0.4, float("nan")]], dtype=f64)
    led, clean = (method(mixture.score(sd.VP()), a, v, 0.1) for v in (y, a(y)))
    x = draws(3, 2)
    assert torch.equal(led(x, 0.3), clean(x, 0.3))


def test_differentiable_in_the_state(method, mixture):
    led = method(mixture.score(sd.VP()), operator(), draws(1, 2, seed=1), 0.2)
    x, along = draws(3, 2), draws(3, 2, seed=4)
    x.requires_grad_()
    value = (led(x, 0.3) * along).sum()
    (gradient,) = torch.autograd.grad(value, x)
    with torch.no_grad():
        for i in range(2):
            e = 1e-5 * torch.eye(2, dtype=f64)[i]
            ahead, behind = led(x + e, 0.3), led(x - e, 0.3)
            rate = ((ahead - behind) * along).sum(1) / 2e-5
            torch.testing.assert_close(gradient[:, i], rate, rtol=1e-5, atol=1e-5)


def test_no_graph_is_left_without_grad(method, mixture):
    led = method(mixture.score(sd.VP()), operator(), draws(1, 2), 0.2)
    with torch.no_grad():
        assert not led(draws(3, 2), 0.3).requires_grad


def test_scale_of_the_data(mixture):
    score, a, y = mixture.score(sd.VP()), operator(), draws(1, 2)
    assert MMPS(score, a, y, 0.1).scale == 1
    assert MMPS(score, a, y, 0.1, sigma_data=0.4).scale == 0.4
    model = sd.ScoreModel(nn.Identity(), sd.VP(), sd.Karras(sigma_data=0.7))
    assert MMPS(model, a, y, 0.1).scale == 0.7
    assert MMPS(sd.Threshold(model), a, y, 0.1).scale == 0.7
    assert MMPS(model, a, y, 0.1, sigma_data=0.4).scale == 0.4


@pytest.mark.parametrize("kind", [PGDM, TMPD, MMPS])
def test_refuses_a_scale(kind, mixture):
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="sigma_data"):
            kind(mixture.score(sd.VP()), operator(), draws(1, 2), 0.1, sigma_data=scale)


@pytest.mark.parametrize("std", [-0.1, float("nan"), float("inf"), torch.ones(2), "0.1"])
def test_refuses_a_noise_level(method, mixture, std):
    with pytest.raises(ValueError, match="noise_std"):
        method(mixture.score(sd.VP()), operator(), draws(1, 2), std)


def test_refuses_a_measurement_that_does_not_fit(method, mixture):
    score, a = mixture.score(sd.VP()), operator()
    for y in (draws(2), draws(1, 3), draws(1, 2, 1), [0.1, 0.2]):
        with pytest.raises(ValueError, match=r"\(1, 2\) or \(B, 2\)"):
            method(score, a, y, 0.1)
    led = method(score, a, draws(2, 2), 0.1)
    with pytest.raises(ValueError, match="2 measurements do not fit 3 samples"):
        led(draws(3, 2), 0.5)
    with pytest.raises(ValueError, match="measurement of shape"):
        led(draws(3, 2), 0.5, measurement=draws(3, 1))


def test_refuses_an_operator_of_other_items(method, mixture):
    score = mixture.score(sd.VP())
    with pytest.raises(ValueError, match=r"items of shape \(3,\), the score has .* \(2,\)"):
        method(score, Linear(torch.ones(1, 3)), draws(1, 1), 0.1)
    with pytest.raises(ValueError, match=r"one of scoresde.inverse, got function"):
        method(score, lambda x: x, draws(1, 2), 0.1)


@pytest.mark.parametrize("kind", [DPS, DiffPIR])
def test_what_asks_for_no_scale_takes_none(kind, mixture):
    with pytest.raises(TypeError, match="sigma_data"):
        kind(mixture.score(sd.VP()), operator(), draws(1, 2), 0.1, sigma_data=0.4)


def test_refuses_a_score_without_a_derivative(mixture):
    class Detached(sd.Score):
        sde = sd.VP()

        def denoise(self, x, t):
            return x.detach()

    with pytest.raises(ValueError, match="not differentiable in x"):
        PGDM(Detached(), operator(), draws(1, 2), 0.1)(draws(3, 2), 0.5)
    led = DiffPIR(Detached(), operator(), draws(1, 2), 0.1)
    assert bool(led(draws(3, 2), 0.5).isfinite().all())


class Counted(nn.Module):
    """A network that counts how often it is asked, and how often its derivative is."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Linear(2, 2)
        self.forwards = self.products = 0

    def forward(self, x, c_noise):
        self.forwards += 1
        if x.requires_grad:
            x = x * 1
            x.register_hook(self.count)
        return torch.tanh(self.weight(x))

    def count(self, _):
        self.products += 1
