import math

import pytest
import torch
from scipy import stats
from torch import nn
from torchdiffeq import odeint

import scoresde as sd
from scoresde.likelihood.divergence import exact
from scoresde.likelihood.field import Flow
from scoresde.likelihood.integrate import FIXED, METHODS
from scoresde.path import Path
from scoresde.solvers.runge_kutta import PAIRS

f64 = torch.float64


def crosses(dims):
    """Overlapping components on both sides of each axis: zero mean, diagonal covariance."""
    means = 1.6 * torch.eye(dims, dtype=f64)[:4]
    means = torch.cat([means, -means])
    stds = torch.full((len(means),), 0.5, dtype=f64)
    return sd.GaussianMixture(torch.ones(len(means)), means, stds)


def at_t_min(mixture, sde, n, seed=0):
    """Data with the noise of ``t_min_likelihood``, whose density the likelihood is."""
    generator = torch.Generator().manual_seed(seed)
    x0 = mixture.sample(n, generator)
    noise = torch.randn(x0.shape, generator=generator, dtype=f64)
    return sde.perturb(x0, sde.t_min_likelihood, noise)


def moments(mixture):
    mean, covariance = mixture.moments()
    return mean, covariance.diag().sqrt().reshape(mixture.shape)


class Recorder:
    """A plain callable with ``.sde``, that writes down what it is asked."""

    def __init__(self, score):
        self.score, self.sde, self.times = score, score.sde, []

    def __call__(self, x, t):
        self.times.extend(t.flatten().tolist())
        return self.score(x, t)


class Net(nn.Module):
    """A small network with dropout that counts its calls."""

    def __init__(self, dims=3):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(dims, 8), nn.Linear(8, dims)
        self.drop = nn.Dropout(0.5)
        self.forwards = self.backwards = 0
        self.register_full_backward_hook(self._count)

    def _count(self, *_):
        self.backwards += 1

    def forward(self, x, c_noise):
        self.forwards += 1
        return self.outer(self.drop(torch.tanh(self.inner(x) + c_noise[:, None])))


# --- the number -------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 16])
def test_closed_form_in_every_sde(sde, mixture, dims):
    mixture = mixture if dims == 2 else crosses(dims)
    x = at_t_min(mixture, sde, 12)
    out = sd.log_prob(mixture.score(sde), x, divergence="exact", terminal=moments(mixture))
    error = (out.log_prob - mixture.log_prob(x, sde, sde.t_min_likelihood)) / dims
    assert error.abs().mean() < 1e-4
    assert out.converged.all()
    assert torch.equal(out.log_prob, out.prior + out.delta)
    assert out.log_prob.shape == out.prior.shape == out.delta.shape == out.stderr.shape == (12,)
    assert out.latent.shape == x.shape
    assert (out.stderr == 0).all()


def test_a_tight_tolerance_gives_many_digits(mixture):
    sde = sd.VP()
    x = at_t_min(mixture, sde, 6)
    out = sd.log_prob(mixture.score(sde), x, divergence="exact", rtol=1e-9, atol=1e-9)
    at_latent = mixture.log_prob(out.latent, sde, sde.t_max) + out.delta
    truth = mixture.log_prob(x, sde, sde.t_min_likelihood)
    assert (at_latent - truth).abs().max() < 1e-7


def test_gaussian_latent_follows_the_closed_form_trajectory(sde):
    std = 0.6
    mixture = sd.GaussianMixture([1.0], torch.full((1, 3), 0.5, dtype=f64), [std])
    t0, t1 = sde.t_min_likelihood, sde.t_max
    x = at_t_min(mixture, sde, 5)
    a0, s0, a1, s1 = (float(v) for t in (t0, t1) for v in (sde.alpha(t), sde.sigma(t)))
    ratio = math.sqrt((a1**2 * std**2 + s1**2) / (a0**2 * std**2 + s0**2))
    out = sd.log_prob(mixture.score(sde), x, divergence="exact", rtol=1e-8, atol=1e-8)
    expected = 0.5 * a1 + ratio * (x - 0.5 * a0)
    assert torch.allclose(out.latent, expected, rtol=1e-6, atol=1e-6)
    assert torch.allclose(out.delta, torch.full_like(out.delta, 3 * math.log(ratio)), atol=1e-6)


