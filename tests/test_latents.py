"""Latents: the flow forwards and back, and the way between two of them."""

import math
import warnings

import pytest
import torch

import scoresde as sd
from scoresde import solvers
from scoresde.latents import rms

f64 = torch.float64
TIGHT = {"name": "runge-kutta", "method": "dop853", "rtol": 1e-8, "atol": 1e-8, "max_nfe": 5000}
ODE = [
    solvers.EulerMaruyama(eta=0.0),
    solvers.DDIM(),
    solvers.Heun(),
    solvers.EDM(),
    solvers.DPM2S(),
    solvers.DPM3S(),
    solvers.DPMpp2S(),
    solvers.DPMpp2M(),
    solvers.DPMpp3M(),
    solvers.UniPC(points=2),
    solvers.LMS(points=3),
    solvers.VAB(),
    solvers.DEIS(points=3, coordinate="kappa"),
    solvers.PNDM(),
]


def data(mixture, sde, n=6, t=None):
    """Items with the noise of the time at which the flow starts."""
    generator = torch.Generator().manual_seed(1)
    x0 = mixture.sample(n, generator)
    noise = torch.randn(x0.shape, generator=generator, dtype=f64)
    return sde.perturb(x0, sde.t_min_likelihood if t is None else t, noise)


def gaussian_flow(sde, std, mean, x, low, high):
    a0, s0, a1, s1 = (float(v) for t in (low, high) for v in (sde.alpha(t), sde.sigma(t)))
    ratio = math.sqrt((a1**2 * std**2 + s1**2) / (a0**2 * std**2 + s0**2))
    return mean * a1 + ratio * (x - mean * a0)


def test_the_latent_is_that_of_the_likelihood(sde, mixture):
    score = mixture.score(sde)
    x = data(mixture, sde)
    out = sd.encode(score, x)
    assert out.converged.all()
    assert out.z.dtype == f64
    assert (out.t_min, out.t_max) == (sde.t_min_likelihood, sde.t_max)
    found = sd.log_prob(score, x, rtol=1e-7, atol=1e-7).latent
    assert (out.z - found).abs().max() / sde.prior_std < 3e-4
    tight = sd.encode(score, x, solver=TIGHT)
    assert (tight.z - found).abs().max() / sde.prior_std < 1e-5
    assert (tight.nfe > out.nfe).all()


def test_gaussian_data_follow_the_closed_form(sde):
    mixture = sd.GaussianMixture([1.0], torch.full((1, 3, 2), 0.5, dtype=f64), [0.6])
    x = data(mixture, sde, t=0.1)
    out = sd.encode(mixture.score(sde), x, solver=TIGHT, t_min=0.1, t_max=0.8)
    expected = gaussian_flow(sde, 0.6, 0.5, x, 0.1, 0.8)
    torch.testing.assert_close(out.z, expected, rtol=1e-6, atol=1e-6 * sde.prior_std)


@pytest.fixture(scope="module")
def truths():
    return {}


@pytest.mark.parametrize("solver", ODE, ids=repr)
def test_fixed_steps_go_up_the_grid_at_their_order(mixture, solver, truths):
    for sde in (sd.VP(),) if solver.nfe_per_step > 1 else (sd.VP(), sd.EDM()):
        score, low = mixture.score(sde), sde.t_min_sampling
        x = data(mixture, sde, t=low)
        if sde not in truths:
            truths[sde] = sd.encode(
                score, x, solver={**TIGHT, "rtol": 1e-10, "atol": 1e-10}, t_min=low
            ).z
        errors = []
        for steps in (200, 400):
            out = sd.encode(score, x, solver=solver, steps=steps, grid="logsnr", t_min=low)
            errors.append(float((out.z - truths[sde]).square().mean().sqrt()) / sde.prior_std)
            assert (out.nfe == steps * solver.nfe_per_step).all()
            assert out.steps == steps
        assert math.log2(errors[0] / errors[1]) == pytest.approx(solver.order, abs=0.15)


