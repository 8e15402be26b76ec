"""DDRM: its three cases against their laws, and where they are other methods'."""

import itertools
import json
import math

import pytest
import torch
from keeping import LAWS, POINT, VALUES, close_to, levels, nothing, point, turned

import scoresde as sd
from scoresde.inverse import operators as room
from scoresde.inverse.ddrm import DDRM
from scoresde.noise import KeyedNoise
from scoresde.solvers import DDIM

D = torch.float64
MASK = room.Mask(torch.tensor([True, False]))


@pytest.mark.parametrize("name", list(LAWS))
@pytest.mark.parametrize("noise_std", [0.0, 0.6])
@pytest.mark.parametrize(("eta", "eta_b"), [(0.85, 1.0), (0.3, 0.6), (1.0, 0.0)])
def test_each_case_has_its_law_where_the_data_are_known(name, noise_std, eta, eta_b):
    sde, (operator, v) = LAWS[name](), turned()
    y = operator(POINT) + noise_std * torch.tensor([[0.8, -1.1, 0.5, 0.0]], dtype=D)
    m, x0 = (operator.pinv(y) @ v)[0], (POINT @ v)[0]
    tau = torch.where(VALUES > 0, noise_std / VALUES, math.inf)
    kinds = set()

    def check(step, t, x):
        alpha, sigma = levels(sde, t)
        q = sigma / alpha
        above = q >= tau
        toward = (1 - eta**2) ** 0.5 * q / tau * (m - x0)
        mean = torch.where(above, (1 - eta_b) * x0 + eta_b * m, x0 + toward)
        std = torch.where(above, (q**2 - (eta_b * tau) ** 2).clamp_min(0).sqrt(), eta * q)
        mean, std = torch.where(tau.isinf(), x0, mean), torch.where(tau.isinf(), q, std)
        close_to(x @ v, alpha * mean, alpha * std)
        kinds.add(int(above.sum()))

    solver = DDRM(operator, y, noise_std, eta, eta_b)
    sd.sample(point(sde), (5000, 4), solver=solver, steps=7, seed=1, callback=check, dtype=D)
    assert kinds >= ({0, 3} if noise_std else {3})


@pytest.mark.parametrize("noise_std", [0.0, 0.3])
def test_moments_of_gaussian_data_follow_the_recursion_of_its_steps(noise_std):
    """Each coefficient is Gaussian, and a step is affine in it: mean and variance by hand."""
    sde, (operator, v) = sd.VP(), turned()
    mu, power, eta, eta_b = (POINT @ v)[0], 0.8**2, 0.85, 0.9
    score = sd.GaussianMixture([1.0], POINT, [0.8]).score(sde)
    y = torch.tensor([[1.5, -0.3, 0.6, 0.2]], dtype=D)
    m = (operator.pinv(y) @ v)[0]
    tau = torch.where(VALUES > 0, noise_std / VALUES, math.inf)
    out = sd.sample(
        score, (20000, 4), solver=DDRM(operator, y, noise_std, eta, eta_b), steps=12, seed=0,
        dtype=D,
    )  # fmt: skip
    times = sd.grids.LogSNR()(sde, 12, 1.0, sde.t_min_sampling).tolist()
    q = [sigma / alpha for alpha, sigma in (levels(sde, t) for t in times)]
    for i in range(4):
        mean = float(m[i]) if q[0] >= tau[i] else 0.0
        var = q[0] ** 2 - float(tau[i]) ** 2 if q[0] >= tau[i] else q[0] ** 2
        for above, below in itertools.pairwise(q):
            gain = power / (power + above**2)  # of E[u_0 | u]
            rest, keep = (1 - gain) * float(mu[i]), (1 - eta**2) ** 0.5 * below
            if tau[i].isinf():
                slope, offset, extra = gain + keep / above * (1 - gain), 0.0, eta * below
                offset = rest - keep / above * rest
            elif below < tau[i]:
                slope = gain * (1 - keep / float(tau[i]))
                offset = rest * (1 - keep / float(tau[i])) + keep / float(tau[i]) * float(m[i])
                extra = eta * below
            else:
                slope, offset = (1 - eta_b) * gain, (1 - eta_b) * rest + eta_b * float(m[i])
                extra = (below**2 - (eta_b * float(tau[i])) ** 2) ** 0.5
            mean, var = slope * mean + offset, slope**2 * var + extra**2
        gain = power / (power + q[-1] ** 2)
        c = (out.x @ v)[:, i : i + 1]
        if q[-1] < tau[i]:
            want, std = gain * mean + (1 - gain) * float(mu[i]), gain * var**0.5
            close_to(c, torch.tensor([want]), torch.tensor([std]))
        else:
            assert noise_std == 0
            torch.testing.assert_close(c, m[i].expand(20000, 1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.4, 0.85])
