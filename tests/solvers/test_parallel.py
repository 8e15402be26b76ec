"""Parallel-in-time sampling: the sequential result, in fewer rounds, whatever the batch."""

import re

import pytest
import torch

import scoresde as sd
from scoresde import config, grids, solvers
from scoresde.sampling import join
from scoresde.solvers.affine import increments

f64 = torch.float64
METHODS = [
    solvers.DDIM(),
    solvers.DDIM(eta=0.7),
    solvers.PNDM(),
    solvers.Ancestral(),
    solvers.ReverseDiffusion(),
    solvers.EulerMaruyama(),
    solvers.EulerMaruyama(eta=0.0),
    solvers.Multistep("noise", points=1),
    solvers.Multistep("data", points=3, lower_last=True),
    solvers.Multistep("velocity", points=6, corrector=7),
    solvers.DPMpp2M(),
    solvers.DPMpp3M(form="published"),
    solvers.SDEDPMpp2M(),
    solvers.SASolver(),
    solvers.UniPC(),
    solvers.DEIS(),
    solvers.VAB(),
]


def pair(score, method, steps=24, shape=(4, 2), **fields):
    """The end points, one step after another and in parallel."""
    settings = {"steps": steps, "grid": "logsnr", "denoise": False, "seed": 2}
    one = sd.sample(score, shape, solver=method, **settings)
    return one, sd.sample(score, shape, solver=solvers.Parallel(method, **fields), **settings)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_without_tolerance_it_is_the_sequential_method(mixture, method):
    one, many = pair(mixture.score(sd.VP()), method, window=9, tolerance=0.0)
    torch.testing.assert_close(many.x, one.x, rtol=0, atol=1e-11)
    assert many.converged
    assert many.rounds <= 24


@pytest.mark.parametrize(
    "method", [solvers.DPMpp2M(), solvers.VAB(), solvers.SASolver()], ids=repr
)
def test_in_every_process(sde, mixture, method):
    score = mixture.score(sde)
    one, many = pair(score, method, window=9, tolerance=0.0)
    torch.testing.assert_close(many.x, one.x, rtol=0, atol=1e-11)
    one, many = pair(score, method, steps=60, tolerance=1e-3)
    assert (many.x - one.x).abs().max() < 1e-2
    assert many.rounds < 36
    assert (many.nfe > 60).all()


@pytest.mark.parametrize("window", [1, 2, 24, 100])
def test_any_window(mixture, window):
    """One point at a time is the sequential method with its cost."""
    one, many = pair(mixture.score(sd.VP()), "dpmpp-3m", window=window, tolerance=0.0)
    torch.testing.assert_close(many.x, one.x, rtol=0, atol=1e-12)
    if window == 1:
        assert many.rounds == 24
        assert (many.nfe == 24).all()


