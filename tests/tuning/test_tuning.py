"""Tuned grids: the gradient, the gain on unseen trajectories, and the files."""

import pytest
import torch

import scoresde as sd
from scoresde import grids, solvers
from scoresde.config import ConfigError, describe
from scoresde.tuning import files as tuned
from scoresde.tuning import search, tuner

SIZES = {"trajectories": 192, "held_out": 192, "batch": 64, "iterations": 60}


def searching(mixture, sde, method, count=64):
    score = mixture.score(sde)
    x = tuner.start_noise(score, (count, 2), 0, torch.device("cpu"), torch.float64)
    ends = sd.sample(score, x_T=x, solver="runge-kutta", denoise=False).x
    return search.Search(score, method, x, ends, {}, 32)


@pytest.mark.parametrize("solver", [solvers.VABM(), solvers.UniPC(), solvers.Heun()], ids=repr)
def test_the_gradient_is_that_of_a_central_difference(sde, mixture, solver):
    """Through the steps, the schedule and, by its derivative alone, the inverse of the log-SNR."""
    if isinstance(sde, sd.DDPM):
        pytest.skip("its table's time is piecewise: the difference crosses a corner")
    found = searching(mixture, sde, solver)
    times = grids.Logistic()(sde, 6, sde.t_max, sde.t_min_sampling)
    ladder = sde.log_snr(times)
    rows = torch.arange(len(found.x))

    def loss(theta):
        return found.squares(search.points(sde, ladder, theta), rows).mean()

    theta = ladder.diff().log().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(theta), theta)
    nudge = torch.zeros(6, dtype=torch.float64)
    nudge[2] = 1e-5
    with torch.no_grad():
        slope = (loss(theta + nudge) - loss(theta - nudge)) / 2e-5
    torch.testing.assert_close(gradient[2], slope, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("steps", [5, 10])
def test_a_tuned_grid_beats_every_fixed_one_on_unseen_trajectories(mixture, steps):
    score = mixture.score(sd.VP())
    found = sd.tune(score, {"name": "vabm", "points": 2}, steps, **SIZES)
    assert found.gain > 1.3
    assert found.error < min(found.fixed.values()) / 1.3
    # What it says is what sampling by that grid does.
    x = tuner.start_noise(score, (384, 2), 0, torch.device("cpu"), torch.float64)[192:]
    exact = sd.sample(score, x_T=x, solver="runge-kutta", denoise=False).x
    for grid, error in ((found.grid, found.error), ("karras", found.fixed["karras"])):
        out = sd.sample(
            score, x_T=x, solver=solvers.VABM(points=2), steps=steps, grid=grid, denoise=False
        )
        assert float((out.x - exact).square().mean().sqrt()) == pytest.approx(error, rel=0.02)


def test_without_a_search_it_is_the_best_fixed_grid(mixture):
    found = sd.tune(mixture.score(sd.VP()), "heun", 4, **{**SIZES, "iterations": 0})
    assert found.seen > 0
    assert min(abs(found.error - e) for e in found.fixed.values()) < 1e-12


def test_trajectories_and_seed_decide_the_result(mixture):
    score, few = mixture.score(sd.VE()), {**SIZES, "iterations": 8}
    one, again = (sd.tune(score, "unipc", 5, **few) for _ in range(2))
    assert one.grid == again.grid
    assert one.grid != sd.tune(score, "unipc", 5, seed=1, **few).grid


def test_saved_grids_are_found_by_solver_and_steps(mixture, tmp_path):
    score, few = mixture.score(sd.VP()), {**SIZES, "iterations": 2}
    file = tmp_path / "tuned.yaml"
    made = {steps: sd.tune(score, "vabm", steps, **few) for steps in (4, 6)}
    for found in (*made.values(), made[4]):
        tuned.save(file, found)
    assert len(tuned.read(file)) == 2
    for steps, found in made.items():
        out = sd.sample(score, (2, 2), solver="vabm", steps=steps, grid=str(file))
        assert out.grid["log_snr"] == list(found.grid.log_snr)
    score.tuned = tuned.read(file)
    assert torch.equal(sd.sample(score, (2, 2), solver="vabm", steps=6, grid="tuned").x, out.x)
    # In parallel the steps are the same.
    both = {"name": "parallel", "solver": "vabm", "tolerance": 0.0}
    many = sd.sample(score, (2, 2), solver=both, steps=6, grid="tuned")
    torch.testing.assert_close(many.x, out.x, rtol=0, atol=1e-6)
    for match, settings in {
        "no grid is tuned for parallel": {"solver": "parallel", "steps": 4},
        "for vabm at 5 steps .tuned: vabm at 6, vabm at 4": {"solver": "vabm", "steps": 5},
        "for vabm:points=2 at 6 steps": {"solver": {"name": "vabm", "points": 2}, "steps": 6},
        "no grid is tuned at 5 steps .tuned: vabm": {"steps": 5},
        "no grid is tuned for unipc": {"solver": "unipc", "steps": 4},
        "its default steps": {"solver": "vabm"},
    }.items():
        with pytest.raises(ConfigError, match=match):
            sd.sample(score, (2, 2), grid="tuned", **settings)
    with pytest.raises(ConfigError, match="no file of tuned grids"):
        sd.sample(score, (2, 2), solver="vabm", steps=4, grid=str(tmp_path / "other.yaml"))
    file.write_text("tuned: 3\n")
    with pytest.raises(ConfigError, match="is not a file of tuned grids"):
        sd.sample(score, (2, 2), solver="vabm", steps=4, grid=str(file))


def test_a_tuned_grid_brings_its_solver(mixture):
    score, few = mixture.score(sd.VP()), {**SIZES, "iterations": 2}
    found = [sd.tune(score, solver, 4, **few) for solver in ("ddim", solvers.VABM(points=2))]
    assert found[1].error < found[0].error
    score.tuned = tuple(one.entry() for one in found)
    for entries in (score.tuned, score.tuned[::-1]):
        score.tuned = entries
        out = sd.sample(score, (2, 2), steps=4, grid="tuned")
        assert out.solver == describe(solvers.VABM(points=2))
        with pytest.raises(ConfigError, match=r"needs a solver or steps .*vabm:points=2 at 4"):
            sd.sample(score, (2, 2), grid="tuned")
    score.tuned = score.tuned[:1]
    assert sd.sample(score, (2, 2), grid="tuned").steps == 4
    assert sd.sample(score, (2, 2), grid="karras").solver == describe(solvers.VABM())


def test_a_model_brings_its_tuned_grids(tmp_path):
    model = sd.load("zoo:digits")
    found = sd.tune(model, "vabm", 3, trajectories=4, held_out=2, iterations=2, batch=2)
    model.save(tmp_path)
    tuned.save(tmp_path / tuned.FILE, found)
    loaded = sd.load(tmp_path)
    out = sd.sample(loaded, (1, *loaded.shape), solver="vabm", steps=3, grid="tuned")
    assert out.grid["log_snr"] == list(found.grid.log_snr)
    assert out.steps == 3


def test_a_search_leaves_no_gradients_and_asks_for_no_mode():
    net = sd.load("zoo:digits").requires_grad_(True)
    few = {"trajectories": 2, "held_out": 2, "iterations": 1, "batch": 2}
    with torch.no_grad():
        found = sd.tune(net, "vabm", 2, **few)
    with torch.inference_mode():
        assert sd.tune(net, "vabm", 2, **few).grid == found.grid
    assert all(p.grad is None for p in net.parameters())


def test_of_several_solvers_the_best_on_the_seen_trajectories_is_taken(mixture):
    score = mixture.score(sd.VP())
    several = ["ddim", {"name": "vabm", "points": 2}, solvers.LMS(points=3)]
    found = sd.tune(score, several, 6, **SIZES)
    assert found.solver == describe(solvers.VABM(points=2))
    assert [section["name"] for section, _ in found.tried] == ["ddim", "vabm", "lms"]
    alone = sd.tune(score, several[1], 6, **SIZES)
    assert alone.tried == ()
    assert found.error < 1.1 * alone.error


def test_drawn_trajectories_keep_the_mean():
    sizes = torch.tensor([0.0, 0.1, 0.2, 5.0], dtype=torch.float64)
    values = torch.tensor([7.0, -3.0, 2.0, 10.0], dtype=torch.float64)
    rows, weight = search.draw(sizes, 100_000, torch.Generator().manual_seed(0))
    found = weight * values[rows]
    assert float((found.mean() - values.mean()).abs()) < 4 * float(found.std()) / 100_000**0.5
    assert float((rows == 3).double().mean()) > 0.5


def test_a_descent_gives_the_best_points_that_it_met(mixture):
    """With steps far too long the last points are worse than the first."""
    found = searching(mixture, sd.VP(), solvers.DDIM())
    times = grids.Logistic()(sd.VP(), 6, 1.0, 1e-3)
    points, errors = found.descend(times, 16, 50.0, 0, lambda what, fraction: None)
    assert torch.equal(errors, found.errors(points))
    assert search.criterion(errors) <= search.criterion(found.errors(times))


@pytest.mark.parametrize(
    ("solver", "settings", "match"),
    [
        (["heun", "vabm"], {}, "equal evaluations a step, got heun 2, vabm 1"),
        ([], {}, "tune needs a solver"),
        (["vabm", "ancestral"], {}, "'ancestral' cannot be tuned"),
        ("ancestral", {}, "draws noise or chooses its own steps"),
        ("runge-kutta", {}, "cannot be tuned"),
        ("heum", {}, "did you mean 'heun'"),
        ("heun", {"steps": 1}, "steps >= 2, got 1"),
        ("heun", {"trajectories": 1}, "trajectories >= 2"),
    ],
)
def test_what_does_not_fit_is_refused(mixture, solver, settings, match):
    with pytest.raises(ValueError, match=match):
        sd.tune(mixture.score(sd.VP()), solver, **{"steps": 4, **settings})
