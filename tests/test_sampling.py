"""sample(): what it starts from, where it stops, and what it says about it."""

import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn

import scoresde as sd
from scoresde import config, grids, sampling, solvers
from scoresde.noise import KeyedNoise


@pytest.fixture
def score(mixture):
    return mixture.score(sd.VP())


class Plain:
    """The least that a score can be: a callable with an ``sde``."""

    def __init__(self, score):
        self.inner, self.sde, self.calls = score, score.sde, []

    def __call__(self, x, t, **cond):
        self.calls.append((float(t), cond, torch.is_grad_enabled()))
        return self.inner(x, t)


class Net(nn.Module):
    """A network with dropout, conditioned on ``y``."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.dropout = nn.Dropout(0.5)
        self.training_seen = set()

    def forward(self, x, c_noise, y=None):
        self.training_seen.add(self.training)
        shift = 0 if y is None else y[:, None].to(x.dtype)
        return self.dropout(x * self.scale) + shift


def test_defaults_follow_the_process(sde, mixture):
    out = sd.sample(mixture.score(sde), (2, 2))
    assert out.solver["name"] == sde.default_solver
    solver = config.build(sde.default_solver, solvers, "solver")
    assert out.steps == solver.default_steps
    assert out.grid["name"] == solver.default_grid
    assert (out.t_start, out.t_end) == (sde.t_max, sde.t_min_sampling)
    assert out.nfe == out.steps * solver.nfe_per_step + 1
    assert out.converged
    assert out.message == ""
    assert out.weights is None
    assert out.log_prob is None
    assert out.x.shape == (2, 2)
    assert out.x.dtype == torch.float64


@pytest.mark.filterwarnings("ignore:.*noisy samples")
@pytest.mark.parametrize("name", sorted({*config.names(solvers)} - {"langevin"}))
def test_samples_of_every_solver_have_the_moments_of_the_data(sde, mixture, name):
    together = {"together": True} if name in ("ode", "ode-scipy") else {}  # for speed
    chosen = config.build({"name": name, **together}, solvers, "solver")
    many = chosen.stochastic or name == "euler"
    steps = None if chosen.default_steps is None else 150 if many else 50
    x = sd.sample(mixture.score(sde), (500, 2), solver=chosen, steps=steps, seed=1).x
    mean, covariance = mixture.moments()
    assert (x.mean(0) - mean).abs().max() < 0.15
    assert (torch.cov(x.T) - covariance).abs().max() < 0.15


def test_all_three_ways_to_name_a_solver_and_a_grid(score):
    ways = [
        {"solver": "ddim", "grid": "karras"},
        {"solver": {"name": "ddim"}, "grid": {"name": "karras"}},
        {"solver": solvers.DDIM(), "grid": grids.Karras()},
    ]
    outs = [sd.sample(score, (3, 2), steps=7, **way) for way in ways]
    for out in outs:
        assert torch.equal(out.x, outs[0].x)
        assert out.solver == {"name": "ddim", "eta": 0.0}
        assert out.grid == {"name": "karras", "rho": 7.0}
        assert (out.steps, out.nfe) == (7, 8)


def test_a_solver_of_the_user(score):
    class Half(solvers.DDIM):
        pass

    out = sd.sample(score, (3, 2), solver=Half(), steps=5)
    assert out.solver["name"].endswith("Half")


def test_seeds_repeat_and_differ(score):
    for solver in ("ddim", "ancestral", "pc", "torchsde", "adaptive-sde"):
        steps = None if solver == "adaptive-sde" else 5
        draws = [sd.sample(score, (4, 2), solver=solver, steps=steps, seed=s).x for s in (0, 0, 1)]
        assert torch.equal(draws[0], draws[1])
        assert not torch.isclose(draws[0], draws[2]).any()


@pytest.mark.parametrize(
    ("solver", "brownian"),
    [("ancestral", False), ("ancestral", True), ("pc", True), ("torchsde", False), ("ode", False),
     ("ode-scipy", False), ("parallel", False)],
)  # fmt: skip
def test_a_series_in_batches_is_the_series(score, solver, brownian):
    steps = None if solver in ("ode", "ode-scipy") else 10
    how = {"solver": solver, "steps": steps, "seed": 3, "brownian": brownian}
    whole = sd.sample(score, (7, 2), **how).x
    parts = [sd.sample(score, (n, 2), start_index=i, **how).x for i, n in ((0, 3), (3, 3), (6, 1))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", ["ddim", "ancestral", "pc"])
def test_x_t_stands_for_the_draw_from_the_prior(score, solver):
    drawn = sd.sample(score, (4, 2), solver=solver, steps=10, seed=5)
    x = score.sde.prior_sample((4, 2), KeyedNoise(5), dtype=torch.float64)
    given = sd.sample(score, x_T=x, solver=solver, steps=10, seed=5)
    assert torch.equal(drawn.x, given.x)


def test_a_run_in_two_parts(score):
    """From an intermediate time on, with the state that belongs to it."""
    times = grids.Uniform()(score.sde, 10, 1.0, 0.1)
    whole = sd.sample(score, (4, 2), solver="ddim", steps=10, grid="uniform", t_end=0.1)
    first = sd.sample(
        score, (4, 2), solver="ddim", steps=4, grid="uniform", t_end=float(times[4]), denoise=False
    )
    second = sd.sample(
        score, x_T=first.x, solver="ddim", steps=6, grid="uniform", t_start=first.t_end, t_end=0.1
    )
    torch.testing.assert_close(second.x, whole.x)
    assert (second.t_start, second.t_end) == (float(times[4]), 0.1)


def test_the_end_is_denoised(score):
    noisy = sd.sample(score, (4, 2), solver="ancestral", steps=10, denoise=False)
    clean = sd.sample(score, (4, 2), solver="ancestral", steps=10)
    assert clean.nfe == noisy.nfe + 1 == 11
    torch.testing.assert_close(clean.x, score.denoise(noisy.x, clean.t_end))


def test_a_spent_budget_is_denoised_from_where_it_ended(score):
    solver = {"name": "ode", "max_nfe": 30, "together": True}
    out = sd.sample(score, (4, 2), solver=solver)
    assert not out.converged
    assert "stopped after 30 evaluations" in out.message
    assert out.t_end > 1e-3
    assert out.nfe == 31
    assert (out.grid, out.steps) == (None, None)
    raw = sd.sample(score, (4, 2), solver=solver, denoise=False)
    torch.testing.assert_close(out.x, score.denoise(raw.x, raw.t_end))


def test_a_network_is_evaluated_without_dropout_or_gradients():
    net = Net()
    model = sd.ScoreModel(net, sd.VP(), sd.Eps(), shape=(2,), weights="ema")
    model.train()
    y = torch.tensor([0.0, 1.0, 2.0])
    out = sd.sample(model, (3, 2), steps=4, y=y)
    assert net.training_seen == {False}
    assert model.training
    assert net.training
    assert not out.x.requires_grad
    assert out.weights == "ema"
    assert out.x.dtype == torch.float32
    assert not torch.allclose(out.x, sd.sample(model, (3, 2), steps=4, y=0 * y).x)


def test_training_mode_returns_even_after_a_failure(mixture):
    model = sd.ScoreModel(Net(), sd.VP(), sd.Eps()).train()
    with pytest.raises(ValueError, match="the network Net takes no condition 'z'"):
        sd.sample(model, (3, 2), steps=4, z=1)
    with pytest.raises(IndexError, match="too many indices"):
        sd.sample(model, (3, 2), steps=4, y=torch.tensor(1.0))
    assert model.training


def test_a_plain_callable_and_its_conditions(score):
    plain, y = Plain(score), torch.arange(4)
    out = sd.sample(plain, (4, 2), solver="ddim", steps=5, dtype=torch.float64, y=y, mode="a")
    assert len(plain.calls) == out.nfe == 6
    for _, cond, gradients in plain.calls:
        assert torch.equal(cond["y"], y)
        assert cond["mode"] == "a"
        assert not gradients
    torch.testing.assert_close(out.x, sd.sample(score, (4, 2), solver="ddim", steps=5).x)
    x = torch.randn(4, 2, dtype=torch.float64)
    assert sd.sample(plain, x_T=x, steps=2).x.dtype == torch.float64


def test_the_dtype_of_the_state(score):
    for dtype in (torch.float32, torch.float64):
        out = sd.sample(score, (4, 2), solver="ancestral", steps=10, dtype=dtype)
        assert out.x.dtype == dtype
    single = sd.sample(score, (4, 2), solver="ancestral", steps=10, dtype=torch.float32)
    torch.testing.assert_close(single.x.double(), out.x, rtol=1e-4, atol=1e-4)
    half = torch.zeros(4, 2, dtype=torch.float16)
    assert sd.sample(score, x_T=half, steps=2).x.dtype == torch.float64


def test_non_finite_values_are_named(mixture):
    sde = sd.VP()
    exact = mixture.score(sde)
    plain = Plain(exact)
    plain.inner = lambda x, t: exact(x, t) * (math.inf if t < 0.5 else 1.0)
    out = sd.sample(plain, (4, 2), solver="ddim", grid="uniform", steps=10)
    assert not out.converged
    assert out.message.startswith("non-finite values from step 7 of 10 on, at t=0.3007")
    plain.inner = lambda x, t: exact(x, t) * (math.nan if t <= 1e-3 else 1.0)
    out = sd.sample(plain, (4, 2), solver="ddim", grid="uniform", steps=10)
    assert not out.converged
    assert out.message == "non-finite after denoising at t=0.001"


def test_one_value_that_is_lost_in_denoising_is_said(mixture):
    exact = mixture.score(sd.VP())

    def score(x, t):
        last = torch.zeros_like(x)
        last[0, 0] = torch.nan if t == 1e-3 else 0.0
        return exact(x, t) + last

    score.sde = exact.sde
    out = sd.sample(score, (2, 2), solver="ddim", steps=5)
    assert not out.converged
    assert out.message == "non-finite after denoising at t=0.001"


def test_callback_and_progress(score):
    for solver in ("ddim", "ode"):
        seen: list = []
        record = partial(lambda into, i, t, x: into.append((i, t)), seen)
        sd.sample(score, (4, 2), solver=solver, progress=True, callback=record)
        assert [i for i, _ in seen] == list(range(1, len(seen) + 1))
        assert seen[-1][1] == 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "ddim", "steps": 10, "grid": "uniform"},
         "10 steps on the grid 'uniform' of the deterministic 'ddim' give noisy samples from "
         "trained VE models: take the grid 'karras' with 27 evaluations, 100 steps, or the solver "
         "'pc'"),
        ({"solver": "ddim", "steps": 99}, "99 steps on the grid 'logsnr'"),
        ({"solver": "dpmpp-3m"}, "20 steps on the grid 'logsnr'"),
        ({"solver": "dpmpp-3m", "grid": "karras"}, "21 evaluations of.*take 27 or more, or the"),
        ({"solver": "heun", "steps": 12}, "25 evaluations of the deterministic 'heun'"),
    ],
)  # fmt: skip
def test_few_ode_steps_on_ve_give_a_warning(mixture, settings, message):
    with pytest.warns(UserWarning, match=message) as seen:
        sd.sample(mixture.score(sd.VE()), (2, 2), **settings)
    assert len(seen) == 1
    assert seen[0].filename == __file__


@pytest.mark.parametrize(
    ("sde", "settings"),
    [
        (sd.VE(), {"solver": "ddim", "steps": 100, "grid": "uniform"}),
        (sd.VE(), {"solver": "heun", "steps": 13}),
        (sd.VE(), {"solver": "ddim", "steps": 26, "grid": "karras"}),
        (sd.VE(), {"solver": "ancestral", "steps": 10, "grid": "uniform"}),
        (sd.VE(), {"solver": "runge-kutta"}),
        (sd.VE(), {"steps": 5}),
        (sd.VP(), {"solver": "ddim", "steps": 10, "grid": "uniform"}),
        (sd.EDM(), {"solver": "dpmpp-3m"}),
    ],
)
def test_others_give_none(mixture, sde, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd.sample(mixture.score(sde), (2, 2), **settings)


def test_the_last_steps_with_fewer_points(score):
    """``lower_last`` is off by default, and reaches the solver by its section."""
    settings = {"steps": 3, "denoise": False}
    plain, off, on = (
        sd.sample(score, (3, 2), solver=section, **settings)
        for section in (
            "dpmpp-3m",
            {"name": "dpmpp-3m", "lower_last": False},
            {"name": "dpmpp-3m", "lower_last": True},
        )
    )
    assert torch.equal(plain.x, off.x)
    assert plain.solver["lower_last"] is False
    assert on.solver["lower_last"] is True
    # The second of two steps has one value then: that of DDIM.
    two = [
        sd.sample(score, (3, 2), solver=name, steps=2, grid="logsnr", denoise=False).x
        for name in ({"name": "dpmpp-2m", "lower_last": True}, "ddim")
    ]
    torch.testing.assert_close(*two)
    assert (on.x - plain.x).abs().max() > 1e-3


def test_batches_with_densities_are_joined(score):
    parts = [
        sd.sample(score, (n, 2), start_index=i, log_prob=True, probes=2, solver="heun", steps=4)
        for i, n in ((0, 2), (2, 3))
    ]
    whole = sampling.join(parts)
    assert whole.log_prob.shape == whole.log_prob_stderr.shape == (5,)
    assert (whole.divergence, whole.probes, whole.denoised) == ("hutchinson", 2, False)
    assert sampling.join([sd.sample(score, (2, 2), steps=2)] * 2).log_prob is None


def test_batches_that_differ_keep_their_counts_and_the_largest_time(score):
    def series(**solver):
        return [
            sd.sample(score, (n, 2), start_index=i, seed=1, solver=solver)
            for i, n in ((0, 1), (1, 4))
        ]

    parts = series(name="ode", together=True)
    first, second = (p.nfe for p in parts)
    assert first != second
    assert sampling.join(parts).nfe.tolist() == [first] + 4 * [second]
    spent = series(name="runge-kutta", max_nfe=40)
    assert spent[0].t_end < spent[1].t_end
    assert sampling.join(spent).t_end == spent[1].t_end


@pytest.mark.parametrize(
    "solver",
    [
        {"name": "runge-kutta", "max_nfe": 40},
        {"name": "ode", "max_nfe": 40},
        {"name": "ode-scipy", "max_nfe": 40},
        {"name": "adaptive-sde", "max_nfe": 40},
        {"name": "parallel", "max_rounds": 3},
    ],
    ids=lambda s: s["name"],
)
def test_a_failure_names_its_sample_in_the_series(score, solver):
    fine = sd.sample(score, (3, 2), solver=solver["name"])
    parts = [sd.sample(score, (2, 2), start_index=i, solver=solver) for i in (3, 5, 7)]
    assert fine.converged
    assert parts[0].message.startswith("sample 3")
    whole = sampling.join([fine, *parts]).message
    assert whole == f"{parts[0].message}; 2 more of 4 batches"
    assert sampling.join([fine, parts[2]]).message == parts[2].message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"a shape \(B, \*item\) or a state x_T"),
        ({"shape": (4,)}, r"shape \(B, \*item\) without empty axes, got \(4,\)"),
        ({"shape": (0, 2)}, "without empty axes"),
        ({"shape": (4, 2), "t_end": 1e-6}, "t_end=1e-06 is below the trained t_min=1e-05"),
        ({"shape": (4, 2), "t_end": math.nan}, "t_end=nan is below"),
        ({"shape": (4, 2), "t_start": 1.5}, "t_start=1.5 is above the trained t_max=1"),
        ({"shape": (4, 2), "t_start": 0.5}, "t_start=0.5 needs x_T.*the prior belongs to t_max=1"),
        ({"x_T": torch.zeros(4, 2), "t_start": 0.5, "t_end": 0.5}, "t_end < t_start"),
        ({"shape": (4, 2), "steps": 0}, "steps >= 1, got 0"),
        ({"shape": (4, 2), "solver": "hoin"}, "unknown solver 'hoin'; did you mean 'heun'"),
        ({"shape": (4, 2), "solver": 3}, "solver must be a name, a section or a Solver, got 3"),
        ({"shape": (4, 2), "grid": "karas"}, "unknown grid 'karas'; did you mean 'karras'"),
        ({"shape": (4, 2), "grid": solvers.DDIM()}, "grid must be a name, a section or a Grid"),
        ({"shape": (4, 2), "solver": "ode", "steps": 9}, "solver 'ode' chooses its own steps"),
        ({"shape": (4, 2), "solver": "ode", "grid": "karras"}, "leave out steps and grid"),
        (
            {"shape": (4, 2), "threshold": "dynamc"},
            "unknown threshold mode 'dynamc'; did you mean",
        ),
        ({"shape": (4, 2), "dtype": torch.float16}, "float32 or float64, got dtype=torch.float16"),
        ({"shape": (4, 2), "y": torch.zeros(3)}, "condition 'y' has 3 values for 4 samples"),
    ],
)
def test_what_does_not_fit_is_said(score, arguments, message):
    with pytest.raises(ValueError, match=message):
        sd.sample(score, **arguments)
