"""Error bars of a likelihood: its parts, what they cover, and targets."""

import math
from dataclasses import replace

import pytest
import torch

import scoresde as sd
from scoresde.likelihood.budget import PILOT

f64 = torch.float64


@pytest.fixture
def cloud():
    """A mixture in eight dimensions whose Jacobian has much beside its diagonal."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(12, 8, generator=generator, dtype=f64)
    return sd.GaussianMixture(torch.ones(12), means, torch.full((12,), 0.6, dtype=f64))


def truth(mixture, x, **settings):
    return sd.log_prob(
        mixture.score(sd.VP()), x, divergence="exact", rtol=1e-9, atol=1e-9, **settings
    ).log_prob


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "unipc", "steps": 12},
        {"method": "vabm", "steps": 16},
        {"method": "rk4", "steps": 8},
        {"rtol": 1e-3, "atol": 1e-3},
        {"rtol": 1e-5, "atol": 1e-5},
        {"method": "bosh3", "rtol": 1e-3, "atol": 1e-3},
    ],
    ids=str,
)
def test_the_solver_s_error_is_of_the_size_it_says(sde, cloud, settings):
    x = cloud.sample(48, torch.Generator().manual_seed(1))
    score = cloud.score(sde)
    exact = sd.log_prob(score, x, divergence="exact", rtol=1e-9, atol=1e-9).log_prob
    out = sd.log_prob(score, x, divergence="exact", solver_error=True, **settings)
    ratio = ((out.log_prob - exact) / out.stderr_solver).square().mean().sqrt()
    size = (out.log_prob - exact).square().mean().sqrt()
    said = out.stderr_solver.square().mean().sqrt()
    assert size < 1.5 * said, (size, said, ratio)
    assert torch.allclose(out.stderr, out.stderr_solver, rtol=1e-12)
    assert (out.stderr_probes == 0).all()
    alone = sd.log_prob(score, x, divergence="exact", **settings)
    assert torch.equal(alone.log_prob, out.log_prob)
    assert alone.stderr_solver.isnan().all()
    assert (out.nfe > alone.nfe).all()


def test_parts_of_the_error_add_up_in_squares(cloud):
    x = cloud.sample(6, torch.Generator().manual_seed(1))
    out = sd.log_prob(
        cloud.score(sd.VP()), x, method="unipc", steps=10, probes=4, solver_error=True
    )
    assert torch.allclose(out.stderr**2, out.stderr_probes**2 + out.stderr_solver**2)
    assert torch.allclose(out.stderr_probes, out.estimates.std(1) / 2)
    assert torch.allclose(out.estimates.mean(1), out.log_prob)
    assert out.estimates.shape == (6, 4)
    assert (out.freedom == 3).all()
    assert out.log_det == 0


@pytest.mark.parametrize("start", [{"method": "unipc", "steps": 12}, {}], ids=str)
def test_a_target_is_reached_and_not_overspent(cloud, start):
    x = cloud.sample(12, torch.Generator().manual_seed(2))
    score, exact = cloud.score(sd.VP()), truth(cloud, x)
    spent = []
    for target in (0.6, 0.25):
        out = sd.log_prob(score, x, target_stderr=target, **start)
        assert (out.stderr <= target).all()
        assert out.message == ""
        low, high = out.interval(0.95)
        assert ((low <= exact) & (exact <= high)).sum() >= 10  # of 12
        assert (out.stderr_solver <= target).all()
        spent.append(out)
    assert spent[1].probes > spent[0].probes >= PILOT
    assert spent[1].nfe.sum() > spent[0].nfe.sum()
    easy = sd.log_prob(score, x, target_stderr=20.0, **start)
    assert easy.probes == PILOT
    assert (easy.nfe <= spent[0].nfe).all()


def test_an_exact_divergence_buys_steps_alone(cloud):
    x = cloud.sample(12, torch.Generator().manual_seed(3))
    score, exact = cloud.score(sd.VP()), truth(cloud, x)
    out = sd.log_prob(score, x, divergence="exact", target_stderr=1e-5, method="unipc", steps=8)
    assert (out.stderr <= 1e-5).all()
    assert (out.log_prob - exact).abs().max() < 2e-5
    assert out.probes == 0
    assert out.steps > 64


def test_a_budget_ends_a_target_and_says_so(cloud):
    x = cloud.sample(5, torch.Generator().manual_seed(3))
    score = cloud.score(sd.VP())
    for start in ({"method": "unipc", "steps": 8}, {"rtol": 1e-3, "atol": 1e-3}):
        out = sd.log_prob(score, x, target_stderr=1e-5, max_nfe=150, **start)
        assert (out.nfe <= 150).all()
        assert "1e-05 nats was not reached for 5 of 5 items" in out.message
        assert out.log_prob.isfinite().all()
        assert (out.stderr > 1e-5).all()


def test_what_an_item_gets_does_not_depend_on_its_batch(cloud):
    x = cloud.sample(7, torch.Generator().manual_seed(4))
    settings = {"target_stderr": 0.15, "method": "unipc", "steps": 10, "seed": 5}
    score = cloud.score(sd.VP())
    whole = sd.log_prob(score, x, **settings)
    assert len(set(whole.nfe.tolist())) > 1  # so that they do part
    for i in range(7):
        alone = sd.log_prob(score, x[i : i + 1], start_index=i, **settings)
        assert torch.allclose(alone.log_prob, whole.log_prob[i : i + 1], rtol=0, atol=1e-11)
        assert alone.nfe[0] == whole.nfe[i]
        assert torch.allclose(alone.stderr, whole.stderr[i : i + 1], rtol=0, atol=1e-9)


def test_the_interval_of_a_target_covers_as_it_says():
    """Stein's two stages: the pilot's variance decides on the number of probes, and is kept."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(24, 16, generator=generator, dtype=f64)
    mixture = sd.GaussianMixture(torch.ones(24), means, torch.full((24,), 0.6, dtype=f64))
    item = means[:3].mean(0)
    x = item[None].expand(500, 16).clone()
    exact = truth(mixture, item[None])
    out = sd.log_prob(
        mixture.score(sd.VP()), x, target_stderr=0.3, method="unipc", steps=24, t_min=1e-3
    )
    exact = truth(mixture, item[None], t_min=1e-3)
    assert out.probes > PILOT
    low, high = out.interval(0.95)
    covered = ((low <= exact) & (exact <= high)).double().mean()
    assert covered == pytest.approx(0.95, abs=0.03)


