"""Editing: laws of Gaussian data in closed form, strengths of all processes, bridges."""

import math

import pytest
import torch

import scoresde as sd
from scoresde.editing import noised, start_time
from scoresde.latents import rms
from scoresde.noise import KeyedNoise

f64 = torch.float64
TIGHT = {"name": "runge-kutta", "method": "dop853", "rtol": 1e-7, "atol": 1e-7, "max_nfe": 9000}


def normal(mean, std, shape=(2,)):
    """One Gaussian: means and standard deviations an entry, float64."""
    mean = torch.as_tensor(mean, dtype=f64).expand(shape)[None]
    return sd.GaussianMixture([1.0], mean, torch.as_tensor(std, dtype=f64).expand(shape)[None])


def level(sde, t):
    return float(sde.alpha(t)), float(sde.sigma(t))


# --- SDEdit -----------------------------------------------------------------------------------


def test_a_strength_is_the_same_noise_on_every_process(sde):
    for strength in (0.1, 0.37, 0.8):
        alpha, sigma = level(sde, start_time(sde, strength))
        beta = 0.1 * strength + 19.9 * strength**2 / 2  # the integral of VP's linear schedule
        assert sigma**2 / alpha**2 == pytest.approx(math.expm1(beta), rel=1e-6)
    assert start_time(sd.VP(), 0.37) == pytest.approx(0.37)
    assert start_time(sde, 1.0) <= sde.t_max
    assert float(sde.sigma(start_time(sde, 1.0)) / sde.alpha(start_time(sde, 1.0))) > 49
    assert start_time(sd.VP(beta_max=10.0), 0.37) > 0.37  # by the noise, not by the name


def test_the_start_is_the_guide_with_noise(sde):
    score, x0 = normal(0.0, 1.0, (3, 2)).score(sde), torch.full((20000, 3, 2), 0.7, dtype=f64)
    t = start_time(sde, 0.4)
    alpha, sigma = level(sde, t)
    eps = (noised(score, x0, t, seed=3) - alpha * x0) / sigma
    assert abs(float(eps.mean())) < 0.015
    assert float(eps.std()) == pytest.approx(1, abs=0.01)
    pair = noised(score, x0[:2], t, 3, seed=3)
    assert pair.shape == (6, 3, 2)
    torch.testing.assert_close((pair - alpha * x0[:6]) / sigma, eps[:6])
    assert torch.equal(noised(score, x0[:1], t, 2, 3, start_index=4), pair[4:])


def test_the_ode_from_a_noised_guide_is_its_closed_form(sde):
    """Item by item: ``alpha_e m + v_e/v (x_t - alpha m)``, whose law is Gaussian."""
    mean, std = torch.tensor([0.4, -0.2], dtype=f64), torch.tensor([0.5, 1.3], dtype=f64)
    score, x0 = normal(mean, std).score(sde), torch.tensor([[1.5, 0.3], [-1.0, 2.0]], dtype=f64)
    out = sd.edit(score, x0, 0.45, 3, solver=TIGHT, seed=5, denoise=False)
    t = start_time(sde, 0.45)
    assert (out.t_start, out.x.shape, out.seed) == (t, (6, 2), 5)
    (a, s), (a_end, s_end) = level(sde, t), level(sde, out.t_end)
    ratio = ((a_end**2 * std**2 + s_end**2) / (a**2 * std**2 + s**2)).sqrt()
    eps = KeyedNoise(5).normal((6, 2), dtype=f64)
    x_t = a * x0.repeat_interleave(3, 0) + s * eps
    torch.testing.assert_close(
        out.x, a_end * mean + ratio * (x_t - a * mean), rtol=1e-5, atol=1e-5
    )


