"""The area under the curve: closed form, ties, and an error that covers."""

import math

import pytest
import torch

from scoresde.config import ConfigError
from scoresde.likelihood.outliers import SCORES, auroc, outlier_score, separation

f64 = torch.float64


def normals(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


def phi(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


@pytest.mark.parametrize("d", [-0.7, 0.0, 1.0, 2.5])
def test_two_gaussians_have_the_closed_form(d):
    x, y = normals(0, 40_000), normals(1, 60_000) + d
    found = auroc(x, y)
    assert 0 < found.stderr < 0.003
    assert abs(found.value - phi(d / math.sqrt(2))) < 4 * found.stderr


def test_it_is_the_mean_over_pairs_with_ties_half():
    x = torch.tensor([0.0, 1.0, 1.0, 2.0, 5.0])
    y = torch.tensor([1.0, 2.0, 2.0, 7.0])
    psi = (y > x[:, None]).double() + (y == x[:, None]).double() / 2
    found = auroc(x, y)
    assert found.value == pytest.approx(float(psi.mean()))
    variance = psi.mean(1).var() / 5 + psi.mean(0).var() / 4
    assert found.stderr == pytest.approx(float(variance.sqrt()))
    assert auroc(y, x).value == pytest.approx(1 - found.value)
    assert auroc(y, x).stderr == pytest.approx(found.stderr)


@pytest.mark.parametrize(("d", "m", "n"), [(0.0, 60, 60), (1.0, 50, 200), (1.5, 200, 50)])
def test_the_error_covers_as_often_as_it_says(d, m, n):
    trials, truth = 600, phi(d / math.sqrt(2))
    found = [
        auroc(x, y) for x, y in zip(normals(2, trials, m), normals(3, trials, n) + d, strict=True)
    ]
    inside = sum(abs(a.value - truth) < 1.96 * a.stderr for a in found) / trials
    assert inside == pytest.approx(0.945, abs=0.03)
    values = torch.tensor([a.value for a in found], dtype=f64)
    claimed = torch.tensor([a.stderr for a in found], dtype=f64).square().mean().sqrt()
    assert float(values.std() / claimed) == pytest.approx(1, abs=0.1)


def test_complete_separation_is_not_certain():
    low, high = torch.arange(10.0), torch.arange(20.0) + 100
    assert auroc(low, high) == (1.0, 0.1)
    assert auroc(high, low) == (0.0, 0.1)
    assert auroc(torch.ones(4), torch.ones(5)) == (0.5, 0.25)


def test_float32_counts_as_exactly_as_float64():
    x, y = normals(0, 70_000).float(), normals(1, 70_000).float()
    assert auroc(x, y) == auroc(x.double(), y.double())


def test_typicality_sees_what_likelihood_does_not():
    """Items near the mode have a higher density than typical ones, and yet lie outside."""
    dims = 100
    z = normals(0, 800, dims)
    log_prob = -z.square().sum(1) / 2
    train, inside, outside = log_prob[:400], log_prob[400:600], log_prob[600:] / 4
    found = separation(inside, outside, train)
    assert list(found) == list(SCORES)
    assert found["likelihood"].value < 0.01
    assert found["typicality"].value > 0.99
    # Without one the items inside are the reference; the mean of the training set is another.
    alone = separation(inside, outside)
    assert alone["likelihood"] == found["likelihood"]
    score = outlier_score("typicality", inside, train)
    assert torch.allclose(score, (inside - train.mean()).abs())
    shifted = separation(inside, outside, train + 60)
    assert shifted["typicality"].value < found["typicality"].value


@pytest.mark.parametrize(
    ("inside", "outside", "said"),
    [
        (torch.ones(1), torch.ones(3), "inside must have shape"),
        (torch.ones(3), torch.ones(3, 1), "outside must have shape"),
        (torch.tensor([0.0, math.nan, math.inf]), torch.ones(3), "2 of 3 values of inside"),
        (torch.ones(3), torch.tensor([1.0, 2.0, math.nan]), "the first of item 2"),
    ],
)
def test_bad_scores_give_one_line(inside, outside, said):
    with pytest.raises(ValueError, match=said):
        auroc(inside, outside)


def test_an_unknown_score_names_the_known():
    with pytest.raises(ConfigError, match="did you mean 'typicality'"):
        outlier_score("typical", torch.ones(2), torch.ones(2))
