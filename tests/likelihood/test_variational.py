import math

import pytest
import torch
from scipy import stats

import scoresde as sd
from scoresde.checkpoint import CheckpointError
from scoresde.config import build, describe
from scoresde.data import Scaler
from scoresde.likelihood import dequantize
from scoresde.likelihood.dequantize import Uniform, Variational, importance_weighted
from scoresde.likelihood.variational import DequantizingFlow, fit_dequantizer, mask
from scoresde.noise import KeyedNoise

f64 = torch.float64
SHAPES = [(1,), (5,), (2, 6), (3, 4, 4), (1, 2, 3, 2)]
SCALER = Scaler((2.0,), (0.5,), 4)


def levels(shape, n=4, count=4, seed=0):
    return torch.randint(0, count, (n, *shape), generator=torch.Generator().manual_seed(seed))


def stirred(shape, scale=0.3, **settings):
    """A float64 flow whose couplings all do something."""
    torch.manual_seed(1)
    flow = DequantizingFlow(shape, 4, width=8, **settings).to(f64)
    with torch.no_grad():
        for parameter in flow.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.add_(2 * scale * torch.randn_like(parameter) / fan_in**0.5)
    return flow


def logistic(shape, n=4, seed=0):
    v = torch.rand((n, *shape), generator=torch.Generator().manual_seed(seed), dtype=f64)
    return torch.logit(v.clamp(1e-4, 1 - 1e-4))


# --- the flow ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_it_starts_as_uniform_dequantisation(shape):
    way = Variational.of(DequantizingFlow(shape, 4))
    k = levels(shape, 300)
    out = way.draw(k, SCALER, sd.VP(), KeyedNoise(1))
    uniform = Uniform().draw(k, SCALER, sd.VP(), KeyedNoise(1))
    assert float((out.log_q - uniform.log_q).abs().max()) < 1e-5
    assert torch.allclose(out.x, uniform.x, atol=2e-6)  # the very same noise
    assert out.t_min is None
    u = (out.x / 0.5 + 2 - k).flatten()
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_log_q_is_that_of_the_jacobian(shape):
    """``log q(u | k) = log logistic(eps) - log|det du/d eps|``, by automatic differentiation."""
    flow, k = stirred(shape), levels(shape, 2)
    eps = logistic(shape, 2)
    u, log_q = (part.detach() for part in flow(eps, k))
    for i in range(2):

        def one(e, i=i):
            return flow(e[None], k[i : i + 1])[0][0]

        jacobian = torch.autograd.functional.jacobian(one, eps[i]).reshape(u[0].numel(), -1)
        base = torch.from_numpy(stats.logistic.logpdf(eps[i].numpy())).sum()
        expected = base - torch.linalg.slogdet(jacobian)[1]
        assert float(log_q[i]) == pytest.approx(float(expected), rel=1e-9)
    assert not torch.allclose(torch.sigmoid(eps), u, atol=1e-2)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_inverse_brings_the_noise_back(shape):
    flow, k = stirred(shape), levels(shape)
    eps = logistic(shape)
    u, _ = flow(eps, k)
    assert ((u > 0) & (u < 1)).all()
    assert torch.allclose(flow.inverse(u, k), eps, atol=1e-7)


def test_the_density_integrates_to_one():
    """``q(u | k)`` over the unit square, by the midpoint rule on the inverse."""
    flow, n = stirred((2,), 0.1), 200
    mid = (torch.arange(n, dtype=f64) + 0.5) / n
    u = torch.cartesian_prod(mid, mid)
    for k in ([0, 3], [1, 2]):
        rows = torch.tensor([k]).expand(len(u), -1)
        with torch.no_grad():
            log_q = flow(flow.inverse(u, rows), rows)[1]
        assert float(log_q.exp().mean()) == pytest.approx(1, abs=0.01)
        assert float(log_q.std()) > 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_come_in_pairs_that_share_nothing(shape):
    for i in (0, 2, 4):
        first, second = mask(shape, i), mask(shape, i + 1)
        assert torch.equal(first + second, torch.ones(1, *shape))
    assert math.prod(shape) < 4 or not torch.equal(mask(shape, 0), mask(shape, 2))