def closed_form(sde, strength, mean, std, guide, ode):
    """Mean and variance of the edited item, for ``t_end`` at the data."""
    a, s = level(sde, start_time(sde, strength))
    v2 = a**2 * std**2 + s**2
    if ode:
        return mean + a * std / v2**0.5 * (guide - mean), std**2 * s**2 / v2
    gain = a**2 * std**2 / v2
    return mean + gain * (guide - mean), gain**2 * s**2 / a**2 + std**2 * s**2 / v2


@pytest.mark.parametrize("strength", [0.2, 0.5])
@pytest.mark.parametrize(("solver", "ode"), [("dpmpp-3m", True), ("sde-dpmpp-2m", False)])
@pytest.mark.parametrize("sde", [sd.VP(), sd.EDM(), sd.Linear()], ids=lambda s: type(s).__name__)
def test_the_law_of_an_edit_is_gaussian(sde, solver, ode, strength):
    n = 20000
    score, x0 = normal(0.3, 0.6, (1,)).score(sde), torch.full((1, 1), 1.8, dtype=f64)
    end = sde.t_min
    out = sd.edit(
        score, x0, strength, n, solver=solver, steps=40, t_end=end, denoise=False
    ).x[:, 0]  # fmt: skip
    mean, variance = closed_form(sde, strength, 0.3, 0.6, 1.8, ode)
    assert float(out.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / n) + 2e-3)
    assert float(out.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / n) + 0.01)
    z = (out - out.mean()) / out.std()
    assert float((z**3).mean()) == pytest.approx(0, abs=4 * math.sqrt(6 / n))
    assert float((z**4).mean()) == pytest.approx(3, abs=4 * math.sqrt(24 / n))


@pytest.mark.filterwarnings("ignore:.*noisy samples from trained VE models")
def test_a_full_strength_forgets_the_guide_and_a_small_one_keeps_it(sde, mixture):
    score, x0 = mixture.score(sde), torch.tensor([[1.1, 0.5]], dtype=f64).expand(2, 2)
    slight = sd.edit(score, x0, 0.05, 200, solver="dpmpp-3m", steps=20).x
    assert rms(slight - x0[:1]).mean() < 0.15
    full = sd.edit(score, x0, 1.0, 2000, solver="dpmpp-3m", steps=30).x
    mean, covariance = mixture.moments()
    assert (full.mean(0) - mean).abs().max() < 0.12
    assert (full.T.cov() - covariance).abs().max() < 0.12


def test_a_draw_does_not_depend_on_its_batch_and_conditions_follow_the_guides():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(0.3))

        def forward(self, x, c_noise, y=None):
            return x * self.scale + y[:, None].to(x)

    model = sd.ScoreModel(Net(), sd.VP(), sd.Eps(), shape=(2,), weights="ema")
    x0, y = torch.randn(3, 2), torch.tensor([0.0, 0.5, -1.0])
    how = {"solver": "ancestral", "steps": 7, "seed": 2}
    whole = sd.edit(model, x0, 0.5, 4, y=y, **how)
    assert (whole.steps, whole.nfe, whole.weights) == (7, 8, "ema")
    for i in range(3):
        alone = sd.edit(model, x0[i : i + 1], 0.5, 4, y=y[i : i + 1], start_index=4 * i, **how)
        torch.testing.assert_close(alone.x, whole.x[4 * i : 4 * i + 4])
    assert sd.edit(model, x0, 0.5, y=y, t_start=0.3, **how).t_start == 0.3


@pytest.mark.parametrize("solver", [None, "heun", "ancestral"])
def test_what_is_kept_stays_and_the_rest_is_edited(solver):
    """Of independent entries the edited ones do not feel that the others are kept."""
    score, x0 = normal(0.3, 0.6, (2, 3)).score(sd.EDM()), torch.full((2, 2, 3), 1.8, dtype=f64)
    x0[1] = -0.5
    keep = torch.tensor([True, False, True])
    out = sd.edit(score, x0, 0.5, 3, keep=keep, solver=solver, steps=30, seed=1)
    kept = x0.repeat_interleave(3, 0)
    assert torch.equal(out.x[..., keep], kept[..., keep])
    assert (out.x[..., 1] - kept[..., 1]).abs().min() > 1e-3
    assert out.solver["name"] == "replacement"
    free = sd.edit(score, x0, 0.5, 3, solver=solver, steps=30, seed=1)
    assert (free.x - kept).abs().min() > 1e-3
    if solver != "ancestral":  # without noise of its own
        torch.testing.assert_close(out.x[..., 1], free.x[..., 1], rtol=1e-9, atol=1e-9)


