"""The torchsde adapter: its steps, its noise, and how often it repeats."""

import pytest
import torch
from torchsde import BaseBrownian

import scoresde as sd
from scoresde import grids, solvers
from scoresde.bench.convergence import GaussianData, end_on_path, order, strong_error
from scoresde.brownian import BrownianPath
from scoresde.noise import KeyedNoise
from scoresde.solvers.sde_torch import _METHODS, _Increasing, _motion


def setting(n, steps=20):
    sde = sd.VP()
    mean = torch.tensor([[0.5, -0.3]], dtype=torch.float64)
    score = sd.GaussianMixture([1.0], mean, torch.tensor([[0.4, 0.8]])).score(sde)
    times = grids.LogSNR()(sde, steps, 1.0, 1e-3)
    return score, KeyedNoise(9).normal((n, 2), dtype=torch.float64), times


def test_euler_is_euler_maruyama_on_the_same_path():
    score, x, times = setting(5, 20)
    for sde in (sd.VP(), sd.VE()):
        reverse = sde.reverse(score.mixture.score(sde))
        found = solvers.TorchSDE().integrate(reverse, x, times, KeyedNoise(1)).x
        expected = solvers.EulerMaruyama().integrate(reverse, x, times, BrownianPath(1)).x
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", list(_METHODS))
def test_cost(method):
    score, x, times = setting(5, 20)
    solver = solvers.TorchSDE(method)
    reverse = solver.reverse(score)
    assert solver.integrate(reverse, x, times, KeyedNoise(1)).converged
    assert reverse.nfe == 20 * solver.nfe_per_step + (method == "reversible_heun")


@pytest.mark.parametrize("method", list(_METHODS))
def test_a_sample_does_not_depend_on_its_batch(method):
    score, x, times = setting(5, 20)
    solver = solvers.TorchSDE(method)
    reverse = solver.reverse(score)
    batch = solver.integrate(reverse, x, times, KeyedNoise(4)).x
    alone = solver.integrate(reverse, x[3:4], times, KeyedNoise(4, 3)).x
    torch.testing.assert_close(batch[3:4], alone, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", list(_METHODS))
def test_weak_order_and_moments(method):
    """Of mean and covariance, without Monte Carlo."""
    mean, covariance = torch.tensor([0.5, -0.3]), torch.diag(torch.tensor([0.16, 0.64]))
    data, sde, solver = GaussianData(mean, covariance), sd.VP(), solvers.TorchSDE(method)
    coarse, fine = (
        data.weak_error(solver, sde, grids.LogSNR()(sde, steps, 1.0, 1e-3)) for steps in (60, 120)
    )
    gain = method in ("midpoint", "reversible_heun")  # the drift of Gaussian data is linear
    assert order(coarse, fine) == pytest.approx(solver.order + gain, abs=0.15)
    assert fine < 0.05


@pytest.mark.parametrize("method", list(_METHODS))
def test_more_steps_approach_the_end_of_the_other_solvers(method, reference):
    """Strong order one on the path that the solvers of the package follow."""
    score, x, _ = setting(64)
    sde = score.sde
    coarse, fine = (
        strong_error(
            solvers.TorchSDE(method), score, x, grids.LogSNR()(sde, steps, 1.0, 1e-3), reference, 2
        )
        for steps in (30, 90)
    )
    assert order(coarse.rms, fine.rms, 3) == pytest.approx(1.0, abs=0.2)


@pytest.fixture(scope="module")
def reference():
    """Where those end."""
    score, x, times = setting(64, 450)
    return end_on_path(solvers.SDEDPMpp2M(), score, x, times, seed=2)


class Recorded(BrownianPath):
    """A path that keeps what it was asked for."""

    def __init__(self, seed):
        super().__init__(seed)
        self.given = []

    def increment(self, *args, **kwargs):
        self.given.append(super().increment(*args, **kwargs))
        return self.given[-1]

    def normal(self, *args, **kwargs):
        self.given.append(super().normal(*args, **kwargs))
        return self.given[-1]


def test_the_motion_has_the_law_of_space_time_area():
    """``W`` of variance h, and ``U = int W`` of h^3/3 with the covariance h^2/2."""
    sde, path, n = sd.VP(), Recorded(0), 20_000
    y = torch.zeros(n, 1, dtype=torch.float64)
    t, s = torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    motion = _motion(sde.reverse(None), y, t, s, path)
    w, u = motion(-t, -s, return_U=True)
    assert torch.equal(w, motion(-t, -s))
    assert torch.equal(w, 0.4**0.5 * path.given[0])
    found = torch.cov(torch.cat([w, u], 1).T)
    h = 0.4
    expected = torch.tensor([[h, h**2 / 2], [h**2 / 2, h**3 / 3]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)


def test_reversible_heun_carries_its_state():
    """One long integration by torchsde, on its own, is the same as step by step here."""
    from torchsde import sdeint

    score, x, times = setting(4, 12)
    times = torch.linspace(1.0, 0.4, 13, dtype=torch.float64)
    reverse, path = score.sde.reverse(score), Recorded(3)
    found = solvers.TorchSDE("reversible_heun").integrate(reverse, x, times, path).x
    jumps = iter(path.given)

    class Replayed(BaseBrownian):
        dtype, device, shape = x.dtype, x.device, x.shape
        levy_area_approximation = "none"

        def __call__(self, ta, tb=None, return_U=False, return_A=False):
            return (tb - ta).sqrt() * next(jumps)

        def __repr__(self):
            return "Replayed"

    system = _Increasing(reverse, x.shape, "stratonovich")
    step = float(times[0] - times[1])
    whole = sdeint(system, x, -times, bm=Replayed(), method="reversible_heun", dt=step)[-1]
    torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-9)


def test_a_time_for_each_sample_is_refused():
    score, x, _ = setting(2, 2)
    t = torch.tensor([[0.9], [0.6]], dtype=torch.float64)
    with pytest.raises(ValueError, match="torchsde takes one time for the batch"):
        solvers.TorchSDE().step(score.sde.reverse(score), x, t, t / 2, KeyedNoise(0))


def test_noise_repeats_with_seed_and_start():
    score, x, times = setting(5, 20)
    solver = solvers.TorchSDE()

    def run(*key):
        return solver.integrate(solver.reverse(score), x, times, KeyedNoise(*key)).x

    assert torch.equal(run(1), run(1))
    assert not torch.isclose(run(1), run(2)).any()
    assert not torch.isclose(run(1), run(1, 5)).any()  # the next batch of a series
    seeded = [torch.Generator().manual_seed(3) for _ in range(2)]
    a, b = (solver.integrate(solver.reverse(score), x, times, g).x for g in seeded)
    assert torch.equal(a, b)
