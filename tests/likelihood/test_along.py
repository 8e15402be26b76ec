"""Log-densities that a solver carries along with its samples."""

import math

import pytest
import torch
from torch import nn

import scoresde as sd
from scoresde import solvers
from scoresde.likelihood.along import Along
from scoresde.noise import KeyedNoise

f64 = torch.float64
EVERY = [
    (solvers.EulerMaruyama(eta=0.0), 250),
    (solvers.DDIM(), 60),
    (solvers.Heun(), 60),
    (solvers.DPM2S(), 60),
    (solvers.DPM3S(), 40),
    (solvers.DPMpp2S(), 60),
    (solvers.DPMpp2M(), 60),
    (solvers.DPMpp3M(), 200),
    (solvers.UniPC(points=2), 200),
    (solvers.LMS(points=2), 60),
    (solvers.VAB(points=2), 60),
    (solvers.DEIS(points=3, coordinate="kappa"), 200),
    (solvers.PNDM(), 60),
]
PROCESSES = [sd.VP(), sd.VE(), sd.EDM(), sd.Linear()]
ignore_few = pytest.mark.filterwarnings("ignore:.*noisy samples")


def start(sde, n=4):
    return sde.prior_sample((n, 2), KeyedNoise(3), dtype=f64)


def error(mixture, sde, out, x_T):
    """Error of the change of the log-density, in nats: the prior is not quite the marginal."""
    found = out.log_prob - sde.prior_log_prob(x_T) + mixture.log_prob(x_T, sde, sde.t_max)
    return (found - mixture.log_prob(out.x, sde, out.t_end)).abs()