def test_density_integrates_to_one(sde):
    means = torch.tensor([[-0.9], [0.8]], dtype=f64)
    mixture = sd.GaussianMixture([0.4, 0.6], means, [0.3, 0.15])
    x = torch.linspace(-3.5, 3.5, 351, dtype=f64)[:, None]
    out = sd.log_prob(mixture.score(sde), x, divergence="exact")
    assert torch.trapezoid(out.log_prob.exp(), x[:, 0]) == pytest.approx(1, abs=3e-4)


def test_uniform_data_has_eight_bits_at_256_levels():
    class Uniform:
        sde = sd.VP()

        def __call__(self, x, t):
            alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
            unit = torch.distributions.Normal(torch.zeros((), dtype=f64), 1.0)
            low, high = (x - alpha) / sigma, (x + alpha) / sigma
            # Evaluated in the lower tail, where the mass does not cancel.
            sign = torch.where(x < 0, -1.0, 1.0).to(x)
            lower, upper = torch.where(x < 0, low, -high), torch.where(x < 0, high, -low)
            mass = torch.special.log_ndtr(upper)
            mass = mass + torch.log1p(-(torch.special.log_ndtr(lower) - mass).exp())
            edge = (unit.log_prob(upper) - mass).exp() - (unit.log_prob(lower) - mass).exp()
            return -sign * edge / sigma

    x = (torch.rand(8, 5, generator=torch.Generator().manual_seed(0), dtype=f64) * 2 - 1) * 0.95
    out = sd.log_prob(Uniform(), x, divergence="exact", terminal=(torch.zeros(5), 3**-0.5))
    bits = sd.bits_per_dim(out.log_prob, 5)
    assert (bits - 8).abs().mean() < 3e-4


def test_latent_solved_back_is_the_data():
    for sde in (sd.VP(), sd.EDM()):
        mixture = crosses(4)
        score, x = mixture.score(sde), at_t_min(mixture, sde, 6)
        out = sd.log_prob(score, x, rtol=1e-8, atol=1e-8)
        times = torch.tensor([sde.t_max, sde.t_min_likelihood], dtype=f64)
        options = {"step_t": times[-1:]}
        back = odeint(
            lambda t, z, s=score: s.velocity(z, t),
            out.latent,
            times,
            rtol=1e-8,
            atol=1e-8,
            method="dopri5",
            options=options,
        )[-1]
        assert torch.allclose(back, x, atol=2e-5)


@pytest.mark.parametrize("make", [sd.VP, sd.SubVP, sd.Linear])
def test_the_error_of_a_network_in_log_noise_is_not_stepped_over(make):
    """A network depends on ``log(sigma/alpha)``, over many decades of which a step could pass."""

    class Imperfect:
        sde = make()
        mixture = crosses(4)

        def __call__(self, x, t):
            log_snr, sigma = self.sde.log_snr(t), self.sde.sigma(t)
            size = 0.5 / (1 + 30 * torch.exp(-log_snr))  # an error at little noise
            return self.mixture.score(self.sde)(x, t) - size * torch.sin(2 * x + log_snr) / sigma

    score = Imperfect()
    x = at_t_min(score.mixture, score.sde, 8)
    loose = sd.log_prob(score, x, divergence="exact")
    tight = sd.log_prob(score, x, divergence="exact", rtol=1e-7, atol=1e-7)
    assert loose.nfe.max() < 200
    assert (loose.log_prob - tight.log_prob).abs().mean() / 4 < 1e-4


def test_terminal_moments_remove_the_mismatch_of_the_prior():
    sde = sd.VP(beta_max=8.0)  # leaves alpha = 0.13 at t_max
    mixture = sd.GaussianMixture([1.0], torch.full((1, 4), 0.7, dtype=f64), [0.4])
    x = at_t_min(mixture, sde, 20)
    truth = mixture.log_prob(x, sde, sde.t_min_likelihood)
    errors = [
        (sd.log_prob(mixture.score(sde), x, divergence="exact", terminal=end).log_prob - truth)
        .abs()
        .mean()
        for end in (None, moments(mixture))
    ]
    assert errors[0] > 0.05
    assert errors[1] < 2e-4