def test_the_error_falls_with_the_tolerance(mixture):
    gaps = []
    for tolerance in (1e-1, 1e-2, 1e-3, 1e-4):
        one, many = pair(mixture.score(sd.VP()), "vab", steps=50, tolerance=tolerance)
        gaps.append(float((many.x - one.x).abs().max()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-3


@pytest.mark.parametrize("method", ["vab", "unipc", "ancestral", "sa"])
def test_a_sample_does_not_depend_on_its_batch(sde, mixture, method):
    score, settings = mixture.score(sde), {"solver": solvers.Parallel(method), "steps": 30}
    whole = sd.sample(score, (6, 2), **settings)
    for start, count in ((0, 1), (2, 3)):
        part = sd.sample(score, (count, 2), start_index=start, **settings)
        torch.testing.assert_close(part.x, whole.x[start : start + count], rtol=0, atol=1e-12)
        assert torch.equal(part.nfe, whole.nfe[start : start + count])
    assert len(set(whole.nfe.tolist())) > 1  # samples have windows of their own


def test_a_round_is_one_call_and_every_row_is_counted(mixture):
    exact, calls = mixture.score(sd.VP()), []

    def score(x, t):
        calls.append(x.shape[0])
        assert t.shape == (x.shape[0], 1) or not t.ndim  # the denoising has one time
        return exact(x, t)

    score.sde = exact.sde
    out = sd.sample(score, (5, 2), solver="parallel", steps=40, dtype=f64)
    assert len(calls) == out.rounds
    assert sum(calls) == out.nfe.sum()
    assert max(calls) == 5 * 16
    assert calls[-1] == 5  # the denoising


def test_conditions_go_with_their_rows():
    sde = sd.VP()

    def score(x, t, y, scale):
        assert len(y) == len(x)
        std2 = (0.3 * sde.alpha(t)) ** 2 + sde.sigma(t) ** 2
        return -(x - sde.alpha(t) * y[:, None] * scale) / std2

    score.sde = sde
    y = torch.tensor([0.0, 3.0, -2.0, 0.5], dtype=f64)
    settings = {"dtype": f64, "steps": 30, "y": y, "scale": 1.0}
    out = sd.sample(score, (4, 1), solver="parallel", **settings)
    one = sd.sample(score, (4, 1), solver="vab", grid="logsnr", **settings)
    torch.testing.assert_close(out.x, one.x, rtol=0, atol=3e-3)
    assert (one.x[:, 0] - y).abs().max() < 2


def test_the_numbers_of_ddim(sde):
    """``d(x/alpha) = eps dq``, in units of ``1/alpha`` at the start."""
    times = grids.LogSNR()(sde, 12, sde.t_max, sde.t_min_sampling)
    scale, lags = increments(solvers.DDIM(), sde, times)
    alpha, q = sde.alpha(times), torch.exp(-sde.log_snr(times))
    torch.testing.assert_close(scale, alpha / alpha[0])
    torch.testing.assert_close(lags, (alpha[0] * q.diff())[:, None])


def test_images_in_float32():
    means = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    score = sd.GaussianMixture([1.0, 1.0, 1.0], means, torch.tensor([0.3, 0.3, 0.3])).score(
        sd.VP()
    )
    for method in ("vab", "ancestral"):
        one, many = pair(score, method, steps=30, shape=(3, 2, 4, 4))
        assert many.x.dtype == torch.float32
        assert (many.x - one.x).abs().max() < 2e-2
        assert many.rounds < 30


def test_a_callback_and_a_budget_of_rounds(mixture):
    seen, score = [], mixture.score(sd.VP())
    whole = sd.sample(
        score, (5, 2), solver="parallel", steps=40, callback=lambda *state: seen.append(state)
    )
    steps, times, states = zip(*seen, strict=True)
    assert list(steps) == list(range(1, whole.rounds))
    assert sorted(times, reverse=True) == list(times)
    assert times[-1] == whole.t_end == 1e-3
    assert states[-1].shape == (5, 2)
    limited = solvers.Parallel(max_rounds=4)
    out = sd.sample(score, (5, 2), solver=limited, steps=40, denoise=False)
    assert not out.converged
    assert out.rounds == 4
    assert out.t_end == times[3]
    assert torch.equal(out.x, states[3])
    assert out.message.startswith("sample 0 stopped at t=")
    t, step = re.search(r"t=(\S+), step (\d+) of 40, in", out.message).groups()
    grid = config.build(out.grid, grids, "grid")(score.sde, 40, 1.0, 1e-3)
    assert float(grid[int(step)]) == pytest.approx(float(t), rel=1e-5)
    assert out.message.endswith("float64: the rounds allowed are used up, and 4 more")


def test_a_state_that_is_lost_does_not_take_others_along(mixture):
    exact = mixture.score(sd.VP())

    def score(x, t, bad):
        return exact(x, t) * torch.where(bad & (t.flatten() < 0.5), torch.nan, 1.0)[:, None]

    score.sde = exact.sde
    bad = torch.tensor([False, True, False])
    settings = {"solver": "parallel", "steps": 30, "denoise": False, "dtype": f64}
    out = sd.sample(score, (3, 2), bad=bad, **settings)
    fine = sd.sample(score, (3, 2), bad=torch.zeros_like(bad), **settings)
    assert not out.converged
    assert "sample 1 stopped" in out.message
    assert "the state is not finite" in out.message
    assert 0.3 < out.t_end < 0.5
    torch.testing.assert_close(out.x[::2], fine.x[::2], rtol=0, atol=1e-12)


def test_batches_are_joined(mixture):
    score = mixture.score(sd.VP())
    parts = [sd.sample(score, (2, 2), solver="parallel", steps=30, start_index=i) for i in (0, 2)]
    assert join(parts).rounds == max(part.rounds for part in parts)
    assert sd.sample(score, (2, 2), solver="ddim", steps=3).rounds is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"solver": "heun"},
            "'heun' cannot be run in parallel; accepted: multistep methods, ddim",
        ),
        ({"solver": "langevin"}, "'langevin' cannot be run in parallel"),
        ({"solver": "runge-kutta"}, "'runge-kutta' cannot be run in parallel"),
        ({"solver": "vabb"}, "unknown solver 'vabb'"),
        ({"window": 0}, "window >= 1, got 0"),
        ({"tolerance": -1.0}, "tolerance >= 0, got -1"),
        ({"max_rounds": 0}, "max_rounds >= 1, got 0"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ValueError, match=message):
        solvers.Parallel(**fields)


def test_a_method_of_another_form_is_noticed(mixture):
    class Twice(solvers.DDIM):
        def step(self, reverse, x, t, s, noise, state=None):
            middle = (t + s) / 2
            x, _ = super().step(reverse, x, t, middle, noise)
            return super().step(reverse, x, middle, s, noise)

    with pytest.raises(ValueError, match="Twice is not affine in one value a step"):
        sd.sample(mixture.score(sd.VP()), (2, 2), solver=solvers.Parallel(Twice()), steps=5)


@pytest.mark.parametrize("sde", [sd.VP(), sd.VE()], ids=lambda s: type(s).__name__)
def test_a_density_rests_before_its_sample_leaves(sde):
    """One log-density beside many entries does not hide in their mean."""
    means = torch.linspace(-1, 1, 128, dtype=f64).reshape(2, 64)
    score = sd.GaussianMixture([0.4, 0.6], means, [0.3, 0.4]).score(sde)
    settings = {"steps": 40, "grid": "logsnr", "log_prob": True, "divergence": "exact"}
    exact = sd.sample(score, (3, 64), solver="vab", **settings)
    found = sd.sample(score, (3, 64), solver="parallel", **settings)
    assert ((found.log_prob - exact.log_prob).abs() / 64).max() < 2e-3
    assert found.rounds < 30


@pytest.mark.parametrize("method", [solvers.Ancestral(), solvers.SASolver()], ids=repr)
def test_brownian_paths_and_thresholds_are_those_of_the_steps(mixture, method):
    settings = {"steps": 20, "brownian": True, "threshold": "dynamic", "seed": 3}
    score = mixture.score(sd.VP())
    one = sd.sample(score, (4, 2), solver=method, **settings)
    many = sd.sample(score, (4, 2), solver=solvers.Parallel(method, tolerance=0.0), **settings)
    torch.testing.assert_close(many.x, one.x, rtol=0, atol=1e-11)
    free = sd.sample(score, (4, 2), solver=method, **{**settings, "brownian": False})
    assert (many.x - free.x).abs().max() > 0.01