# --- bridges ----------------------------------------------------------------------------------


def affine(sde, mean, std, t_from, t_to):
    """``(offset, factor)`` of the ODE of ``N(mean, std^2)``: ``x -> offset + factor x``."""
    (a, s), (b, r) = level(sde, t_from), level(sde, t_to)
    factor = math.sqrt((b**2 * std**2 + r**2) / (a**2 * std**2 + s**2))
    return b * mean - factor * a * mean, factor


OTHERS = [sd.VP(), sd.EDM(), sd.Linear(t_max=0.99)]


@pytest.mark.parametrize("other", OTHERS, ids=lambda s: type(s).__name__)
def test_a_bridge_between_gaussians_is_the_optimal_map(sde, other):
    (m, s), (n, r) = ([0.3, -0.8], [0.5, 1.2]), ([-0.5, 0.6], [1.4, 0.3])
    x = torch.tensor([[0.9, 0.2], [0.1, -1.0], [-0.6, 1.5]], dtype=f64)
    one, two = normal(m, s).score(sde), normal(n, r).score(other)
    out = sd.bridge(one, two, x, solver=TIGHT, cycle=False)
    assert out.converged
    assert (out.latents.t_max, out.samples.t_start) == (sde.t_max, other.t_max)
    for k in range(2):
        up, f = affine(sde, m[k], s[k], sde.t_min_likelihood, sde.t_max)
        down, g = affine(other, n[k], r[k], other.t_max, other.t_min_likelihood)
        ratio = math.hypot(*level(other, other.t_max)) / math.hypot(*level(sde, sde.t_max))
        exact = down + g * ratio * (up + f * x[:, k])
        torch.testing.assert_close(out.x[:, k], exact, rtol=1e-5, atol=2e-6)
        transport = n[k] + r[k] / s[k] * (x[:, k] - m[k])
        left = abs(m[k]) * level(sde, sde.t_max)[0] / sde.prior_std
        left += abs(n[k]) * level(other, other.t_max)[0] / other.prior_std
        assert (out.x[:, k] - transport).abs().max() < 1.1 * r[k] * left + 5e-3


def test_the_map_between_correlated_gaussians_that_commute():
    """In the axes that two covariances share the map is diagonal, for any rotation of them."""
    turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]], dtype=f64)

    class Turned(sd.Score):
        def __init__(self, inner):
            self.inner, self.sde = inner, inner.sde

        def __call__(self, x, t):
            return self.inner(x @ turn, t) @ turn.T

    sde = sd.VP()
    one, other = normal([0.2, 0.5], [0.4, 1.1]), normal([-0.3, 0.1], [1.5, 0.7])
    x = torch.tensor([[0.9, 0.2], [-0.4, 0.8]], dtype=f64)
    ends = Turned(one.score(sde)), Turned(other.score(sde))
    out = sd.bridge(*ends, x, solver=TIGHT, cycle=False)
    mean, goal = (turn @ d.means[0] for d in (one, other))
    matrix = turn @ torch.diag(other.stds[0] / one.stds[0]) @ turn.T
    torch.testing.assert_close(out.x, goal + (x - mean) @ matrix.T, rtol=0, atol=5e-3)
    assert not torch.allclose(matrix, torch.diag(matrix.diag()), atol=0.1)