@pytest.mark.parametrize("method", METHODS)
def test_every_method_agrees_and_stays_inside_the_times(method):
    sde = sd.VP()
    mixture = crosses(5)
    x = at_t_min(mixture, sde, 4)
    order_one, per_sample = method == "euler", method in PAIRS
    steps = (400 if order_one else 60) if method in FIXED else None
    low_order = method == "torchdiffeq-adaptive_heun"
    rtol = 1e-4 if low_order else 1e-5
    recorder = Recorder(mixture.score(sde))
    out = sd.log_prob(
        recorder,
        x,
        divergence="exact",
        method=method,
        steps=steps,
        rtol=rtol,
        atol=rtol,
        t_min=1e-3,
        t_max=0.9,
        terminal=moments(mixture),
    )
    at_latent = mixture.log_prob(out.latent, sde, 0.9) + out.delta
    error = (at_latent - mixture.log_prob(x, sde, 1e-3)).abs().max() / 5
    assert error < (3e-2 if order_one else 2e-3)
    assert (out.nfe.sum() if per_sample else out.nfe[0]) == len(recorder.times)
    assert min(recorder.times) == 1e-3
    assert max(recorder.times) <= 0.9
    assert max(recorder.times) > 0.85
    assert (out.t_min, out.t_max, out.method, out.steps) == (1e-3, 0.9, method, steps)


def test_float32_state_stays_inside_the_times_and_is_accurate(sde):
    mixture = crosses(4)
    x = at_t_min(mixture, sde, 6)
    recorder = Recorder(mixture.score(sde))
    out = sd.log_prob(recorder, x.float(), divergence="exact")
    wide = sd.log_prob(mixture.score(sde), x, divergence="exact")
    assert out.log_prob.dtype == out.latent.dtype == torch.float32
    assert (out.log_prob - wide.log_prob).abs().max() < 4e-3
    assert sde.t_min_likelihood <= min(recorder.times) < max(recorder.times) <= sde.t_max


# --- Hutchinson -------------------------------------------------------------------------------


def repeated(score, item, copies, **settings):
    """Independent estimates of one item: fixed steps, so that only the probes differ."""
    x = item[None].expand(copies, *item.shape).clone()
    return sd.log_prob(score, x, method="rk4", steps=6, **settings)


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_stderr_covers_the_truth_as_often_as_it_says(noise):
    k, copies, generator = 6, 600, torch.Generator().manual_seed(0)
    means = torch.randn(24, 16, generator=generator, dtype=f64)
    mixture = sd.GaussianMixture(torch.ones(24), means, torch.full((24,), 0.6, dtype=f64))
    score, item = mixture.score(sd.VP()), means[:3].mean(0)
    truth = repeated(score, item, 1, divergence="exact").log_prob
    out = repeated(score, item, copies, probes=k, noise=noise)
    error = out.log_prob - truth
    assert abs(error.mean()) < 4 * error.std() / copies**0.5
    # The stated error is that of the mean of k probes ...
    assert out.stderr.square().mean() == pytest.approx(float(error.var()), rel=0.25)
    # ... and Student's interval around it covers the truth in nine cases of ten.
    covered = (error.abs() <= stats.t.ppf(0.95, k - 1) * out.stderr).double().mean()
    assert covered == pytest.approx(0.9, abs=0.045)


def test_variance_falls_as_one_over_the_probes():
    score, item = crosses(12).score(sd.VP()), torch.linspace(-1, 1, 12, dtype=f64)
    variances = [repeated(score, item, 600, probes=k, seed=k).log_prob.var() for k in (1, 4)]
    assert variances[0] / variances[1] == pytest.approx(4, rel=0.3)


