"""Particles chosen anew by their weights: means are kept, and dead ones never come back."""

import pytest
import torch
from particle_problem import MIXTURE, NOISE, SCORE, A, Y, f64, ratio

from scoresde.inverse.linear_twists import Isotropic
from scoresde.inverse.particles import SCHEMES, Runs, chosen, ess
from scoresde.inverse.smc import smc


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_resampling_keeps_the_mean(name):
    weights = torch.tensor([[0.0, 0.45, 0.0, 0.3, 0.25, 0.0]], dtype=f64)
    u = torch.rand(20000, 6, generator=torch.Generator().manual_seed(0), dtype=f64)
    index = chosen(weights.log().expand(20000, 6), SCHEMES[name](u, 6))
    counts = torch.nn.functional.one_hot(index, 6).sum(1).double()
    torch.testing.assert_close(counts.mean(0), 6 * weights[0], rtol=0, atol=0.03)
    assert float(counts[:, [0, 2, 5]].max()) == 0
    if name == "systematic":
        assert bool(((counts - 6 * weights).abs() < 1).all())
    if name == "multinomial":
        torch.testing.assert_close(
            counts.var(0), 6 * weights[0] * (1 - weights[0]), rtol=0, atol=0.06
        )
    torch.testing.assert_close(ess(weights.log()), torch.tensor([1 / 0.355], dtype=f64))


def test_weights_are_equal_after_resampling():
    runs = Runs(2, 4, torch.zeros(1, dtype=f64))
    runs.weigh(torch.tensor([0.0, 1.0, 2.0, 9.0, 0.0, 0.1, 0.0, 0.1], dtype=f64))
    kept = runs.select(torch.tensor([[0.1, 0.3, 0.6, 0.9]], dtype=f64).expand(2, 4), 0.5)
    assert kept.tolist() == [3, 3, 3, 3, 4, 5, 6, 7]
    torch.testing.assert_close(runs.log_weights[0].exp(), torch.full((4,), 0.25, dtype=f64))
    assert float(runs.log_weights[1].std()) > 0
    assert runs.resampled.tolist() == [1, 0]


def test_a_particle_without_weight_is_not_chosen_at_the_edge_of_another():
    weights = torch.tensor([[0.0, 0.5, 0.0, 0.5]], dtype=f64)
    places = torch.tensor([[0.0, 0.25, 0.5, 0.75]], dtype=f64)
    assert chosen(weights.log(), places).tolist() == [[1, 1, 3, 3]]


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_evidence_has_its_mean_under_every_resampling(name):
    found = smc(
        SCORE, A, Y, NOISE, particles=6, draws=1000, steps=24, resample=name, threshold=1,
        twist=Isotropic(1),
    )  # fmt: skip
    assert bool((found.resampled >= 23).all())
    mean, error = ratio(found, MIXTURE.log_evidence(A, Y, NOISE))
    assert error < 0.03
    assert abs(mean - 1) < 3.5 * error + 0.01


def test_threshold_says_when_to_resample():
    never = smc(SCORE, A, Y, NOISE, particles=50, draws=4, steps=20, threshold=0, twist="pgdm")
    some = smc(SCORE, A, Y, NOISE, particles=50, draws=4, steps=20, threshold=0.8, twist="pgdm")
    assert int(never.resampled.max()) == 0
    expected = (some.ess[:-1] < 40).sum(0)
    assert torch.equal(some.resampled, expected)
    assert int(expected.sum()) > 0
    assert some.ess.shape == (21, 4)
    torch.testing.assert_close(some.ess[-1], 1 / some.log_weights.exp().square().sum(1))