@ignore_few
@pytest.mark.parametrize("sde", PROCESSES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(("solver", "steps"), EVERY, ids=repr)
def test_the_density_converges_at_the_order_of_the_solver(sde, solver, steps):
    """In one dimension, where a probe of -1 or 1 gives the divergence exactly."""
    means = torch.tensor([[-0.9], [0.8]], dtype=f64)
    mixture = sd.GaussianMixture([0.4, 0.6], means, [0.3, 0.4])
    score, x_T, sizes = mixture.score(sde), start(sde, 8)[:, :1], []
    for count in (steps, 2 * steps):
        out = sd.sample(score, x_T=x_T, solver=solver, steps=count, grid="logsnr", log_prob=True)
        assert out.nfe == count * solver.nfe_per_step
        assert not out.denoised
        sizes.append(float(error(mixture, sde, out, x_T).square().mean().sqrt()))
    assert math.log2(sizes[0] / sizes[1]) == pytest.approx(solver.order, abs=0.2)
    assert sizes[1] < 0.2


@pytest.mark.parametrize("solver", ["runge-kutta", "ode", "ode-scipy"])
def test_adaptive_solvers_agree_with_the_likelihood_of_their_samples(sde, mixture, solver):
    score, x_T = mixture.score(sde), start(sde, 12)
    out = sd.sample(score, x_T=x_T, solver=solver, log_prob=True, divergence="exact")
    found = sd.log_prob(score, out.x, divergence="exact", t_min=out.t_end)
    assert ((out.log_prob - found.log_prob).abs() / 2).mean() < 1e-4
    assert (error(mixture, sde, out, x_T) / 2).mean() < 1e-4
    assert (out.log_prob_stderr == 0).all()
    assert (out.divergence, out.probes) == ("exact", 0)


@pytest.mark.parametrize("sde", PROCESSES, ids=lambda s: type(s).__name__)
def test_a_tight_tolerance_gives_many_digits(sde, mixture):
    tight = {"name": "runge-kutta", "method": "dop853", "rtol": 1e-8, "atol": 1e-8,
             "max_nfe": 9999}  # fmt: skip
    x_T = start(sde)
    out = sd.sample(mixture.score(sde), x_T=x_T, solver=tight, log_prob=True, divergence="exact")
    assert error(mixture, sde, out, x_T).max() < 1e-5


def test_the_controller_watches_the_density(mixture):
    """One density among many entries does not hide in their mean, and its unit is nats."""
    x = torch.zeros(2, 1000, dtype=f64)
    along = Along(mixture.score(sd.VP()), x, probes=2)
    wrong = torch.zeros(2, 1002, dtype=f64)
    wrong[1, -1] = 3.0
    assert along.error_norm(wrong).tolist() == [0.0, 3.0]
    half = torch.full((2,), 0.5, dtype=f64)
    assert along.error_norm(wrong, half).tolist() == [0.0, 6.0]
    wrong[:, :1000] = 7.0
    assert along.error_norm(wrong, half).tolist() == [7.0, 7.0]
    reverse = sd.VP().reverse(along, eta=0.0)
    assert torch.equal(reverse.error_norm(wrong, half), along.error_norm(wrong, half))
    plain = sd.VP().reverse(lambda x, t: x, eta=0.0)
    torch.testing.assert_close(plain.error_norm(wrong), wrong.square().mean(1).sqrt())


def test_probes_are_those_of_the_likelihood(mixture):
    sde = sd.VP()
    score = mixture.score(sde)
    tight = {"name": "runge-kutta", "rtol": 1e-8, "atol": 1e-8, "max_nfe": 9999}
    out = sd.sample(score, (5, 2), solver=tight, log_prob=True, probes=3, seed=7, start_index=2)
    same = sd.log_prob(score, out.x, probes=3, seed=7, start_index=2, t_min=out.t_end, rtol=1e-8,
                       atol=1e-8)  # fmt: skip
    torch.testing.assert_close(out.log_prob, same.log_prob, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.log_prob_stderr, same.stderr, rtol=0, atol=1e-5)
    assert same.stderr.max() > 0.1
    other = sd.log_prob(score, out.x, probes=3, seed=8, start_index=2, t_min=out.t_end)
    assert (out.log_prob - other.log_prob).abs().max() > 0.01
    one = sd.sample(score, (5, 2), solver="heun", log_prob=True)
    assert one.log_prob_stderr.isnan().all()
    assert (one.divergence, one.probes) == ("hutchinson", 1)


@ignore_few
@pytest.mark.parametrize("sde", PROCESSES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("solver", ["heun", "unipc", "runge-kutta"])
def test_a_density_does_not_depend_on_its_batch(sde, mixture, solver):
    score = mixture.score(sde)
    settings = {"solver": solver, "log_prob": True, "probes": 2, "seed": 1, "dtype": f64}
    whole = sd.sample(score, (6, 2), **settings)
    parts = [sd.sample(score, (n, 2), start_index=i, **settings) for i, n in ((0, 1), (1, 5))]
    joined = sd.sampling.join(parts)
    for name in ("x", "log_prob", "log_prob_stderr"):
        expected, found = getattr(whole, name), getattr(joined, name)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_any_shape_and_auto(mixture):
    means = torch.zeros(2, 1, 2, 3, dtype=f64)
    means[1] = 1.0
    cube = sd.GaussianMixture([1.0, 2.0], means, [0.5, 0.3])
    x_T = KeyedNoise(0).normal((4, 1, 2, 3), dtype=f64)
    for solver in ("heun", "runge-kutta"):
        out = sd.sample(cube.score(sd.VP()), x_T=x_T, solver=solver, log_prob=True,
                        divergence="auto", steps=200 if solver == "heun" else None)  # fmt: skip
        assert out.x.shape == x_T.shape
        assert out.divergence == "exact"
        assert error(cube, sd.VP(), out, x_T).max() < 0.02
    wide = sd.GaussianMixture([1.0], torch.zeros(1, 40, dtype=f64), [0.5])
    out = sd.sample(wide.score(sd.VP()), (2, 40), log_prob=True, divergence="auto")
    assert out.divergence == "hutchinson"


class Net(nn.Module):
    """A small conditional network that counts what it is asked."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(3, 8), nn.Linear(8, 3)
        self.drop, self.forwards, self.backwards = nn.Dropout(0.5), 0, 0
        self.register_full_backward_hook(self._count)

    def _count(self, *_):
        self.backwards += 1

    def forward(self, x, c_noise, y=None):
        self.forwards += 1
        assert not self.training
        return self.outer(self.drop(torch.tanh(self.inner(x) + c_noise[:, None] + y[:, None])))


def test_a_network_costs_what_is_said_and_keeps_its_conditions():
    model = sd.ScoreModel(Net(), sd.VP(), sd.Eps(), shape=(3,), weights="ema").train()
    y = torch.tensor([0.0, 1.0, 2.0, 3.0])
    seen = []
    with torch.inference_mode():
        out = sd.sample(model, (4, 3), solver="heun", steps=7, log_prob=True, probes=2, y=y,
                        callback=lambda i, t, x: seen.append(x.shape))  # fmt: skip
    asked = 2  # whether the network uses y
    assert (out.nfe, model.net.forwards, model.net.backwards) == (14, 14 + asked, 28)
    assert set(seen) == {(4, 3)}
    assert model.training
    assert not out.log_prob.requires_grad
    plain = sd.sample(model, (4, 3), solver="heun", steps=7, denoise=False, y=y)
    torch.testing.assert_close(out.x, plain.x)
    fine = sd.sample(model, (4, 3), log_prob=True, solver="runge-kutta", y=y)
    same = sd.log_prob(model, fine.x, t_min=fine.t_end, y=y)
    assert ((fine.log_prob - same.log_prob).abs() / 3).max() < 2e-3


def test_where_the_solver_did_not_arrive_there_is_no_density(mixture):
    score = mixture.score(sd.VP())
    free = sd.sample(score, (5, 2), solver="runge-kutta", log_prob=True)
    limit = int(free.nfe.float().median())
    solver = {"name": "runge-kutta", "max_nfe": limit}
    out = sd.sample(score, (5, 2), solver=solver, log_prob=True)
    assert torch.equal(out.log_prob.isnan(), free.nfe > limit)
    assert not out.converged
    out = sd.sample(score, (5, 2), solver={"name": "ode", "max_nfe": 30}, log_prob=True)
    assert out.log_prob.isnan().all()
    assert out.log_prob_stderr.isnan().all()


class Severed:
    sde = sd.VP()

    def __call__(self, x, t):
        return -x.detach()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "ancestral"}, "deterministic solver, and 'ancestral' draws noise: take heun"),
        ({"solver": {"name": "edm", "churn": 10.0}}, "'edm' draws noise"),
        ({"denoise": True}, "density of the state at t_end: leave out denoise"),
        ({"threshold": "static"}, "density of the ODE itself: leave out threshold"),
        ({"x_T": torch.zeros(2, 2), "t_start": 0.5}, "needs t_start=1, where the prior is known"),
        ({"divergence": "hutch"}, "unknown divergence 'hutch'; did you mean 'hutchinson'"),
        ({"probes": 0}, "at least 1"),
    ],
)
def test_refusals(mixture, settings, message):
    with pytest.raises(ValueError, match=message):
        sd.sample(mixture.score(sd.VP()), (2, 2), log_prob=True, **settings)


def test_a_score_without_a_derivative_is_refused():
    with pytest.raises(ValueError, match="not differentiable in x"):
        sd.sample(Severed(), (2, 2), log_prob=True)