@pytest.mark.parametrize("shape", [(4,), (2, 3), (1, 2, 3), (1, 2, 2, 2)])
def test_any_shape_agrees_with_the_exact_divergence(shape):
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(3, *shape, generator=generator, dtype=f64)
    mixture = sd.GaussianMixture([1.0, 2.0, 1.0], means, torch.full((3,), 0.5, dtype=f64))
    score, item = mixture.score(sd.VP()), 0.5 * means[0] + 0.5 * means[1]
    truth = repeated(score, item, 1, divergence="exact")
    flat = sd.GaussianMixture([1.0, 2.0, 1.0], means.flatten(1), mixture.stds.flatten(1))
    as_vector = repeated(flat.score(sd.VP()), item.flatten(), 1, divergence="exact")
    assert torch.allclose(truth.log_prob, as_vector.log_prob, rtol=1e-12)
    out = repeated(score, item, 300)
    assert out.latent.shape == (300, *shape)
    error = out.log_prob - truth.log_prob
    assert 0 < abs(error.mean()) < 4 * error.std() / 300**0.5


def test_auto_is_exact_for_few_dimensions_only():
    for dims, expected in ((32, "exact"), (33, "hutchinson")):
        out = repeated(crosses(dims).score(sd.VP()), torch.zeros(dims), 1, divergence="auto")
        assert out.divergence == expected
        assert out.probes == (expected == "hutchinson")


def test_one_probe_claims_no_error_bar():
    out = repeated(crosses(5).score(sd.VP()), torch.zeros(5), 2)
    assert out.stderr.isnan().all()
    assert out.log_prob.isfinite().all()
    assert (out.divergence, out.probes) == ("hutchinson", 1)


# --- samples, calls and modes -----------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"method": "rk4", "steps": 20}])
def test_a_sample_does_not_depend_on_its_batch(settings):
    sde, mixture = sd.VP(), crosses(6)
    score, x = mixture.score(sde), at_t_min(crosses(6), sd.VP(), 9)
    whole = sd.log_prob(score, x, probes=2, seed=3, **settings)
    assert settings or len(set(whole.nfe.tolist())) > 2  # so that samples leave before others
    for i in range(9):
        alone = sd.log_prob(score, x[i : i + 1], probes=2, seed=3, start_index=i, **settings)
        assert torch.allclose(alone.log_prob, whole.log_prob[i], rtol=0, atol=1e-11)
        assert torch.allclose(alone.stderr, whole.stderr[i], rtol=0, atol=1e-11)
        assert alone.nfe[0] == whole.nfe[i]


def test_each_sample_pays_for_itself():
    score, x = crosses(3).score(sd.VP()), torch.full((3, 3), 1.6, dtype=f64)
    x[1] = torch.tensor([0.6, 0.55, 0.0])  # between components
    recorder = Recorder(score)
    out = sd.log_prob(recorder, x, divergence="exact")
    assert out.nfe[1] != out.nfe[0] == out.nfe[2]
    assert len(recorder.times) == out.nfe.sum()  # those who have arrived are not evaluated


def test_conditions_go_with_their_samples():
    class Shifted:
        sde = sd.VP()

        def __call__(self, x, t, shift, scale):
            assert len(shift) == len(x)
            std2 = (scale * 0.5 * self.sde.alpha(t)) ** 2 + self.sde.sigma(t) ** 2
            return -(x - self.sde.alpha(t) * shift) / std2

    shift = torch.tensor([[0.0], [5.0], [1.0]], dtype=f64)
    x = shift + torch.tensor([[0.1], [4.0], [-0.3]], dtype=f64)
    out = sd.log_prob(Shifted(), x, divergence="exact", shift=shift, scale=1.0)
    assert len(set(out.nfe.tolist())) > 1  # so that rows do leave the batch
    for i in range(3):
        alone = sd.log_prob(
            Shifted(), x[i : i + 1], divergence="exact", shift=shift[i : i + 1], scale=1.0
        )
        assert torch.allclose(out.log_prob[i], alone.log_prob[0], rtol=1e-12)
    with pytest.raises(ValueError, match="'shift' has 2 values for 3 samples"):
        sd.log_prob(Shifted(), x, shift=shift[:2], scale=1.0)