def test_neighbours_and_levels_are_seen():
    """An entry's ``u`` is a function of its neighbours' noise, and of the levels."""
    flow, k, eps = stirred((1, 4, 4)), levels((1, 4, 4), 1), logistic((1, 4, 4), 1)
    eps.requires_grad_()
    (moved,) = torch.autograd.grad(flow(eps, k)[0][0, 0, 1, 1], eps)
    assert float(moved[0, 0, 1, 2].abs()) > 0
    other = k.clone()
    other[0, 0, 1, 2] = (other[0, 0, 1, 2] + 1) % 4
    assert not torch.allclose(flow(eps, k)[0], flow(eps, other)[0])


def test_the_outermost_levels_are_told_apart():
    flow, seen = DequantizingFlow((2,), 4), []
    flow.stem.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    flow.features(torch.tensor([[0, 1], [3, 2]]))
    expected = [[-1, -1 / 3, 1, 0, 0, 0], [1, 1 / 3, 0, 0, 1, 0]]
    assert torch.allclose(seen[0], torch.tensor(expected))


# --- draws ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_a_draw_does_not_depend_on_its_batch(shape):
    way = Variational.of(stirred(shape).float())
    k = levels(shape)
    whole = way.draw(k, SCALER, sd.VP(), KeyedNoise(2, 5))
    alone = way.draw(k[2:3], SCALER, sd.VP(), KeyedNoise(2, 7))
    assert torch.allclose(alone.x[0], whole.x[2], atol=1e-5)
    assert float(alone.log_q[0]) == pytest.approx(float(whole.log_q[2]), rel=1e-4, abs=1e-4)
    assert torch.equal(SCALER.decode(whole.x).long(), k)  # no draw leaves its bin
    assert (whole.x.dtype, whole.log_q.dtype) == (torch.float32, f64)
    assert whole.log_q.requires_grad is False
    assert way.draw(k.to(f64), SCALER, sd.VP(), KeyedNoise(2, 5)).x.dtype == f64


def test_a_draw_at_the_very_end_of_its_bin_stays_inside():
    class Ends(KeyedNoise):
        def uniform(self, shape, device=None, dtype=None):
            return torch.tensor([[0.0], [1 - 2.0**-24]], dtype=dtype)  # a sigmoid of 1 in float32

    k = torch.tensor([[1], [1]])
    out = Variational.of(DequantizingFlow((1,), 4)).draw(k, SCALER, sd.VP(), Ends(0))
    assert torch.equal(SCALER.decode(out.x).long(), k)
    assert out.log_q.isfinite().all()


def test_the_log_determinant_is_that_of_the_scaler():
    way, k = Variational.of(stirred((2, 3)).float()), levels((2, 3))
    wide = Scaler((2.0,), (0.5, -2.0), 4)
    a, b = (way.draw(k, s, sd.VP(), KeyedNoise(0)) for s in (SCALER, wide))
    expected = torch.full((4,), -3 * math.log(4.0), dtype=f64)
    assert torch.allclose(b.log_q - a.log_q, expected, rtol=1e-9)


def test_float32_follows_float64():
    flow, k = stirred((3, 4, 4), 0.1), levels((3, 4, 4), 16)
    double = Variational.of(flow).draw(k.to(f64), SCALER, sd.VP(), KeyedNoise(0))
    single = Variational.of(flow.float()).draw(k, SCALER, sd.VP(), KeyedNoise(0))
    assert torch.allclose(single.x.to(f64), double.x, atol=1e-5)
    assert torch.allclose(single.log_q, double.log_q, atol=1e-3)


# --- training ---------------------------------------------------------------------------------


def coarse():
    """A mixture narrower than the four bins that it falls into, and its levels."""
    means = torch.tensor([[0.3, 0.1], [-0.7, 0.6], [0.1, -0.6]], dtype=f64)
    mixture = sd.GaussianMixture([1.0, 1.0, 1.0], means, torch.tensor([0.1, 0.08, 0.12]).to(f64))
    return mixture, SCALER.decode(mixture.sample(1000, torch.Generator().manual_seed(0)))


def bounds(way, mixture, k, draws=8):
    """Mean over items of the bound of one draw and of the eight together, and of the truth."""
    found = []
    for j in range(draws):
        out = way.draw(k, SCALER, sd.VP(), KeyedNoise(3, j * len(k)))
        found.append(mixture.log_prob(out.x.to(f64)) - out.log_q)
    found = torch.stack(found)
    low = (k.to(f64) - 2) / 2
    mass = torch.zeros(len(k), dtype=f64)
    for w, m, s in zip(mixture.weights, mixture.means, mixture.stds, strict=True):
        between = torch.special.ndtr((low + 0.5 - m) / s) - torch.special.ndtr((low - m) / s)
        mass += w * between.prod(1)
    return (
        float(found.mean()),
        float(importance_weighted(found)[0].mean()),
        float(mass.log().mean()),
    )


