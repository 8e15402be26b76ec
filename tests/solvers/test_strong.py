"""Strong errors on one Brownian path a sample, on a mixture with its exact score."""

import pytest
import torch

import scoresde as sd
from scoresde import grids, solvers
from scoresde.bench.convergence import end_on_path, order, strong_error
from scoresde.brownian import BrownianPath

SOLVERS = [
    solvers.EulerMaruyama(),
    solvers.ReverseDiffusion(),
    solvers.Ancestral(),
    solvers.DDIM(eta=1.0),
    solvers.SDEDPMpp2M(points=1),
    solvers.SDEDPMpp2M(),
]
SDES = {"vp": sd.VP(), "ve": sd.VE()}
PATHS = 128


def setting(name):
    means = torch.tensor([[0.4, 0.3], [-0.4, 0.1], [0.0, -0.4]], dtype=torch.float64)
    score = sd.GaussianMixture([1.0, 1.0, 1.0], means, [0.5, 0.6, 0.7]).score(SDES[name])
    x = SDES[name].prior_sample((PATHS, 2), BrownianPath(0), dtype=torch.float64)
    return score, x


def grid(sde, steps):
    return grids.LogSNR()(sde, steps, sde.t_max, sde.t_min_sampling)


@pytest.fixture(scope="module", params=list(SDES))
def problem(request):
    score, x = setting(request.param)
    reference = end_on_path(solvers.SDEDPMpp2M(), score, x, grid(score.sde, 960))
    return score, x, reference


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_strong_order_one(problem, solver):
    """The noise is additive, so that Euler's order is one in the strong sense, too."""
    score, x, reference = problem
    coarse, fine = (
        strong_error(solver, score, x, grid(score.sde, steps), reference) for steps in (40, 160)
    )
    slope = order(coarse.rms, fine.rms, 4)
    doubt = (coarse.stderr / coarse.rms + fine.stderr / fine.rms) / torch.tensor(4.0).log()
    assert doubt < 0.1
    # Of the slope, 0.09 are the reference's own error, a sixth of the fine one's.
    assert slope == pytest.approx(1.0, abs=0.15)


def test_the_standard_error_is_that_of_a_mean_over_paths():
    score, x = setting("vp")
    times = grid(score.sde, 10)
    reference = end_on_path(solvers.EulerMaruyama(), score, x, grid(score.sde, 40))
    whole = strong_error(solvers.EulerMaruyama(), score, x, times, reference)
    found = end_on_path(solvers.EulerMaruyama(), score, x, times)
    parts = (found - reference).square().mean(1).reshape(16, -1).mean(1).sqrt()
    assert float(parts.std()) / 16**0.5 == pytest.approx(whole.stderr, rel=0.5)
    assert whole.rms == pytest.approx(float((found - reference).square().mean().sqrt()))