def test_intervals_without_probes_are_those_of_the_solver(cloud):
    x = cloud.sample(3, torch.Generator().manual_seed(4))
    out = sd.log_prob(
        cloud.score(sd.VP()), x, divergence="exact", method="unipc", steps=12, solver_error=True
    )
    low, high = out.interval(0.6826894921370859)
    assert torch.allclose(high - low, 2 * out.stderr, rtol=1e-6)
    unknown = sd.log_prob(cloud.score(sd.VP()), x, method="unipc", steps=12)
    assert unknown.interval()[0].isnan().all()


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_targets_that_are_none_are_refused(cloud, target):
    with pytest.raises(ValueError, match="target_stderr is in nats and above 0"):
        sd.log_prob(cloud.score(sd.VP()), torch.zeros(1, 8), target_stderr=target)


def test_intervals_reach_further_where_probes_err_askew():
    """Of squares of normals, whose mean of eight Student's interval covers in 85 of 100 cases."""
    generator = torch.Generator().manual_seed(0)
    squares = 1 - torch.randn(4000, 8, generator=generator, dtype=f64) ** 2
    mixture = sd.GaussianMixture([1.0], torch.zeros(1, 2, dtype=f64), [1.0])
    like = sd.log_prob(mixture.score(sd.VP()), torch.zeros(4000, 2, dtype=f64), probes=2)
    error = squares.std(1) / 8**0.5
    found = replace(
        like,
        log_prob=squares.mean(1),
        estimates=squares,
        stderr=error,
        stderr_probes=error,
        freedom=torch.full_like(error, 7.0),
    )
    low, high = found.interval(0.95)
    covered = ((low <= 0) & (high >= 0)).double().mean()
    assert covered == pytest.approx(0.94, abs=0.02)
    assert ((found.log_prob - low) > (high - found.log_prob)).double().mean() > 0.7
    even = replace(found, estimates=squares.abs().sort(1).values * 0 + torch.arange(8.0))
    low, high = even.interval(0.95)
    assert torch.allclose(high - even.log_prob, even.log_prob - low)
    assert torch.allclose(high - low, 2 * 2.3646 * error, rtol=1e-3)


def test_a_target_is_not_met_by_what_was_never_compared(cloud):
    """One solve tells nothing of its steps: without another it meets no target."""
    x = cloud.sample(3, torch.Generator().manual_seed(4))
    score, exact = cloud.score(sd.VP()), truth(cloud, x)
    settings = {"divergence": "exact", "method": "unipc"}
    out = sd.log_prob(score, x, steps=8, max_nfe=12, target_stderr=1e-3, **settings)
    assert out.stderr_solver.isnan().all()
    assert "was not reached for 3 of 3 items" in out.message
    one = sd.log_prob(score, x, steps=1, target_stderr=0.05, **settings)
    assert one.steps > 8
    assert ((one.log_prob - exact).abs() < 0.2).all()
    alone = sd.log_prob(score, x, steps=1, solver_error=True, **settings)
    assert alone.stderr_solver.isnan().all()
    assert alone.interval()[0].isnan().all()


def test_a_tolerance_below_the_floor_is_compared_with_what_is_solved(cloud):
    x = cloud.sample(4, torch.Generator().manual_seed(4)).float()
    score = cloud.score(sd.VP())
    with pytest.warns(UserWarning, match="below what float32 resolves"):
        out = sd.log_prob(score, x, divergence="exact", rtol=1e-8, atol=1e-8, solver_error=True)
    assert (out.stderr_solver > 0).all()
    assert (out.rtol, out.atol) == (1e-6, 1e-6)


def test_an_earlier_end_without_its_density_is_warned_of(cloud):
    x = cloud.sample(2, torch.Generator().manual_seed(4))
    with pytest.warns(UserWarning, match="the prior belongs to t_max=1, not to 0.5"):
        sd.log_prob(cloud.score(sd.VP()), x, divergence="exact", t_max=0.5)