def test_there_and_back_is_where_it_began_and_is_measured(mixture):
    one, other = mixture.score(sd.VP()), normal([0.5, -0.5], [1.0, 0.4]).score(sd.EDM())
    x = mixture.sample(3, torch.Generator().manual_seed(1))
    fine = sd.bridge(one, other, x, solver=TIGHT)
    assert fine.cycle.max() < 1e-6
    torch.testing.assert_close(fine.cycle, rms(fine.back - x))
    rough = sd.bridge(one, other, x, solver="dpmpp-2m", steps=15)
    assert 1e-3 < rough.cycle.max() < 1
    torch.testing.assert_close(rough.cycle, rms(rough.back - x))
    assert (rough.latents.steps, rough.samples.steps) == (15, 15)
    one_way = sd.bridge(one, other, x, solver="dpmpp-2m", steps=15, cycle=False)
    assert torch.equal(one_way.x, rough.x)
    assert (one_way.cycle, one_way.back) == (None, None)
    itself = sd.bridge(one, one, x, solver=TIGHT)
    assert rms(itself.x - x).max() < 1e-6


def test_the_image_of_a_law_is_the_other_law(mixture):
    """Mixture to Gaussian and back: moments of the target, from items of the source."""
    target = normal([0.5, -0.5], [1.0, 0.4])
    x = mixture.sample(4000, torch.Generator().manual_seed(1))
    out = sd.bridge(
        mixture.score(sd.VP()), target.score(sd.Linear()), x, solver="dpmpp-3m", steps=60,
        cycle=False,
    )  # fmt: skip
    assert (out.x.mean(0) - target.means[0]).abs().max() < 0.06
    assert (out.x.std(0) - target.stds[0]).abs().max() < 0.05
    assert abs(float(out.x.T.corrcoef()[0, 1])) < 0.06


def test_conditions_go_to_their_own_model_and_failures_are_said(mixture):
    class Shifted(sd.Score):
        def __init__(self, sde):
            self.sde = sde

        def __call__(self, x, t, y):
            mean = torch.stack([y, -y], 1).to(x)
            t = torch.as_tensor(t, dtype=x.dtype)
            a, s = self.sde.alpha(t), self.sde.sigma(t)
            return -(x - a * mean) / (a**2 * 0.25 + s**2)

    score, x = Shifted(sd.VP()), torch.tensor([[0.3, 0.1], [0.2, 0.9]], dtype=f64)
    here, there = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.7])
    out = sd.bridge(
        score, score, x, source_cond={"y": here}, target_cond={"y": there}, solver=TIGHT
    )
    sde, sign = sd.VP(), torch.tensor([1.0, -1.0], dtype=f64)
    ends = sde.t_min_likelihood, sde.t_max
    up = torch.stack([affine(sde, y, 0.5, *ends)[0] for y in here.double()])[:, None] * sign
    down = torch.stack([affine(sde, y, 0.5, *ends[::-1])[0] for y in there.double()])[:, None]
    f, g = affine(sde, 0.0, 0.5, *ends)[1], affine(sde, 0.0, 0.5, *ends[::-1])[1]
    torch.testing.assert_close(out.x, down * sign + g * (up + f * x), rtol=0, atol=1e-6)
    moved = (there - here)[:, None] * sign
    torch.testing.assert_close(out.x - x, moved, rtol=0, atol=0.02)  # but for what is left
    assert out.cycle.max() < 1e-6
    short = sd.bridge(
        mixture.score(sd.VP()), mixture.score(sd.VP()), x,
        solver={"name": "runge-kutta", "max_nfe": 20},
    )  # fmt: skip
    assert not short.converged
    assert short.message.count("sample 0 stopped") == 4


# --- ways between latents under guidance -------------------------------------------------------


