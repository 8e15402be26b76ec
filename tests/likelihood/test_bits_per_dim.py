import math

import pytest
import torch

import scoresde as sd


@pytest.mark.parametrize(("levels", "width"), [(256, 2.0), (256, 1.0), (2, 2.0), (65536, 6.0)])
def test_uniform_data_has_the_bits_of_its_levels(levels, width):
    dims = 12
    log_density = torch.full((3,), -dims * math.log(width), dtype=torch.float64)
    bits = sd.bits_per_dim(log_density, dims, levels, width)
    assert torch.allclose(bits, torch.full_like(bits, math.log2(levels)), atol=1e-12)


def test_a_point_mass_on_one_level_costs_nothing():
    # All mass uniform within one level's bin: density levels/width a dimension.
    log_density = torch.tensor([5 * math.log(256 / 2)], dtype=torch.float64)
    assert sd.bits_per_dim(log_density, 5).abs().max() < 1e-12


def test_refusals():
    x = torch.zeros(2)
    with pytest.raises(ValueError, match=r"discrete data.*nats"):
        sd.bits_per_dim(x, 3, levels=None)
    with pytest.raises(ValueError, match="dims=0"):
        sd.bits_per_dim(x, 0)
