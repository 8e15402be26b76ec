"""The scaler: exact round trips, its log-determinant, and bits per dimension."""

import math

import pytest
import torch

from scoresde.data import DataError, Dataset, Scaler


def discrete(levels):
    return Scaler.fit(Dataset(torch.tensor([[0], [levels - 1]]), levels=levels))


@pytest.mark.parametrize("levels", [2, 17, 255, 256, 1000, 65536])
@pytest.mark.parametrize("u", [0.0, 0.3, 0.5, 1 - 2**-24])
def test_every_level_comes_back_exactly(levels, u):
    scaler = discrete(levels)
    x = torch.arange(levels)[:, None]
    z = scaler.encode(x, noise=torch.full(x.shape, u))
    assert z.dtype == torch.float32
    assert z.min() >= -1
    assert z.max() <= 1
    back = scaler.decode(z)
    assert back.dtype == (torch.uint8 if levels <= 256 else torch.int64)
    assert torch.equal(back.long(), x)


def test_random_dequantisation_comes_back_and_fills_the_bin():
    scaler = discrete(4)
    x = torch.full((20000, 1), 2, dtype=torch.uint8)
    z = scaler.encode(x, generator=torch.Generator().manual_seed(0))
    u = (z + 1) * 2 - 2
    assert torch.equal(scaler.decode(z), x)
    assert abs(u.mean() - 0.5) < 0.01
    assert abs(u.var() - 1 / 12) < 0.002
    assert u.min() < 0.001
    assert u.max() > 0.999


