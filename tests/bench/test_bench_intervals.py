"""Intervals cover the truth as often as they say, and pairs share their noise."""

import math
import statistics

import pytest
import torch

from scoresde.bench import Row
from scoresde.bench.intervals import order_statistics, paired_ratio, root_of_mean, spread, student
from scoresde.bench.text import table

TRIALS = 400


def share(inside):
    """How often, with the margin of four standard deviations that 95 % of TRIALS has."""
    assert sum(inside) / TRIALS == pytest.approx(0.95, abs=4 * math.sqrt(0.05 * 0.95 / TRIALS))


def test_student_is_the_textbook_interval():
    low, high = student([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))
    assert student([1.0]) is None
    assert student([1.0, math.inf]) is None


def test_student_covers_the_mean_of_few_values():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(TRIALS, 3, generator=generator, dtype=torch.float64) + 5
    spans = [student(row.tolist()) for row in draws]
    share([low <= 5 <= high for low, high in spans])


def test_root_of_mean_covers_the_root_mean_square():
    generator = torch.Generator().manual_seed(1)
    squares = torch.randn(TRIALS, 300, generator=generator, dtype=torch.float64).square() * 4
    spans = [root_of_mean(row) for row in squares]
    share([low <= 2 <= high for low, high in spans])
    assert root_of_mean(torch.tensor([0.0, 4.0]))[0] == 0
    assert root_of_mean(torch.tensor([4.0])) is None


@pytest.mark.parametrize("p", [0.5, 0.95])
def test_order_statistics_cover_the_quantile(p):
    generator = torch.Generator().manual_seed(2)
    draws = torch.rand(TRIALS, 400, generator=generator, dtype=torch.float64).sort(1).values
    spans = [order_statistics(row, p) for row in draws]
    inside = sum(low <= p <= high for low, high in spans) / TRIALS
    assert 0.93 < inside < 0.99  # ranks are whole: rather too wide
    assert order_statistics(draws[0, :10], 0.95) is None


def test_a_ratio_of_pairs_does_not_see_what_they_share():
    noise = [0.1, 3.0, 40.0, 0.7]
    ratio, interval = paired_ratio([2 * n for n in noise], noise)
    assert ratio == pytest.approx(2)
    assert interval == pytest.approx((2, 2))
    ratio, (low, high) = paired_ratio([1.0, 4.0], [1.0, 1.0])
    assert ratio == pytest.approx(2)
    half = 12.7062 * statistics.stdev([0, math.log(4)]) / math.sqrt(2)
    assert (low, high) == pytest.approx((2 * math.exp(-half), 2 * math.exp(half)), rel=1e-4)
    assert paired_ratio([3.0], [1.0]) == (pytest.approx(3), None)


def test_a_cut_interval_is_shown_by_its_longer_side():
    """Half of (0, 3) is 1.5, and 1 +- 1.5 would say that 3 is out."""
    assert spread(1.0, (0.0, 3.0)) == 2
    assert spread(1.0, (0.2, 1.1)) == pytest.approx(0.8)
    row = Row("heun", 5, sliced_w2=1.0, nfe=5, intervals={"sliced_w2": (0.0, 3.0)}, repeats=2)
    assert "1 +-2" in table([row], {})
