import math
from itertools import permutations

import pytest
import torch

from scoresde.metrics import MMD, SlicedWasserstein, wasserstein2


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_wasserstein_is_the_best_matching_of_equal_counts():
    x, y = normal(5, seed=1), normal(5, seed=2)
    best = min((x[list(order)] - y).square().mean() for order in permutations(range(5)))
    assert wasserstein2(x, y) == pytest.approx(float(best.sqrt()), rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(3, 2), (4, 6), (7, 1), (5, 50)])
def test_wasserstein_of_unequal_counts_is_that_of_repeated_items(n, m):
    x, y = normal(4, n, seed=1), normal(4, m, seed=2)
    repeated = wasserstein2(x.repeat_interleave(m, 1), y.repeat_interleave(n, 1))
    torch.testing.assert_close(wasserstein2(x, y), repeated, rtol=1e-12, atol=0)


def test_sliced_distance_of_one_dimension_is_exact():
    x, y = normal(300, 1, seed=1), 2 * normal(200, 1, seed=2)
    found = SlicedWasserstein(projections=7)(x, y)
    assert found.value == pytest.approx(float(wasserstein2(x[:, 0], y[:, 0])), rel=1e-12)
    assert found.stderr == 0


def test_sliced_distance_of_a_shift_is_its_root_mean_square():
    """``E (theta.c)^2 = |c|^2 / D``, with the error of the directions that is reported."""
    x, shift = normal(50, 2, 3, 3, seed=1), normal(1, 2, 3, 3, seed=2)
    expected = float(shift.square().mean().sqrt())
    zs = []
    for seed in range(40):
        found = SlicedWasserstein(projections=64, seed=seed)(x + shift, x)
        assert found.value == pytest.approx(expected, rel=0.5)
        zs.append((found.value - expected) / found.stderr)
    zs = torch.tensor(zs)
    assert zs.abs().lt(2).double().mean() > 0.85
    assert 0.6 < zs.std() < 1.5


def test_sliced_distance_of_gaussians():
    """``W2 = |a - b|`` between ``N(0, a^2)`` and ``N(0, b^2)`` in every direction."""
    x, y = 1.5 * normal(20000, 3, seed=1), normal(20000, 3, seed=2)
    assert SlicedWasserstein(64)(x, y).value == pytest.approx(0.5, abs=0.02)


def test_sliced_distance_repeats_and_ignores_order_and_precision():
    x, y = normal(80, 5, seed=1), normal(60, 5, seed=2)
    distance = SlicedWasserstein(32, seed=4)
    assert distance(x.flip(0), y).value == pytest.approx(distance(x, y).value, rel=1e-12)
    assert distance(x, y) == distance(x, y)
    assert distance(x, y).value != SlicedWasserstein(32, seed=5)(x, y).value
    assert distance(x.float(), y.float()).value == pytest.approx(distance(x, y).value, rel=1e-5)


def test_mmd_equals_the_plain_sums():
    x, y = normal(6, 2, seed=1), 1 + normal(5, 2, seed=2)
    metric = MMD(scale=0.7)

    def k(a, b):
        d2 = float((a - b).square().sum())
        return sum((1 + d2 / (2 * p * 0.49)) ** -p for p in (0.2, 0.5, 1, 2, 5)) / 5

    xx = sum(k(x[i], x[j]) for i in range(6) for j in range(6) if i != j) / 30
    yy = sum(k(y[i], y[j]) for i in range(5) for j in range(5) if i != j) / 20
    xy = sum(k(a, b) for a in x for b in y) / 30
    assert metric(x, y).value == pytest.approx(xx + yy - 2 * xy, rel=1e-10)


def test_mmd_is_unbiased_and_its_error_is_its_spread():
    metric = MMD(scale=1.0)
    same, apart, errors = [], [], []
    for seed in range(150):
        x, y = normal(40, 2, seed=2 * seed), normal(60, 2, seed=2 * seed + 1)
        same.append(metric(x, y).value)
        found = metric(x + 1, y)
        apart.append(found.value)
        errors.append(found.stderr)
    same, apart = torch.tensor(same), torch.tensor(apart)
    assert abs(same.mean()) < 3 * same.std() / math.sqrt(150)
    assert torch.tensor(errors).mean() == pytest.approx(float(apart.std()), rel=0.25)


def test_mmd_scale_is_the_median_distance_of_the_reference():
    x = torch.tensor([[0.0], [1.0], [4.0]])
    assert MMD.fit(x).scale == 3.0


def test_mmd_uses_no_more_items_than_its_limit():
    x, y = normal(30, 2, seed=1), normal(30, 2, seed=2)
    assert MMD(1.0, limit=10)(x, y) == MMD(1.0)(x[:10], y[:10])
    assert MMD(1.0, limit=10).floor(x, y) == MMD(1.0).floor(x[:10], y[:10])


@pytest.mark.parametrize("metric", [SlicedWasserstein(16), MMD(1.5)], ids=["sw2", "mmd"])
@pytest.mark.parametrize("m", [60, 90])
def test_floor_is_passed_by_one_in_twenty_real_sets(metric, m):
    """The floor is a permutation test: its level is 5 %, its power against a shift is high."""
    over = shifted = 0
    for seed in range(200):
        items = normal(60 + m, 2, seed=seed)
        floor = metric.floor(items[:60], items[60:], splits=40, seed=seed)
        over += metric(items[:60], items[60:]).value > floor
        shifted += metric(items[:60] + 1, items[60:]).value > floor
    assert 2 <= over <= 22
    assert shifted >= 190


@pytest.mark.parametrize("metric", [SlicedWasserstein(16), MMD(1.5)], ids=["sw2", "mmd"])
def test_floor_of_a_split_equals_the_metric_of_its_parts(metric):
    real, reference = normal(30, 2, seed=1), normal(20, 2, seed=2)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
    pool = torch.cat([real, reference])
    by_hand = metric(pool[order < 30], pool[order >= 30]).value
    assert metric.floor(real, reference, splits=1, seed=3) == pytest.approx(by_hand, rel=1e-10)


def test_bad_sets_are_refused():
    x = normal(4, 3)
    for metric in (SlicedWasserstein(), MMD(1.0)):
        with pytest.raises(ValueError, match="of one shape"):
            metric(x, normal(4, 2))
        with pytest.raises(ValueError, match="finite"):
            metric(x / 0, x)
    with pytest.raises(ValueError, match="at least one item"):
        SlicedWasserstein()(x[:0], x)
    with pytest.raises(ValueError, match="at least two items"):
        MMD(1.0)(x[:1], x)
    with pytest.raises(ValueError, match="positive finite scale"):
        MMD.fit(torch.ones(5, 2))
    with pytest.raises(ValueError, match="projections >= 2"):
        SlicedWasserstein(1)