def test_training_closes_most_of_the_gap():
    mixture, k = coarse()
    seen = []
    way = fit_dequantizer(
        mixture.score(sd.VP()), k, scaler=SCALER, steps=150, batch=64, lr=8e-3,
        progress=lambda *state: seen.append(state),
    )  # fmt: skip
    before, before_iw, truth = bounds(Uniform(), mixture, k)
    after, after_iw, _ = bounds(way, mixture, k)
    assert truth - after < 0.35 * (truth - before)
    assert before < before_iw < truth
    assert after < after_iw < truth
    assert before_iw < after_iw
    shares, nats = zip(*seen, strict=True)
    assert len(seen) == 150
    assert list(shares) == sorted(shares)
    assert shares[-1] == 1
    assert sum(nats[-20:]) < sum(nats[:20])
    assert not way.flow.training


def test_nothing_to_gain_is_left_uniform():
    """Data far wider than a bin: uniform dequantisation is right, and the flow stays close."""
    mixture = sd.GaussianMixture([1.0], torch.zeros(1, 2, dtype=f64), [20.0])
    scaler = Scaler((2.0,), (0.5,), 4)
    sde = sd.VE(sigma_max=200.0)
    way = fit_dequantizer(mixture.score(sde), levels((2,), 500), scaler=scaler, steps=60, lr=1e-3)
    out = way.draw(levels((2,), 500), scaler, sde, KeyedNoise(0))
    assert float((out.log_q - 2 * math.log(2)).mean()) < 0.02


def test_the_surrogate_is_the_variational_bound():
    """Its mean over noise, at initialisation: exact score, Gaussian data, closed form."""
    from scoresde.likelihood.variational import _loss

    v, sde, n = 0.3, sd.VP(t_max=0.1), 40_000  # so short that the prior's term counts
    mixture = sd.GaussianMixture([1.0], torch.zeros(1, 1, dtype=f64), [v**0.5])
    flow = DequantizingFlow((1,), 4)
    generator = torch.Generator().manual_seed(0)
    for level in (0, 2):
        k = torch.full((n, 1), level)
        found = _loss(flow, mixture.score(sde), k, SCALER, generator, {}).detach().double()
        # E|eps_hat - eps|^2 given x: sigma^2 alpha^2 x^2/w^2 + (alpha^2 v/w)^2
        low = (level - 2) / 2
        power = ((low + 0.5) ** 3 - low**3) / 3 / 0.5
        lam = torch.linspace(float(sde.log_snr(0.1)), float(sde.log_snr(1e-5)), 4001, dtype=f64)
        a2, s2 = torch.sigmoid(2 * lam), torch.sigmoid(-2 * lam)
        w = a2 * v + s2  # variance of x_t
        error = (s2 * a2 * power + (a2 * v) ** 2) / w**2
        expected = float(torch.trapezoid(error, lam)) + float(sde.alpha(0.1)) ** 2 * power / 2
        assert float(found.mean()) == pytest.approx(expected, abs=4 * float(found.std()) / n**0.5)


class Shifted(sd.Score):
    """A network that depends on a condition and counts who trains it."""

    def __init__(self):
        self.sde, self.scaler = sd.VP(), SCALER
        self.layer = torch.nn.Linear(3, 3).requires_grad_()
        self.asked = []

    def __call__(self, x, t, y):
        self.asked.append((len(x), len(y)))
        self.seen = x.detach()
        return -self.layer(x) - y[:, None]


def test_the_score_is_left_alone_and_the_seed_decides():
    k, y = levels((3,), 50), torch.linspace(-1, 1, 50)
    runs = []
    for seed in (4, 4, 5):
        score = Shifted()
        state = torch.random.get_rng_state()
        way = fit_dequantizer(score, k, steps=3, batch=8, seed=seed, y=y)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert all(p.grad is None and p.requires_grad for p in score.layer.parameters())
        assert score.asked == [(8, 8)] * 3
        runs.append(torch.cat([p.flatten() for p in way.flow.parameters()]))
    assert not torch.equal(runs[0], runs[2])
    with torch.no_grad():
        score.layer.weight.copy_(torch.eye(3))
    again = [fit_dequantizer(score, k, steps=3, batch=8, seed=4, y=y).flow for _ in range(2)]
    first, second = (torch.cat([p.flatten() for p in flow.parameters()]) for flow in again)
    assert torch.equal(first, second)