def test_no_sample_hides_in_the_error_of_the_batch():
    score, path = crosses(3).score(sd.VP()), Path(sd.VP(), 1e-5, 1.0)
    flow = Flow(score, path, lambda f, z, rows: exact(f, z), (1000, 3), {})
    error = torch.zeros(1000, 4)
    error[0] = torch.tensor([3.0, 0.0, 0.0, 1.0])
    assert float(flow.norm(error)[0]) == pytest.approx(3**0.5)
    assert (flow.norm(error)[1:] == 0).all()


@pytest.mark.parametrize(
    ("settings", "products"),
    [
        ({"probes": 1}, 1),
        ({"probes": 3}, 3),
        ({"divergence": "exact"}, 1),
    ],
)
def test_one_network_call_an_evaluation(settings, products):
    net = Net()
    model = sd.ScoreModel(net, sd.VP(), sd.V()).train()
    out = sd.log_prob(model, torch.randn(4, 3), method="rk4", steps=5, **settings)
    assert net.forwards == out.nfe.max() == out.nfe.min() == 20
    assert net.backwards == products * net.forwards
    assert model.training
    assert net.drop.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert out.log_prob.grad_fn is None
    assert out.latent.grad_fn is None
    assert out.weights == "raw"


def test_dropout_is_off_and_restored_after_an_error():
    model = sd.ScoreModel(Net(), sd.VP(), sd.V()).train()
    x = torch.randn(4, 3)
    first, second = (sd.log_prob(model, x, method="rk4", steps=4) for _ in range(2))
    assert torch.equal(first.log_prob, second.log_prob)
    with pytest.raises(ValueError, match="takes no condition 'unknown_condition'"):
        sd.log_prob(model, x, unknown_condition=1)
    assert model.training

    class Broken(Net):
        def forward(self, x, c_noise):
            assert not self.training
            raise RuntimeError("broken")

    model = sd.ScoreModel(Broken(), sd.VP(), sd.V()).train()
    with pytest.raises(RuntimeError, match="broken"):
        sd.log_prob(model, x)
    assert model.training


def test_no_graph_is_kept(monkeypatch):
    alive = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    mixture = crosses(3)

    class Score:
        sde = sd.VP()

        def __call__(self, x, t):
            import weakref

            out = Watch.apply(x)
            alive.append(weakref.ref(out.grad_fn))
            assert sum(ref() is not None for ref in alive) == 1
            return mixture.score(self.sde)(out, t)

    sd.log_prob(Score(), torch.zeros(2, 3, dtype=f64), method="rk4", steps=3, probes=2)
    assert len(alive) == 12
    assert not any(ref() is not None for ref in alive)


def test_under_inference_mode_and_with_conditions():
    model = sd.ScoreModel(Net(), sd.VP(), sd.V())
    x = torch.randn(2, 3)
    expected = sd.log_prob(model, x, method="rk4", steps=3).log_prob
    with torch.inference_mode():
        inside = sd.log_prob(model, x.clone(), method="rk4", steps=3).log_prob
    assert torch.equal(inside, expected)

    class Shifted:
        sde = sd.VP()

        def __call__(self, x, t, shift):
            return -(x - shift)

    a, b = (
        sd.log_prob(Shifted(), x, method="rk4", steps=3, divergence="exact", shift=s).log_prob
        for s in (0.0, 1.0)
    )
    assert not torch.allclose(a, b)


def test_progress_runs_from_start_to_end():
    seen = []
    mixture = crosses(3)
    out = sd.log_prob(
        mixture.score(sd.VP()), torch.zeros(1, 3), progress=lambda *state: seen.append(state)
    )
    fractions, times, counts = zip(*seen, strict=True)
    assert fractions[0] == 0
    assert times[0] == 1e-5
    assert fractions[-1] == 1
    assert list(fractions) == sorted(fractions)
    assert counts[-1] == out.nfe.max()


# --- what cannot be done ----------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"method": "scipy-rk45"}, {"method": "rk4", "steps": 9}])
def test_a_budget_gives_back_what_was_reached(settings):
    sde, mixture = sd.VP(), crosses(4)
    x = at_t_min(mixture, sde, 3)
    out = sd.log_prob(mixture.score(sde), x, max_nfe=20, **settings)
    assert not out.converged.any()
    assert (out.nfe == (19 if not settings else 20)).all()  # whole steps, where they are ours
    assert out.log_prob.isnan().all()
    assert out.latent.isfinite().all()
    assert not torch.equal(out.latent, x)
    assert "evaluations allowed are used up" in out.message
    assert "t=" in out.message
    assert "float64" in out.message