def test_dequantisation_is_seeded_and_can_be_turned_off():
    scaler = discrete(256)
    x = torch.arange(256, dtype=torch.uint8)[:, None]
    first, second, other = (
        scaler.encode(x, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    centre = scaler.encode(x, dequantize=False)
    assert torch.equal(centre[:, 0], (torch.arange(256) + 0.5) / 128 - 1)


def test_samples_outside_the_range_are_clamped():
    z = torch.tensor([[-3.0], [-1.0], [1.0], [3.0]])
    assert discrete(17).decode(z).flatten().tolist() == [0, 0, 16, 16]
    assert discrete(256).decode(z).flatten().tolist() == [0, 0, 255, 255]


def test_double_stays_double():
    x = torch.tensor([[3.0]], dtype=torch.float64)
    assert discrete(17).encode(x).dtype == torch.float64
    assert Scaler().encode(x).dtype == torch.float64
    assert Scaler().encode(x.half()).dtype == torch.float32


@pytest.mark.parametrize("value", [0.5, -1.0, 17.0, float("nan")])
def test_floats_that_are_no_levels_are_refused(value):
    with pytest.raises(DataError, match=r"0\.\.16"):
        discrete(17).encode(torch.tensor([[value]]))


@pytest.mark.parametrize("noise", [torch.zeros(1), torch.ones(2, 1), -torch.ones(2, 1)])
def test_noise_of_another_shape_or_range_is_refused(noise):
    with pytest.raises(DataError, match=r"\[0, 1\)"):
        discrete(17).encode(torch.zeros(2, 1, dtype=torch.uint8), noise=noise)


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 4, 2), (3, 2, 2, 2)])
@pytest.mark.parametrize("entries", [1, 3])
def test_log_det_is_that_of_the_jacobian(shape, entries):
    scaler = Scaler((1.0, -2.0, 3.0)[:entries], (0.5, -3.0, 7.0)[:entries])
    x = torch.randn(1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    jacobian = torch.autograd.functional.jacobian(scaler.encode, x)
    expected = torch.linalg.slogdet(jacobian.reshape(math.prod(shape), -1)).logabsdet
    assert scaler.log_det(shape) == pytest.approx(float(expected), rel=1e-12)


def test_log_det_of_one_scale_and_many_shifts():
    assert Scaler((1.0, 2.0), (3.0,)).log_det((2, 4)) == pytest.approx(8 * math.log(3))


@pytest.mark.parametrize("levels", [17, 256])
def test_a_uniform_density_over_the_range_is_log2_levels_bits(levels):
    shape = (3, 4, 5)
    dims = math.prod(shape)
    log_p = -dims * math.log(2.0)  # density 1/2 in each entry of [-1, 1]
    bits = -(log_p + discrete(levels).log_det(shape)) / (dims * math.log(2))
    assert bits == pytest.approx(math.log2(levels), abs=1e-12)


def test_standardise_per_dim_gives_mean_0_and_std_1_in_each_entry():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 3, generator=g) * torch.tensor([1e-3, 1.0, 1e4])
    x = x + torch.tensor([5.0, -2.0, 1e5])
    scaler = Scaler.fit(Dataset(x))  # "auto" for vectors
    z = scaler.encode(x)
    assert len(scaler.scale) == 3
    torch.testing.assert_close(z.mean(0), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(scaler.decode(z), x, rtol=1e-5, atol=1e-5)


def test_per_dim_goes_by_channel_for_signals():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 2, 30, generator=g) * torch.tensor([2.0, 9.0])[:, None] + 4
    z = Scaler.fit(Dataset(x), "standardize-per-dim").encode(x)
    torch.testing.assert_close(z.mean((0, 2)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std((0, 2), correction=0), torch.ones(2), atol=1e-5, rtol=0)


def test_auto_standardises_other_shapes_globally():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 2, 30, generator=g) * torch.tensor([2.0, 9.0])[:, None] + 4
    scaler = Scaler.fit(Dataset(x))
    z = scaler.encode(x)
    assert len(scaler.scale) == 1
    assert float(z.mean()) == pytest.approx(0, abs=1e-5)
    assert float(z.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert z[:, 0].std() < 0.5 < z[:, 1].std()


def test_range_takes_the_extremes_to_one():
    x = torch.tensor([[2.0, 3.0], [10.0, 4.0]])
    z = Scaler.fit(Dataset(x), "range").encode(x)
    torch.testing.assert_close(z, torch.tensor([[-1.0, -0.75], [1.0, -0.5]]))


def test_none_leaves_data_alone():
    x = torch.tensor([[2.0, 3.0]])
    assert torch.equal(Scaler.fit(Dataset(x), "none").encode(x), x)


@pytest.mark.parametrize("mode", ["range", "standardize", "standardize-per-dim"])
def test_data_that_does_not_vary_has_scale_one(mode):
    x = torch.full((7, 2), 0.1)
    scaler = Scaler.fit(Dataset(x), mode)
    assert set(scaler.scale) == {1.0}
    torch.testing.assert_close(scaler.encode(x), torch.zeros(7, 2))


def test_discrete_data_goes_by_its_levels_in_every_mode():
    data = Dataset(torch.tensor([[3], [4]]), levels=17)
    for mode in ("auto", "range", "standardize"):
        assert Scaler.fit(data, mode) == Scaler((8.5,), (2 / 17,), 17)


def test_pictures_of_levels_and_of_the_unit_range():
    z = torch.tensor([[-2.0, -1.0, 0.0, 1.0, 2.0]])
    assert Scaler().image(z).flatten().tolist() == [0, 0, 128, 255, 255]
    x = torch.tensor([[0, 8, 16]], dtype=torch.uint8)
    scaler = discrete(17)
    image = scaler.image(scaler.encode(x))
    assert image.dtype == torch.uint8
    assert image.flatten().tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    "fields",
    [
        {"scale": (0.0,)},
        {"scale": (float("inf"),)},
        {"shift": (float("nan"),)},
        {"shift": ()},
        {"shift": (0.0, 1.0), "scale": (1.0, 1.0, 1.0)},
        {"levels": 1},
    ],
)
def test_impossible_scalers_are_refused(fields):
    with pytest.raises(DataError, match="scaler"):
        Scaler(**fields)


def test_unknown_modes_and_other_shapes_are_refused():
    with pytest.raises(DataError, match=r"'minmax'.*standardize-per-dim"):
        Scaler.fit(Dataset(torch.zeros(2, 2)), "minmax")
    scaler = Scaler((0.0, 0.0), (1.0, 2.0))
    with pytest.raises(DataError, match="2 entries"):
        scaler.encode(torch.zeros(4, 3))
    with pytest.raises(DataError, match="2 entries"):
        scaler.log_det((3,))


def test_lists_from_a_config_file_become_tuples():
    assert Scaler([1, 2], [3, 4]) == Scaler((1.0, 2.0), (3.0, 4.0))  # type: ignore[arg-type]