class Classes(torch.nn.Module):
    """The noise of ``N(mean_y, 0.5^2)`` under VP, in closed form; class 2 is no class."""

    num_classes = 2
    means = torch.tensor([[1.0, 0.2], [-0.7, 0.9], [0.1, 0.4]])

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, c_noise, y):
        a, s = (v(c_noise)[:, None].to(x) for v in (sd.VP().alpha, sd.VP().sigma))
        return s * (x - a * self.means[y].to(x)) / (a**2 * 0.25 + s**2)


@pytest.mark.parametrize("scale", [None, 2.5])
def test_a_way_under_labels_and_guidance_is_its_closed_form(scale):
    """Guided Gaussians of one covariance are the Gaussian of the mean led along."""
    model = sd.ScoreModel(
        Classes(), sd.VP(), sd.Eps(label=sd.noise_labels.Time(scale=1.0)), shape=(2,)
    ).double()  # fmt: skip
    score = model if scale is None else sd.guidance.ClassifierFree(model, scale)
    a, b = (torch.tensor(v, dtype=f64) for v in ([[1.2, 0.5], [0.9, 0]], [[0.4, 0.3], [-1, 1]]))
    y = torch.tensor([0, 1])
    way = sd.interpolate(score, a, b, 5, y=y, solver=TIGHT)
    assert way.x.shape == (2, 5, 2)
    assert way.round_trip.max() < 1e-4
    means, nothing = Classes.means[y].double(), Classes.means[2].double()
    means = means if scale is None else nothing + scale * (means - nothing)
    sde, shares = sd.VP(), torch.linspace(0, 1, 5, dtype=f64)
    for i in range(2):
        ends = sde.t_min_likelihood, sde.t_max
        up = torch.stack([affine(sde, m, 0.5, *ends)[0] for m in means[i]])
        factor = affine(sde, 0.0, 0.5, *ends)[1]
        first, last = (up + factor * x[i : i + 1] for x in (a, b))
        z = sd.slerp(first.expand(5, 2), last.expand(5, 2), shares)
        torch.testing.assert_close(way.x[i], (z - up) / factor, rtol=0, atol=1e-4)


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, x: sd.edit(s, x, 0.0), r"in \(0, 1\], got 0: 0 would leave the guide"),
        (lambda s, x: sd.edit(s, x, 1.01), r"in \(0, 1\], got 1.01"),
        (lambda s, x: sd.edit(s, x, math.nan), "got nan"),
        (lambda s, x: sd.edit(s, x, 5e-4), "to t=0.0005, where sampling has ended"),
        (lambda s, x: sd.edit(s, x, 0.5, t_end=0.6), r"ended \(t_end=0.6\): take a larger one"),
        (lambda s, x: sd.edit(s, x, t_start=1e-4), "t_end < t_start"),
        (lambda s, x: sd.edit(s, x, t_start=1.5), r"t_start=1.5 lies outside .* \[1e-05, 1\]"),
        (lambda s, x: sd.edit(s, x, draws=0), "draws >= 1, got 0"),
        (lambda s, x: sd.edit(s, x, keep=torch.zeros(2)), "a mask needs a known entry"),
        (lambda s, x: sd.edit(s, x, keep=torch.ones(3)), r"does not fit items of shape \(2,\)"),
        (lambda s, x: sd.edit(s, x.long()), "got torch.int64: take integer data"),
        (lambda s, x: sd.edit(s, x / 0), "finite floating-point guides"),
        (lambda s, x: sd.edit(s, x, y=x[:3]), "condition 'y' has 3 values for 4 samples"),
        (lambda s, x: sd.bridge(s, s, x, solver="ancestral"), "'ancestral' draws noise"),
        (
            lambda s, x: sd.bridge(s, normal(0.0, 1.0, (3,)).score(sd.VP()), x),
            r"models of one shape, got items of \(2,\) and of \(3,\)",
        ),
    ],
)
def test_what_does_not_fit_is_said(mixture, call, message):
    with pytest.raises(ValueError, match=message):
        call(mixture.score(sd.VP()), torch.ones(4, 2, dtype=f64))
