"""The laws are standard, are what they say, and differ in difficulty."""

import pytest
import torch

import scoresde as sd
from scoresde.bench import Narrow, Overlapping, Separated, Target, compare, mixture
from scoresde.bench.row import label


@pytest.mark.parametrize("law", [Overlapping, Separated, Narrow])
@pytest.mark.parametrize("dim", [1, 2, 64])
def test_a_law_has_mean_zero_and_unit_variance(law, dim):
    mean, covariance = law(dim).mixture().moments()
    assert mean.abs().max() < 1e-12
    assert float(covariance.diagonal().mean()) == pytest.approx(1, rel=1e-12)
    assert mean.dtype == torch.float64


def test_mixture_is_the_overlapping_law():
    for part in ("weights", "means", "stds"):
        assert torch.equal(getattr(mixture(3), part), getattr(Overlapping(3).mixture(), part))


def test_separated_parts_are_far_apart():
    law = Separated(dim=2, parts=5).mixture()
    assert len(law.weights) == 5
    assert float(law.weights[0] / law.weights[-1]) == pytest.approx(3)
    assert torch.pdist(law.means).min() > 20 * law.stds.max()


@pytest.mark.parametrize("dim", [2, 16])
def test_narrow_is_nearly_degenerate(dim):
    law = Narrow(dim, ratio=1e-3).mixture()
    assert float(law.stds.min() / law.stds.max()) == pytest.approx(1e-3)
    apart = (law.means[0] - law.means[1]).abs() / law.stds[0]
    assert apart[0] < 3 < 30 < apart[-1]  # overlapping where wide, apart where narrow


def test_wrong_laws_are_refused():
    for wrong in (lambda: Overlapping(0), lambda: Separated(2, parts=1), lambda: Narrow(2, 0.0)):
        with pytest.raises(ValueError, match="needs"):
            wrong()


def test_harder_laws_take_more_evaluations():
    """At the same cost the per-sample solver needs more steps, and Heun errs more."""
    needed, error = {}, {}
    for law in (Overlapping(2), Separated(2)):
        target = Target.exact(law, samples=200)
        own, heun = compare(
            law.mixture().score(sd.VP()), target, samples=200, endpoint=True, steps=[20],
            solvers=["runge-kutta", "heun"],
        )  # fmt: skip
        assert own.law == target.name == label(law)
        needed[label(law)], error[label(law)] = own.nfe, heun.endpoint_rms
    easy, hard = needed
    assert needed[hard] > 1.3 * needed[easy]
    assert error[hard] > error[easy]
