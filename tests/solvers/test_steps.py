"""Single steps against their formulas, and what every solver must have in common."""

import pytest
import torch
from torch import nn

import scoresde as sd
from scoresde import config, grids, solvers
from scoresde.noise import KeyedNoise
from scoresde.parameterization import X0, Eps, Karras, RawScore, V
from scoresde.sde.base import as_time
from scoresde.solvers.dpm import Singlestep

CLASSES = config.names(solvers)
NAMES = list(CLASSES)
STEPPED = [n for n in NAMES if config.names(solvers)[n].default_steps is not None]
T, S = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)


def build(name, **fields):
    return config.build({"name": name, **fields}, solvers, "solver")


def grid(solver, sde, steps):
    rule = config.build(solver.default_grid or "uniform", grids, "grid")
    return rule(sde, steps, sde.t_max, sde.t_min_sampling)


def state(seed=0, shape=(4, 2)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_names():
    expected = "adaptive-sde ancestral ddim deis dpm-2s dpm-3s dpmpp-2m dpmpp-2s dpmpp-3m edm"
    expected += " euler euler-maruyama heun langevin lms multistep ode ode-scipy parallel pc pndm"
    expected += " reverse-diffusion rk runge-kutta sa sde-dpmpp-2m torchsde unipc vab vabm"
    assert sorted(NAMES) == expected.split()
    assert config.describe(solvers.PC())["predictor"] == {"name": "reverse-diffusion"}
    assert build(**config.describe(solvers.PC())) == solvers.PC()


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_euler_maruyama_is_its_formula(sde, mixture, eta):
    x, score = state(), mixture.score(sde)
    found, _ = solvers.EulerMaruyama(eta).step(
        sde.reverse(score, eta), x, T, S, KeyedNoise(3), None
    )
    f, g, dt = sde.drift(x, T), sde.diffusion(T), T - S
    z = KeyedNoise(3).normal((4, 2), dtype=torch.float64)
    expected = x - (f - (1 + eta**2) / 2 * g**2 * score(x, T)) * dt + eta * g * dt.sqrt() * z
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ancestral_is_the_posterior_given_the_denoised_state(sde, mixture, variance):
    """Bayes' rule for ``p(x_s | x_t, x_0)`` with ``x_0`` at its estimate."""
    x, score = state(), mixture.score(sde)
    found, _ = solvers.Ancestral(variance).step(sde.reverse(score), x, T, S, KeyedNoise(3), None)
    a = sde.alpha(T) / sde.alpha(S)
    v2 = sde.sigma(T) ** 2 - a**2 * sde.sigma(S) ** 2
    precision = a**2 / v2 + 1 / sde.sigma(S) ** 2
    mean = (a * x / v2 + sde.alpha(S) * score.denoise(x, T) / sde.sigma(S) ** 2) / precision
    std = precision**-0.5 if variance == "small" else v2.sqrt()
    z = KeyedNoise(3).normal((4, 2), dtype=torch.float64)
    torch.testing.assert_close(found, mean + std * z, rtol=1e-9, atol=1e-9)


def test_reverse_diffusion_is_its_formula(sde, mixture):
    x, score = state(), mixture.score(sde)
    found, _ = solvers.ReverseDiffusion().step(sde.reverse(score), x, T, S, KeyedNoise(3), None)
    a, v = sde.transition(T, S)
    z = KeyedNoise(3).normal((4, 2), dtype=torch.float64)
    torch.testing.assert_close(found, (2 - a) * x + v**2 * score(x, T) + v * z)


def test_ddim_with_all_noise_is_ancestral(sde, mixture):
    x, reverse = state(), sde.reverse(mixture.score(sde))
    ddim, _ = solvers.DDIM(1.0).step(reverse, x, T, S, KeyedNoise(3), None)
    ancestral, _ = solvers.Ancestral().step(reverse, x, T, S, KeyedNoise(3), None)
    torch.testing.assert_close(ddim, ancestral, rtol=1e-9, atol=1e-9)


def test_deterministic_solvers_map_the_noise_of_a_point_exactly(sde):
    """If the data are one point, ``eps`` is constant along a path and no step has an error."""
    point, eps = torch.tensor([[0.4, -0.2]], dtype=torch.float64), state(shape=(3, 2))

    def score(x, t):
        return -(x - sde.alpha(t) * point) / sde.sigma(t) ** 2

    for solver in (solvers.DDIM(), solvers.Heun()):
        x, _ = solver.step(sde.reverse(score, 0.0), sde.perturb(point, T, eps), T, S, None, None)
        torch.testing.assert_close(x, sde.perturb(point, S, eps))


def test_heun_is_algorithm_2_of_edm(mixture):
    sde, x = sd.EDM(), state()
    score = mixture.score(sde)
    slope = (x - score.denoise(x, T)) / T
    ahead = x + (S - T) * slope
    expected = x + (S - T) * (slope + (ahead - score.denoise(ahead, S)) / S) / 2
    found, _ = solvers.Heun().step(sde.reverse(score, 0.0), x, T, S, None, None)
    torch.testing.assert_close(found, expected)


def test_pc_corrects_at_t_and_then_predicts(mixture):
    sde, x, times = sd.VE(), state(), []
    exact = mixture.score(sde)

    def score(y, t):
        times.append(float(t))
        return exact(y, t)

    noise = KeyedNoise(3)
    pc = solvers.PC(corrector={"name": "langevin", "snr": 0.1, "steps": 2})
    found, _ = pc.step(sde.reverse(score), x, T, S, noise, None)
    assert times == [0.6, 0.6, 0.6]
    assert noise.draw == pc.nfe_per_step == 3
    noise = KeyedNoise(3)
    one = torch.tensor(1.0)
    y = solvers.Langevin(0.1, steps=2).correct(sde.reverse(exact), x, T, one, noise)
    expected, _ = solvers.ReverseDiffusion().step(sde.reverse(exact), y, T, S, noise, None)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("predictor", STEPPED)
def test_pc_takes_any_predictor(mixture, predictor):
    pc = solvers.PC(predictor)
    out = sd.sample(mixture.score(sd.VE()), (4, 2), solver=pc, steps=20)
    assert out.converged
    assert out.nfe == 20 * pc.nfe_per_step + 1
    assert pc.eta == pc.predictor.eta


@pytest.mark.parametrize(
    "predictor",
    ["ddim", "vabm", "unipc", "sa", {"name": "parallel", "solver": "vabm"},
     {"name": "torchsde", "method": "reversible_heun"}],
    ids=str,
)  # fmt: skip
def test_what_langevin_adds_is_kept(predictor):
    """Some methods carry a state, or part of one, of before the Langevin step."""
    pc = solvers.PC(predictor, {"name": "langevin", "snr": 0.1})
    std = torch.tensor([0.3, 0.9], dtype=torch.float64)
    score = sd.GaussianMixture([1.0], torch.zeros(1, 2), std[None]).score(sd.VE())
    x_T = torch.zeros(1000, 2, dtype=torch.float64)  # all spread is that of Langevin's noise
    x = sd.sample(score, x_T=x_T, solver=pc, steps=100, grid="logsnr").x
    assert (x.std(0) / std - 1).abs().max() < 0.15


def test_langevin_step_is_the_published_one_in_many_dimensions():
    """``2 a (snr |z|/|score|)^2`` to a few per cent, with ``|z|^2`` at its mean ``D``."""
    sde, snr, a = sd.VP(), 0.16, 0.9
    x = state(shape=(3, 3072))
    score = -0.8 * x / sde.sigma(T) * torch.tensor([[0.9], [1.0], [1.1]])
    moved = {}
    for sign in (1, -1):  # the noise cancels in the mean of the two

        class Signed(KeyedNoise):
            def normal(self, shape, device=None, dtype=None, sign=sign):
                return sign * super().normal(shape, device, dtype)

        reverse = sde.reverse(lambda y, t: score)
        corrector = solvers.Langevin(snr)
        moved[sign] = corrector.correct(reverse, x, T, torch.tensor(a), Signed(1)) - x
    step = ((moved[1] + moved[-1]) / 2 / score).mean(1)
    norm = score.norm(dim=1)
    published = 2 * a * (snr * 3072**0.5 / norm) ** 2
    torch.testing.assert_close(step, published, rtol=0.05, atol=0)
    noise = (moved[1] - moved[-1]) / 2
    torch.testing.assert_close(noise.var(1), 2 * step, rtol=0.1, atol=0)


def test_langevin_alone_keeps_the_signal_between_its_times(sde, mixture):
    x = state()
    still, _ = solvers.Langevin(1e-9).step(
        sde.reverse(mixture.score(sde)), x, T, S, KeyedNoise(0), None
    )
    torch.testing.assert_close(still / sde.alpha(S), x / sde.alpha(T), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dims", [1, 2, 50])
def test_langevin_leaves_the_marginal(sde, dims):
    """At equilibrium the variance is right to the stated ``2/(D + 100) + snr^2``."""
    mixture = sd.GaussianMixture(
        [1.0], torch.full((1, dims), 0.3, dtype=torch.float64), torch.tensor([0.5])
    )
    t = torch.tensor(0.5 * sde.t_max, dtype=torch.float64)
    n, noise, snr = 20_000 // dims, KeyedNoise(2), 0.3
    mean, variance = 0.3 * sde.alpha(t), 0.25 * sde.alpha(t) ** 2 + sde.sigma(t) ** 2
    x = mean + variance.sqrt() * noise.normal((n, dims), dtype=torch.float64)
    corrector = solvers.Langevin(snr, steps=40)
    x = corrector.correct(sde.reverse(mixture.score(sde)), x, t, torch.tensor(1.0), noise)
    spread = 4 / (n * dims) ** 0.5
    assert abs(x.mean() - mean) < spread * variance.sqrt()
    ratio = x.var() / variance
    assert 1 - 1.5 * spread < ratio < 1 + 2 / (dims + 100) + snr**2 + 1.5 * spread


@pytest.mark.parametrize("name", ["pc", "langevin"])
def test_moments_with_langevin_steps(sde, name):
    """Mean and covariance by Monte Carlo, since these steps are not affine in the state."""
    mean = torch.tensor([0.5, -0.3], dtype=torch.float64)
    mixture = sd.GaussianMixture([1.0], mean[None], torch.tensor([[0.3, 0.9]]))
    steps, bias = (200, 0.05) if name == "pc" else (500, 0.2)
    n = 1000
    x = sd.sample(mixture.score(sde), (n, 2), solver=name, steps=steps).x
    std = torch.tensor([0.3, 0.9], dtype=torch.float64)
    z = (x - mean) / std
    assert z.mean(0).abs().max() < bias + 4 / n**0.5
    assert (torch.cov(z.T) - torch.eye(2)).abs().max() < 2 * bias + 4 * (2 / n) ** 0.5


class Inverse(nn.Module):
    """The network that a parameterization turns into a given score."""

    def __init__(self, score, parameterization):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.score, self.parameterization = score, parameterization

    def forward(self, inner, c_noise):
        sde = self.score.sde
        t = as_time(sde.time(-4 * c_noise), inner)
        c = self.parameterization(sde.alpha(t), sde.sigma(t))
        x = inner / c.c_in
        return (self.score.noise(x, t) - c.c_skip * x) / c.c_out


@pytest.mark.parametrize("name", NAMES)
def test_every_parameterization_gives_the_same_samples(sde, mixture, name):
    score = mixture.score(sde)
    steps = 6 if name in STEPPED else None
    loose = {"e_abs": 0.2} if name == "adaptive-sde" else {"rtol": 1e-3, "atol": 1e-3}
    solver = build(name, **({} if steps else loose))
    expected = sd.sample(score, (3, 2), solver=solver, steps=steps)
    for parameterization in (Eps(), X0(), V(), RawScore(), Karras()):
        model = sd.ScoreModel(Inverse(score, parameterization), sde, parameterization)
        found = sd.sample(model, (3, 2), solver=solver, steps=steps)
        torch.testing.assert_close(found.x, expected.x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_its_batch(sde, mixture, name):
    score, steps = mixture.score(sde), 20 if name in STEPPED else None
    batch = sd.sample(score, (5, 2), solver=name, steps=steps, seed=4)
    alone = sd.sample(score, (1, 2), solver=name, steps=steps, seed=4, start_index=3)
    torch.testing.assert_close(batch.x[3:4], alone.x, rtol=1e-12, atol=1e-12)


@pytest.fixture
def threads():
    """A setter of torch's count of threads, which is put back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["mixture", "network"])
@pytest.mark.parametrize("name", NAMES)
def test_a_series_in_pieces_on_more_threads_is_the_series(mixture, threads, kind, name):
    """Bit for bit where the score is; a network's products round by the size of the batch."""
    if kind == "mixture":
        score, bound = mixture.score(sd.VP()), 0.0
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            score, bound = sd.ScoreModel(sd.nets.MLP((2,)), sd.VP(), sd.V()), 2e-5
    settings = {"solver": name, "steps": 4 if name in STEPPED else None, "seed": 4}
    whole = sd.sample(score, (6, 2), **settings).x
    pieces = []
    for start, count, workers in ((0, 4, 1), (4, 2, 2)):
        threads(workers)
        pieces.append(sd.sample(score, (count, 2), start_index=start, **settings).x)
    assert (torch.cat(pieces) - whole).abs().max() <= bound


@pytest.mark.parametrize("name", NAMES)
def test_the_score_is_only_asked_between_the_ends(sde, mixture, name):
    exact, times = mixture.score(sde), []

    def score(x, t):
        times.extend(t.flatten().tolist())
        return exact(x, t)

    solver = build(name)
    start, end = 0.7 * sde.t_max, 3 * sde.t_min_sampling
    steps = solver.default_steps and 15
    rule = config.build(solver.default_grid or "uniform", grids, "grid")
    at = rule(sde, steps or 1, start, end)
    for dtype in (torch.float32, torch.float64):
        times.clear()
        reverse = sde.reverse(score, eta=solver.eta)
        x = float(sde.sigma(start)) * state(shape=(4, 2)).to(dtype)
        out = solver.integrate(reverse, x, at, KeyedNoise(0))
        assert out.converged, out.message
        assert out.x.dtype == dtype
        assert end <= min(times)
        assert max(times) <= start
        assert len(times) == (reverse.nfe if out.nfe is None else out.nfe.sum())
        if steps and out.rounds is None:
            assert reverse.nfe == steps * solver.nfe_per_step


@pytest.mark.parametrize("name", STEPPED)
def test_items_of_any_shape(name):
    mixture = sd.GaussianMixture([1.0], torch.zeros(1, 2, 3, 4, 5), torch.tensor([0.5]))
    out = sd.sample(mixture.score(sd.VP()), (2, 2, 3, 4, 5), solver=name, steps=3)
    assert out.converged
    assert out.x.shape == (2, 2, 3, 4, 5)
    assert out.x.dtype == torch.float32


ONE_TIME = (
    solvers.Multistep, Singlestep, solvers.ExplicitRK, solvers.Parallel, solvers.TorchSDE,
)  # fmt: skip
OWN_TIMES = [n for n in STEPPED if not issubclass(CLASSES[n], ONE_TIME)]


@pytest.mark.parametrize("name", [n for n in STEPPED if issubclass(CLASSES[n], ONE_TIME)])
def test_a_time_for_each_sample_is_refused(mixture, name):
    times = torch.tensor([[0.9], [0.6]], dtype=torch.float64)
    reverse = sd.VP().reverse(mixture.score(sd.VP()), eta=0.0)
    with pytest.raises(ValueError, match="one time for the batch"):
        build(name).step(reverse, state(shape=(2, 2)), times, times / 2, KeyedNoise(0), None)


@pytest.mark.parametrize("name", OWN_TIMES)
def test_a_time_for_each_sample(mixture, name):
    """Steps take ``t`` of shape (B, 1), and then each sample goes its own way."""
    sde, solver = sd.VP(), build(name)
    reverse = sde.reverse(mixture.score(sde), eta=solver.eta)
    t = torch.tensor([[0.9], [0.6]], dtype=torch.float64)
    s = torch.tensor([[0.8], [0.3]], dtype=torch.float64)
    x = state(shape=(2, 2))
    both, _ = solver.step(reverse, x, t, s, KeyedNoise(0), None)
    for i in range(2):
        one, _ = solver.step(reverse, x[i : i + 1], t[i, 0], s[i, 0], KeyedNoise(0, i), None)
        torch.testing.assert_close(both[i : i + 1], one)


def test_the_callback_sees_every_step(mixture):
    seen = []
    sde = sd.VP()
    solver = solvers.DDIM()
    times = grid(solver, sde, 5)
    out = solver.integrate(
        solver.reverse(mixture.score(sde)), state(), times, None, lambda *a: seen.append(a)
    )
    assert [(i, t) for i, t, _ in seen] == list(enumerate(times[1:].tolist(), 1))
    assert seen[-1][2] is out.x
    assert out.t == float(times[-1])


def test_a_state_that_explodes_is_reported_where_it_does(mixture):
    exact, sde = mixture.score(sd.VP()), sd.VP()
    times = grids.Uniform()(sde, 10, 1.0, 0.1)

    def score(x, t):
        return exact(x, t) * (float("nan") if t <= 0.55 else 1.0)

    solver = solvers.EulerMaruyama()
    out = solver.integrate(sde.reverse(score), state().float(), times, KeyedNoise(0))
    assert not out.converged
    assert out.message == "non-finite values from step 6 of 10 on, at t=0.46, in float32"


def test_a_process_of_another_eta_is_refused(mixture):
    sde = sd.VP()
    for name in ("heun", "ode", "ode-scipy"):
        with pytest.raises(ValueError, match=r"steps a process with eta=0\.0, got one with eta=1"):
            build(name).integrate(sde.reverse(mixture.score(sde)), state(), torch.tensor([1, 0.5]))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "hoin"}, "unknown solver 'hoin'; did you mean 'heun'"),
        ({"name": "ddim", "eta": 1.5}, r"solver: DDIM needs eta in \[0, 1\], got 1.5"),
        ({"name": "ddim", "etta": 1.5}, "unknown key solver.etta of DDIM: .*did you mean 'eta'"),
        ({"name": "euler-maruyama", "eta": -1}, "EulerMaruyama needs eta >= 0, got -1"),
        ({"name": "ancestral", "variance": "smal"}, "unknown variance .*did you mean 'small'"),
        ({"name": "langevin", "snr": 0}, "Langevin needs snr > 0, got 0"),
        ({"name": "langevin", "steps": 0}, "Langevin needs steps >= 1, got 0"),
        ({"name": "pc", "predictor": "ode"}, "'ode' cannot be the predictor of PC"),
        ({"name": "pc", "corrector": "heun"}, "'heun' cannot be the corrector .*langevin"),
        ({"name": "pc", "corrector": "none"}, "unknown corrector 'none'"),
        ({"name": "ode", "method": "rk45"}, "unknown method of ODE 'rk45'.*dopri5"),
        ({"name": "ode", "rtol": 0}, "ODE needs rtol > 0 and atol > 0, got rtol=0"),
        ({"name": "ode-scipy", "max_nfe": 0}, "ODEScipy needs max_nfe >= 1, got 0"),
        ({"name": "torchsde", "method": "rk"}, "unknown method of TorchSDE 'rk'"),
        ({"name": "adaptive-sde", "e_abs": 0}, "AdaptiveSDE needs e_abs > 0 and e_rel >= 0, got"),
        ({"name": "adaptive-sde", "theta": 1.5}, r"theta and exponent in \(0, 1\], got theta=1.5"),
        ({"name": "adaptive-sde", "max_nfe": 1}, "AdaptiveSDE needs max_nfe >= 2, got 1"),
    ],
)
def test_a_wrong_field_is_named(section, message):
    with pytest.raises(sd.ConfigError, match=message):
        config.build(section, solvers, "solver")