def test_a_score_that_is_not_finite_is_named():
    mixture = crosses(3)

    class Broken:
        sde = sd.VP()

        def __call__(self, x, t, bad):
            hole = torch.where(bad[:, None] & (t > 0.3), math.nan, 0.0)
            return mixture.score(self.sde)(x, t) + hole

    x, bad = torch.zeros(4, 3, dtype=f64), torch.tensor([False, False, True, False])
    out = sd.log_prob(Broken(), x, bad=bad)
    assert out.converged.tolist() == [True, True, False, True]
    assert torch.equal(out.log_prob.isnan(), ~out.converged)
    whole = sd.log_prob(mixture.score(sd.VP()), x)
    assert torch.allclose(out.log_prob[out.converged], whole.log_prob[out.converged], rtol=1e-12)
    assert out.latent.isfinite().all()
    assert "not finite (item 2, t=0.29" in out.message
    common = sd.log_prob(Broken(), x, method="torchdiffeq-dopri5", bad=bad)
    assert not common.converged.any()
    assert "not finite at t=0.3" in common.message
    assert "item 2" in common.message


def test_a_tolerance_that_cannot_be_met_ends_with_a_message():
    class Rough:
        sde = sd.VP()

        def __call__(self, x, t):
            return -x * (1 + 0.1 * ((t * 1e9) % 2))

    for method in ("dopri5", "torchdiffeq-dopri5"):
        out = sd.log_prob(
            Rough(), torch.ones(1, 2, dtype=f64), method=method, max_nfe=300, rtol=1e-7, atol=1e-7
        )
        assert not out.converged
        assert out.nfe <= 300


def test_refusals():
    score = crosses(3).score(sd.VP())
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"uint8.*scaler\.encode"):
        sd.log_prob(score, x.to(torch.uint8))
    bad = x.clone()
    bad[2, 1] = math.nan
    with pytest.raises(ValueError, match="item 2 of x is not finite"):
        sd.log_prob(score, bad)
    with pytest.raises(ValueError, match="below the trained t_min=1e-05 of VP"):
        sd.log_prob(score, x, t_min=1e-6)
    with pytest.raises(ValueError, match="t_max"):
        sd.log_prob(score, x, t_max=1.5)
    with pytest.raises(ValueError, match=r"\(B, \*shape\)"):
        sd.log_prob(score, torch.zeros(3))
    with pytest.raises(sd.ConfigError, match=r"unknown method 'rk45'.*dopri5"):
        sd.log_prob(score, x, method="rk45")
    with pytest.raises(sd.ConfigError, match=r"unknown divergence 'hutch'.*'hutchinson'"):
        sd.log_prob(score, x, divergence="hutch")
    with pytest.raises(ValueError, match="give steps >= 1"):
        sd.log_prob(score, x, method="rk4")
    with pytest.raises(ValueError, match="chooses its own steps"):
        sd.log_prob(score, x, steps=10)


def test_float32_says_what_it_resolves():
    """The floor is where a float32 state is about as good as it gets."""
    sde, mixture = sd.VP(), crosses(4)
    x = at_t_min(mixture, sde, 6).float()
    with pytest.warns(UserWarning, match="1e-09 is below what float32 resolves: 1e-06 is used"):
        out = sd.log_prob(mixture.score(sde), x, divergence="exact", rtol=1e-9, atol=1e-6)
    at_floor = sd.log_prob(mixture.score(sde), x, divergence="exact", rtol=1e-6, atol=1e-6)
    assert torch.equal(out.nfe, at_floor.nfe)
    assert torch.equal(out.log_prob, at_floor.log_prob)
    assert out.converged.all()
    wide = sd.log_prob(mixture.score(sde), x.double(), divergence="exact", rtol=1e-9, atol=1e-9)
    error = (out.log_prob - wide.log_prob).abs().max() / 4
    assert error < 2e-5
