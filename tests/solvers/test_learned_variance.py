"""Ancestral sampling with a variance that the network learned."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import scoresde as sd
from scoresde import solvers
from scoresde.noise import KeyedNoise

f64 = torch.float64
T, S = torch.tensor(0.6, dtype=f64), torch.tensor(0.5, dtype=f64)


class WithHead:
    """A score and what a head would say: a number, a tensor or a function of ``(x, t)``."""

    def __init__(self, score, v):
        self.score, self.sde, self.v, self.calls = score, score.sde, v, 0

    def __call__(self, x, t, **cond):
        return self.score(x, t, **cond)

    def noise_and_variance(self, x, t, **cond):
        self.calls += 1
        v = self.v(x, t) if callable(self.v) else torch.as_tensor(self.v).to(x).expand_as(x)
        return self.score.noise(x, t, **cond), v


def state(dtype=f64):
    return torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=dtype)


def moved(score, variance, x, t=T, s=S):
    reverse = score.sde.reverse(score)
    out, _ = solvers.Ancestral(variance).step(reverse, x, t, s, KeyedNoise(3), None)
    assert reverse.nfe == 1
    return out


@pytest.mark.parametrize(("v", "same"), [(-1.0, "small"), (1.0, "large")])
def test_the_ends_are_the_fixed_variances(sde, mixture, v, same):
    score = mixture.score(sde)
    for dtype, rtol in ((f64, 1e-11), (torch.float32, 1e-5)):
        x = state(dtype)
        found, expected = moved(WithHead(score, v), "learned", x), moved(score, same, x)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)


def test_log_variances_are_interpolated_entry_by_entry(sde, mixture):
    v = torch.tensor([[-1.0, -0.3], [0.2, 0.9], [1.0, 0.0], [1.3, -1.2]], dtype=f64)
    score, x = mixture.score(sde), state()
    a, step = sde.transition(T, S)
    large = 2 * step.log()
    small = large + 2 * (sde.sigma(S) / sde.sigma(T)).log()
    f = (v + 1) / 2
    std = torch.exp(f * large + (1 - f) * small).sqrt()
    mean = (x + step**2 * score(x, T)) / a
    z = KeyedNoise(3).normal((4, 2), dtype=f64)
    found = moved(WithHead(score, v), "learned", x)
    torch.testing.assert_close(found, mean + std * z, rtol=1e-10, atol=1e-10)
    # A time a sample, of its shape.
    per = [torch.full((4, 1), float(t), dtype=f64) for t in (T, S)]
    torch.testing.assert_close(moved(WithHead(score, v), "learned", x, *per), found)


@pytest.mark.parametrize("steps", [1000, 20])
def test_steps_are_those_of_diffusers(mixture, steps):
    """Of the table itself, and of a strided run, whose steps have a variance of their own."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(clip_sample=False, variance_type="learned_range")
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=f64)
    theirs.betas, theirs.alphas, theirs.alphas_cumprod = betas, 1 - betas, (1 - betas).cumprod(0)
    theirs.one = torch.tensor(1.0, dtype=f64)
    theirs.set_timesteps(steps)
    score = mixture.score(sd.DDPM())
    v = state().sin()
    for step, following in list(pairwise(theirs.timesteps.tolist()))[:: steps // 10]:
        t, s = (torch.tensor((i + 1) / 1000, dtype=f64) for i in (step, following))
        x = state()
        eps = score.noise(x, t)
        generators = [torch.Generator().manual_seed(step) for _ in range(2)]
        head = torch.cat([eps, v], 1)
        expected = theirs.step(head, step, x, generator=generators[0]).prev_sample
        reverse = score.sde.reverse(WithHead(score, v))
        found, _ = solvers.Ancestral("learned").step(reverse, x, t, s, generators[1], None)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("steps", [3, 30])
def test_the_right_head_makes_the_chain_of_a_gaussian_exact(sde, steps):
    """Where it gives the variance of ``p(x_s | x_t)``, each step maps marginal to marginal."""
    std = 0.7
    data = sd.GaussianMixture([1.0], torch.zeros(1, 1, dtype=f64), [std])
    times = sd.grids.LogSNR()(sde, steps, sde.t_max, sde.t_min_sampling)
    pairs = {float(t): s for t, s in pairwise(times)}

    def power(t):
        return sde.alpha(t) ** 2 * std**2 + sde.sigma(t) ** 2

    def head(x, t):
        s = pairs[float(t)]
        a, v = sde.transition(t, s)
        wanted = power(s) - (a * power(s)) ** 2 / power(t)
        small = 2 * (v * sde.sigma(s) / sde.sigma(t)).log()
        f = (wanted.log() - small) / (2 * v.log() - small)
        assert f > 0
        return (2 * f - 1).expand_as(x)

    score = WithHead(data.score(sde), head)
    for t, s in pairwise(times):
        # Affine in x and z: two states and two noises tell both factors.
        zero, one = torch.zeros(1, 1, dtype=f64), torch.ones(1, 1, dtype=f64)
        reverse, solver = sde.reverse(score), solvers.Ancestral("learned")
        kicked = [solver.step(reverse, x, t, s, KeyedNoise(3), None)[0] for x in (zero, one)]
        std_z = kicked[0] / KeyedNoise(3).normal((1, 1), dtype=f64)
        variance = (kicked[1] - kicked[0]) ** 2 * power(t) + std_z**2
        torch.testing.assert_close(variance, power(s).expand(1, 1), rtol=1e-9, atol=0)


class Net(nn.Module):
    """The exact noise of a mixture on a table, and a head."""

    def __init__(self, score, channels=2):
        super().__init__()
        self.score, self.out, self.calls = score, channels, 0
        self.own = nn.Parameter(torch.zeros((), dtype=f64))

    def forward(self, x, label):
        self.calls += 1
        eps = self.score.noise(x, (label + 1) / 1000)
        return eps if self.out == 1 else torch.cat([eps, torch.sin(3 * x)], 1)


def table_model(mixture, channels=2):
    ends = dict.fromkeys(("t_min", "t_min_sampling", "t_min_likelihood"), 1 / 1000)
    label = {"name": "time", "sde": sd.DDPM(), "scale": 1000.0, "offset": -1.0}
    kind = sd.Eps(scale_input=False, label=label)
    return sd.ScoreModel(Net(mixture.score(sd.DDPM()), channels), sd.DDPM(**ends), kind)


def test_a_network_with_a_head_is_sampled(mixture):
    model = table_model(mixture)
    solver = {"name": "ancestral", "variance": "learned"}
    out = sd.sample(model, (5, 2), solver=solver, steps=40, grid="uniform", seed=4)
    assert out.converged
    assert out.nfe == 41 == model.net.calls
    assert out.t_end == 1 / 1000
    assert out.solver == solver
    alone = sd.sample(
        model, (1, 2), solver=solver, steps=40, grid="uniform", seed=4, start_index=3
    )
    torch.testing.assert_close(alone.x, out.x[3:4], rtol=1e-12, atol=1e-12)
    # The chain by hand from the same draws, the last step being Tweedie's formula.
    exact = WithHead(mixture.score(model.sde), lambda x, t: torch.sin(3 * x))
    noise = KeyedNoise(4)
    x = model.sde.prior_sample((5, 2), noise, dtype=f64)
    for t, s in pairwise(torch.linspace(1, 1 / 1000, 41, dtype=f64)):
        x, _ = solvers.Ancestral("learned").step(exact.sde.reverse(exact), x, t, s, noise, None)
    torch.testing.assert_close(out.x, exact.score.denoise(x, 1 / 1000), rtol=1e-8, atol=1e-8)
    # Neither of the fixed variances would do.
    for other in ("small", "large"):
        fixed = {"name": "ancestral", "variance": other}
        plain = sd.sample(model, (5, 2), solver=fixed, steps=40, grid="uniform", seed=4)
        assert (plain.x - out.x).abs().max() > 1e-3


def test_parts_of_a_batch_keep_their_conditions(mixture):
    seen = []

    class Conditional(WithHead):
        def noise_and_variance(self, x, t, y):
            seen.append(y.tolist())
            return super().noise_and_variance(x, t)

    score = Conditional(mixture.score(sd.VP()), 0.0)
    reverse = score.sde.reverse(score, y=torch.tensor([5, 6, 7, 8]))
    part = reverse.part(torch.tensor([1, 3]))
    part.noise_and_variance(state()[[1, 3]], T)
    assert seen == [[6, 8]]
    assert (part.nfe, reverse.nfe) == (1, 0)


def test_an_end_without_noise_is_finite(mixture):
    score, zero = mixture.score(sd.VP()), torch.zeros((), dtype=f64)
    for v in (-1.0, 0.0, 1.0):
        assert moved(WithHead(score, v), "learned", state(), S, zero).isfinite().all()


def test_a_score_without_a_head_is_refused(mixture):
    class Plain(nn.Module):
        def forward(self, x, c_noise):
            return x

    exact = mixture.score(sd.VP())
    model = sd.ScoreModel(Plain(), sd.VP(), sd.Eps())
    for score in (exact, model):
        name = type(score).__name__
        with pytest.raises(sd.ConfigError, match=rf"variance head.*{name} is not.*'small'"):
            sd.sample(score, (2, 2), solver=solvers.Ancestral("learned"), steps=3)
    with pytest.raises(sd.ConfigError, match="'learnt'; did you mean 'learned'"):
        solvers.Ancestral("learnt")


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_a_threshold_clips_the_data_and_leaves_the_variance(mixture, mode):
    x, score = 3 * state(), mixture.score(sd.VP())
    for v in (-1.0, 1.0):
        led = sd.Threshold(WithHead(score, v), mode, bound=0.4)
        same = moved(sd.Threshold(score, mode, bound=0.4), "small" if v < 0 else "large", x)
        torch.testing.assert_close(moved(led, "learned", x), same, rtol=1e-10, atol=1e-10)
        assert (same - moved(score, "small" if v < 0 else "large", x)).abs().max() > 1e-3
    with pytest.raises(sd.ConfigError, match="this Threshold is not"):
        moved(sd.Threshold(score, mode), "learned", x)
