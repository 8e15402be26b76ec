"""Toy distributions against their closed forms."""

import math

import pytest
import torch

from scoresde.data import DataError, toy
from scoresde.data.toys import TOYS


@pytest.mark.parametrize("name", sorted(TOYS))
def test_toys_are_seeded_float32_points(name):
    a, b, other = toy(name, 100, 0), toy(name, 100, 0), toy(name, 100, 1)
    assert a.x.shape == (100, 2)
    assert a.x.dtype == torch.float32
    assert a.levels is None
    assert torch.equal(a.x, b.x)
    assert not torch.equal(a.x, other.x)
    assert 0.4 < a.x.std() < 2


def test_mixture8_has_eight_gaussians_on_a_circle():
    data = toy("mixture8", 8000, 0)
    assert data.y is not None
    assert data.num_classes == 8
    for k in range(8):
        part = data.x[data.y == k]
        centre = 2 * torch.tensor([math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)])
        assert 850 < len(part) < 1150
        torch.testing.assert_close(part.mean(0), centre, atol=0.03, rtol=0)
        torch.testing.assert_close(part.std(0), torch.full((2,), 0.15), atol=0.02, rtol=0)


def test_the_checkerboard_is_uniform_on_its_eight_squares():
    x = toy("checkerboard", 8000, 0).x
    cell = x.floor().long()
    assert (cell.sum(1) % 2 == 0).all()
    assert x.min() >= -2
    assert x.max() <= 2
    counts = torch.bincount((cell[:, 0] + 2) * 4 + cell[:, 1] + 2)
    assert sorted(counts.tolist())[-8] > 850
    assert counts.max() < 1150
    assert (counts > 0).sum() == 8


def test_rings_lie_at_their_radii():
    data = toy("rings", 3000, 0)
    radius = data.x.norm(dim=1)
    for k, expected in enumerate((0.5, 1.25, 2.0)):
        assert float(radius[data.y == k].mean()) == pytest.approx(expected, abs=0.02)


def test_moons_are_apart_and_opposite():
    data = toy("moons", 2000, 0)
    assert data.y is not None
    upper, lower = data.x[data.y == 0], data.x[data.y == 1]
    assert upper[:, 1].mean() > 0.2
    assert lower[:, 1].mean() < -0.2
    for part, sign in ((upper, 1), (lower, -1)):
        radius = (part - sign * torch.tensor([-0.5, -0.25])).norm(dim=1)
        assert float(radius.mean()) == pytest.approx(1, abs=0.02)
        assert float(radius.std()) == pytest.approx(0.08, abs=0.01)
    torch.testing.assert_close(data.x.mean(0), torch.zeros(2), atol=0.06, rtol=0)


def test_the_swissroll_radius_grows_with_the_angle():
    x = toy("swissroll", 2000, 0).x
    radius = x.norm(dim=1)
    turns = (radius * 6 - torch.atan2(x[:, 1], x[:, 0])) / (2 * math.pi)
    assert ((turns - turns.round()).abs() < 0.2).all()
    assert radius.min() < 0.9
    assert radius.max() > 2.2


def test_unknown_toys_name_the_nearest():
    with pytest.raises(DataError, match="did you mean 'moons'"):
        toy("mons")
    with pytest.raises(DataError, match="at least 1"):
        toy("moons", 0)