def test_where_nothing_is_measured_it_is_ddim(eta, mixture):
    """DDIM's noise is ``eta' v sigma_s/sigma_t``, which is ``eta q`` for a constant ratio of q."""
    sde, steps = sd.VP(), 10
    score = mixture.score(sde)
    times = sd.grids.LogSNR()(sde, steps, 1.0, sde.t_min_sampling)
    ratio = math.exp(2 * float(sde.log_snr(times[0]) - sde.log_snr(times[1])))
    solver = DDRM(nothing(), torch.zeros(1, 1, dtype=D), 0.0, eta)
    ours = sd.sample(score, (5, 2), solver=solver, steps=steps, dtype=D, denoise=False, seed=3)
    noise = KeyedNoise(3)
    x = sde.prior_sample((5, 2), noise, dtype=D)
    noise.draw += 1  # that of what is known at the start
    ddim = DDIM(eta / (1 - ratio) ** 0.5)
    theirs = sde.reverse(score, ddim.eta)
    want = ddim.integrate(theirs, x, times, noise).x
    torch.testing.assert_close(ours.x, want, rtol=1e-9, atol=1e-12)
    assert ours.nfe == steps


def test_the_end_is_y_where_known(sde, mixture):
    y = torch.tensor([[0.3, 0.0]], dtype=D)
    out = sd.sample(mixture.score(sde), (3, 2), solver=DDRM(MASK, y), dtype=D)
    assert torch.equal(out.x[:, 0], y[0, 0].expand(3))
    assert out.converged
    assert out.nfe == 21


def test_a_sample_alone_is_that_of_the_batch(mixture):
    score = mixture.score(sd.VP())
    y = torch.tensor([[0.3, 0.0], [-0.8, 0.0], [1.0, 0.0]], dtype=D)
    both = sd.sample(score, (3, 2), solver=DDRM(MASK, y, 0.2), dtype=D).x
    for i in range(3):
        alone = sd.sample(
            score, (1, 2), solver=DDRM(MASK, y[i : i + 1], 0.2), dtype=D, start_index=i
        )
        torch.testing.assert_close(alone.x[0], both[i], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(both[0], both[1], atol=0.1)


def test_what_is_said_of_the_solver_is_plain(mixture):
    solver = DDRM(MASK, torch.zeros(1, 2), 0.1)
    out = sd.sample(mixture.score(sd.VP()), (2, 2), solver=solver, steps=3)
    assert json.loads(json.dumps(out.solver)) == {
        "name": "ddrm", "operator": "mask", "noise_std": 0.1, "eta": 0.85, "eta_b": 1.0,
    }  # fmt: skip


def test_what_does_not_fit_is_refused_in_one_line():
    blind = room.Custom(lambda x: x, (2,))
    y = torch.zeros(1, 2)
    for wrong, said in (
        (lambda: DDRM(blind, y), "DDRM needs an operator with a spectrum, which Custom has not"),
        (lambda: DDRM(MASK, y, eta=1.1), "eta and eta_b"),
        (lambda: DDRM(MASK, y, eta_b=-0.1), "eta and eta_b"),
        (lambda: DDRM(MASK, y, math.inf), "noise_std"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            wrong()
        assert "\n" not in str(caught.value)