def test_the_seed_is_that_of_the_noise_too():
    k, y, scores = torch.zeros(8, 3), torch.zeros(8), [Shifted() for _ in range(3)]
    for score, seed in zip(scores, (1, 1, 2), strict=True):
        fit_dequantizer(score, k, steps=1, batch=8, seed=seed, y=y)
    assert torch.equal(scores[0].seen, scores[1].seen)
    assert not torch.equal(scores[0].seen, scores[2].seen)


def test_minutes_end_it_too():
    mixture, k = coarse()
    way = fit_dequantizer(mixture.score(sd.VP()), k, scaler=SCALER, minutes=1e-3)
    assert isinstance(way, Variational)


# --- on disk ----------------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same(tmp_path):
    way = Variational.of(stirred((2, 3)).float())
    way.save(tmp_path / "deq")
    assert {p.name for p in (tmp_path / "deq").iterdir()} == {
        "dequantizer.safetensors",
        "dequantizer.yaml",
    }
    section = {"name": "variational", "folder": str(tmp_path / "deq")}
    k = levels((2, 3))
    expected = way.draw(k, SCALER, sd.VP(), KeyedNoise(0))
    for same in (Variational.load(tmp_path / "deq"), build(section, dequantize, "dequantization")):
        out = same.draw(k, SCALER, sd.VP(), KeyedNoise(0))
        assert torch.equal(out.x, expected.x)
        assert torch.equal(out.log_q, expected.log_q)
        assert describe(same) == section


def test_files_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no dequantizer at .*dequantizer\.safetensors"):
        Variational(str(tmp_path))
    Variational.of(stirred((3,)).float()).save(tmp_path)
    text = (tmp_path / "dequantizer.yaml").read_text()
    (tmp_path / "dequantizer.yaml").write_text(text.replace("width: 8", "width: 9"))
    with pytest.raises(CheckpointError, match="does not fit the network"):
        Variational(str(tmp_path))
    (tmp_path / "dequantizer.yaml").write_text(text.replace("width: 8", "widht: 8"))
    with pytest.raises(sd.ConfigError, match="widht"):
        Variational(str(tmp_path))
    (tmp_path / "dequantizer.yaml").write_text("format: 1\n")
    with pytest.raises(sd.ConfigError, match="no section 'flow'"):
        Variational(str(tmp_path))
    (tmp_path / "dequantizer.yaml").write_text(text)
    file = tmp_path / "dequantizer.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        Variational(str(tmp_path))


def test_refusals():
    way = Variational.of(DequantizingFlow((3,), 4))
    with pytest.raises(ValueError, match=r"of 4 levels does not fit 8 levels"):
        way.draw(levels((3,)), Scaler((4.0,), (0.25,), 8), sd.VP(), KeyedNoise(0))
    with pytest.raises(
        ValueError, match=r"\(4, 2\) does not fit a dequantizer of \(B, \*\(3,\)\)"
    ):
        way.draw(levels((2,)), SCALER, sd.VP(), KeyedNoise(0))
    with pytest.raises(ValueError, match="levels >= 2"):
        DequantizingFlow((3,), 1)
    mixture, k = coarse()
    score = mixture.score(sd.VP())
    with pytest.raises(ValueError, match="the score carries none"):
        fit_dequantizer(score, k, steps=1)
    with pytest.raises(ValueError, match=r"steps >= 1 or minutes > 0, got steps=None"):
        fit_dequantizer(score, k, scaler=SCALER)
    with pytest.raises(ValueError, match=r"whole levels 0\.\.3"):
        fit_dequantizer(score, k + 4, scaler=SCALER, steps=1)

    class Broken(sd.Score):
        sde = sd.VP()

        def __call__(self, x, t):
            return x * math.nan

    with pytest.raises(ValueError, match="not finite at step 0"):
        fit_dequantizer(Broken(), k, scaler=SCALER, steps=1)