@pytest.mark.parametrize("sde", [sd.VP(), sd.VE(), sd.DDPM()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("solver", ["ode", "ode-scipy", "runge-kutta"])
def test_adaptive_solvers_go_both_ways(sde, mixture, solver):
    score, x = mixture.score(sde), data(mixture, sde, 3)
    out = sd.encode(score, x, solver=solver)
    truth = sd.encode(score, x, solver=TIGHT).z
    assert (out.z - truth).abs().max() / sde.prior_std < 2e-3
    back = sd.decode(score, out)
    assert back.solver == out.solver
    assert (back.t_start, back.t_end) == (out.t_max, out.t_min)
    assert not back.denoised
    assert rms(back.x - x).max() < 2e-3


@pytest.mark.parametrize("sde", [sd.VP(), sd.VE(), sd.Linear()], ids=lambda s: type(s).__name__)
def test_what_is_encoded_is_decoded(sde, mixture):
    score, x = mixture.score(sde), data(mixture, sde)
    out = sd.encode(score, x)
    back = sd.decode(score, out)
    assert rms(back.x - x).max() < 1e-3
    tight = sd.decode(score, sd.encode(score, x, solver=TIGHT))
    assert rms(tight.x - x).max() < 1e-6
    plain = sd.decode(score, out.z)
    assert torch.equal(plain.x, back.x)
    fixed = sd.encode(score, x, solver="dpmpp-3m", steps=150, grid="karras")
    again = sd.decode(score, fixed)
    assert (again.steps, again.grid["name"]) == (150, "karras")


def test_a_latent_does_not_depend_on_its_batch(mixture):
    sde = sd.VP()
    score, x = mixture.score(sde), data(mixture, sde)
    whole = sd.encode(score, x)
    for i in (0, 4):
        alone = sd.encode(score, x[i : i + 1])
        torch.testing.assert_close(alone.z, whole.z[i : i + 1], rtol=1e-9, atol=1e-9)
        assert alone.nfe == whole.nfe[i]
    pair = sd.interpolate(score, x[:3], x[3:], 3)
    single = sd.interpolate(score, x[1:2], x[4:5], 3)
    torch.testing.assert_close(pair.x[1:2], single.x, rtol=1e-8, atol=1e-8)


def test_a_failure_names_its_item_in_the_series(mixture):
    score, x = mixture.score(sd.VP()), data(mixture, sd.VP(), 2)
    solver = {"name": "runge-kutta", "max_nfe": 20}
    part = sd.encode(score, x, solver=solver, start_index=6)
    assert part.message.startswith("sample 6 stopped")
    assert sd.decode(score, part.z, solver=solver, start_index=6).message.startswith("sample 6")


def test_a_spent_budget_is_said_for_each_sample(mixture):
    sde = sd.VP()
    out = sd.encode(mixture.score(sde), data(mixture, sde), solver={"name": "ode", "max_nfe": 20})
    assert not out.converged.any()
    assert "stopped after 20 evaluations" in out.message
    x = data(mixture, sde)
    nfe = sd.encode(mixture.score(sde), x).nfe
    limit = int(nfe.float().median())
    out = sd.encode(mixture.score(sde), x, solver={"name": "runge-kutta", "max_nfe": limit})
    assert torch.equal(out.converged, nfe <= limit)
    assert "the evaluations allowed are used up" in out.message


def test_conditions_and_modes_reach_the_network():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.seen = torch.nn.Parameter(torch.tensor(0.3)), set()

        def forward(self, x, c_noise, y=None):
            self.seen.add(self.training)
            return x * self.scale + y[:, None].to(x)

    net = Net()
    model = sd.ScoreModel(net, sd.VP(), sd.Eps(), shape=(2,), weights="ema").train()
    x, y = torch.zeros(3, 2), torch.tensor([0.0, 0.5, 1.0])
    out = sd.encode(model, x, y=y, solver="heun", steps=10)
    assert net.seen == {False}
    assert model.training
    assert out.weights == "ema"
    assert (out.z[:, 0].diff() > 0).all()
    way = sd.interpolate(model, x, x, 4, y=y, solver="heun", steps=40)
    assert way.x.shape == (3, 4, 2)
    assert way.round_trip.shape == (3, 2)
    assert way.samples.x.shape == (12, 2)
    assert (way.round_trip < 0.3).all()


def test_the_ends_of_a_way_are_its_items(mixture):
    sde = sd.VP()
    score, x = mixture.score(sde), data(mixture, sde)
    way = sd.interpolate(score, x[:3], x[3:], 5, t_max=0.9)
    assert (way.start.t_max, way.samples.t_start) == (0.9, 0.9)
    torch.testing.assert_close(way.round_trip[:, 0], rms(way.x[:, 0] - x[:3]))
    torch.testing.assert_close(way.round_trip[:, 1], rms(way.x[:, -1] - x[3:]))
    assert way.round_trip.max() < 1e-3
    z = sd.encode(score, way.x[:, 2], t_max=0.9).z
    expected = sd.slerp(way.start.z, way.end.z, 0.5)
    assert (z - expected).abs().max() < 5e-3


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, x: sd.encode(s, x, solver="ancestral"), "'ancestral' draws noise: take runge"),
        (lambda s, x: sd.decode(s, x, solver="pc"), "need a deterministic solver, and 'pc'"),
        (lambda s, x: sd.encode(s, x.long()), "torch.int64: take integer data"),
        (lambda s, x: sd.encode(s, x / 0), "finite floating-point data"),
        (lambda s, x: sd.encode(s, x, t_min=1e-7), r"trained times \[1e-05, 1\], got t_min=1e-07"),
        (lambda s, x: sd.encode(s, x, t_max=1.5), "t_max=1.5"),
        (lambda s, x: sd.encode(s, x, steps=5), "chooses its own steps"),
        (lambda s, x: sd.encode(s, x, solver="hoin"), "did you mean 'heun'"),
        (lambda s, x: sd.interpolate(s, x, x, 1), "count >= 2, both ends included, got 1"),
        (lambda s, x: sd.interpolate(s, x, x[:1]), "items of one shape"),
    ],
)
def test_what_does_not_fit_is_said(mixture, call, message):
    with pytest.raises(ValueError, match=message):
        call(mixture.score(sd.VP()), torch.ones(4, 2, dtype=f64))


def test_few_steps_on_ve_are_warned_of(mixture):
    score, x = mixture.score(sd.VE()), torch.ones(2, 2, dtype=f64)
    with pytest.warns(UserWarning, match="trained VE models"):
        sd.encode(score, x, solver="ddim", steps=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd.encode(score, x)
