"""The Hartley transform, under-sampling in k-space, and circular convolutions."""

from __future__ import annotations

import math

import pytest
import torch

from scoresde.inverse import fourier
from scoresde.inverse import operators as room


def _normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _dft(x, axes):
    return torch.fft.fftn(x, dim=axes, norm="ortho")


def test_the_transform_is_a_sum_with_cas_and_its_own_inverse():
    x = _normal(2, 3, 4, 5)
    k, n = torch.arange(4).double(), torch.arange(5).double()
    rows = k[:, None, None, None] * k[None, None, :, None] / 4
    columns = n[None, :, None, None] * n[None, None, None, :] / 5
    phase = 2 * math.pi * (rows + columns)
    cas = (phase.cos() + phase.sin()) / math.sqrt(20)
    found = fourier.hartley(x, (2, 3))
    torch.testing.assert_close(found, torch.einsum("klij,bcij->bckl", cas, x))
    torch.testing.assert_close(fourier.hartley(found, (2, 3)), x)
    half = fourier.hartley(x.half(), (2, 3))
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), found, rtol=0, atol=1e-2)


@pytest.mark.parametrize("shape", [(6,), (2, 7), (1, 4, 6), (2, 4, 3, 2)])
def test_complex_data_and_coefficients_are_each_other(shape):
    x = _normal(3, *shape)
    axes = fourier.batch_axes(shape)
    coefficients = fourier.hartley(x, axes)
    torch.testing.assert_close(fourier.from_complex(_dft(x, axes), axes), coefficients)
    torch.testing.assert_close(fourier.to_complex(coefficients, axes), _dft(x, axes))


def test_a_symmetric_mask_under_samples_the_fourier_transform_itself():
    operator = room.FourierLines((2, 6, 16), acceleration=2.0, seed=1)
    assert operator.symmetric
    x = _normal(3, 2, 6, 16)
    kspace = _dft(x, (2, 3)) * operator.mask
    zero_filled = torch.fft.ifftn(kspace, dim=(2, 3), norm="ortho")
    assert float(zero_filled.imag.abs().max()) < 1e-14
    torch.testing.assert_close(operator.pinv(operator(x)), zero_filled.real)
    torch.testing.assert_close(operator.coefficients(kspace), operator(x))
    wanted = (_dft(x, (2, 3)).abs() ** 2 * operator.mask).sum()
    torch.testing.assert_close((operator(x) ** 2).sum(), wanted)


def test_one_of_two_conjugates_is_enough_and_the_rest_has_no_say():
    half = torch.zeros(6, 16)
    half[:, 1:4] = 1
    both = half + fourier.mirrored(half, (0, 1))
    operator = room.Fourier(both[None])
    x = _normal(2, 1, 6, 16)
    kspace = torch.where(half > 0, _dft(x, (2, 3)), torch.nan)
    torch.testing.assert_close(operator.coefficients(kspace, half), operator(x))
    # where both are measured, each counts half
    spoilt = torch.zeros(1, 1, 6, 16, dtype=torch.complex128)
    spoilt[0, 0, 2, 3] = 1.0
    found = operator.coefficients(spoilt)
    assert float(found[0, 0, 2, 3]) == float(found[0, 0, -2, -3]) == 0.5


def test_white_noise_stays_white_with_its_std():
    shape = (1, 8, 8)
    noise = torch.complex(_normal(20000, *shape), _normal(20000, *shape, seed=1))
    found = fourier.from_complex(0.3 * noise, (2, 3)).flatten(1)
    covariance = found.T @ found / len(found)
    torch.testing.assert_close(covariance, 0.09 * torch.eye(64).double(), rtol=0, atol=0.005)
    one = torch.zeros(8, 8)
    one[2, 3] = 1
    single = fourier.from_complex(0.3 * noise, (2, 3), one)[:, 0]
    for place in ((2, 3), (-2, -3)):
        std = float(single[:, place[0], place[1]].std())
        assert std == pytest.approx(0.3 * math.sqrt(2), rel=0.03)


@pytest.mark.parametrize("n", [8, 15, 64, 65])
@pytest.mark.parametrize("acceleration", [1.0, 2.0, 4.0])
def test_lines_hold_low_frequencies_and_about_their_share(n, acceleration):
    operator = room.FourierLines((2, 3, n), acceleration, low=0.2, seed=2)
    lines = operator.mask[0, 0]
    assert bool((operator.mask == lines).all())
    assert operator.symmetric
    low = round((0.2 * n - 1) / 2)
    frequency = torch.fft.fftfreq(n, 1 / n).abs()
    assert bool(lines[frequency <= low].all())
    assert n / acceleration - 2 < int(lines.sum()) <= max(n / acceleration, 2 * low + 1)
    assert torch.equal(operator.mask, room.FourierLines((2, 3, n), acceleration, 0.2, seed=2).mask)


def test_lines_differ_by_seed_and_lie_along_their_axis():
    one, other = (room.FourierLines((1, 64, 4), axis=1, seed=s).mask for s in (0, 1))
    assert not torch.equal(one, other)
    assert bool((one == one[..., :1]).all())
    assert bool(one[0, 0].all())
    for axis in (0, 3, -4):
        with pytest.raises(ValueError, match="axis of lines"):
            room.FourierLines((1, 64, 4), axis=axis)
    for numbers in ({"acceleration": 0.5}, {"low": 2.0}, {"acceleration": math.nan}):
        with pytest.raises(ValueError, match="acceleration is >= 1"):
            room.FourierLines((1, 64, 4), **numbers)


@pytest.mark.parametrize(("shape", "size"), [((2, 7), (4,)), ((6,), (3,)), ((1, 5, 6), (3, 2))])
def test_a_convolution_is_its_sum(shape, size):
    kernel, x = _normal(*size), _normal(2, *shape, seed=1)
    axes = fourier.batch_axes(shape)
    wanted = torch.zeros_like(x)
    for index in torch.cartesian_prod(*(torch.arange(k) for k in size)).reshape(-1, len(size)):
        shift = [int(j) - k // 2 for j, k in zip(index, size, strict=True)]
        wanted += kernel[tuple(index)] * x.roll(shift, axes)
    torch.testing.assert_close(room.Convolution(shape, kernel)(x), wanted)


def test_motion_blur_is_a_mean_along_its_line():
    x = torch.zeros(1, 1, 15, 15, dtype=torch.float64)
    x[..., 7, 7] = 1
    flat = room.MotionBlur((1, 15, 15), 5.0)(x)[0, 0]
    torch.testing.assert_close(flat.sum(), torch.tensor(1.0).double())
    assert float(flat[7, 5:10].sum()) == pytest.approx(1.0)
    assert float(flat[7, 6:9].min()) == pytest.approx(0.25, abs=0.01)  # ends count half
    upright = room.MotionBlur((1, 15, 15), 5.0, 90.0)(x)[0, 0]
    torch.testing.assert_close(upright, flat.T)
    grid = torch.arange(15).double() - 7
    for angle in (20.0, 45.0, 110.0):
        spread = room.MotionBlur((1, 15, 15), 7.0, angle)(x)[0, 0]
        up, right = -grid[:, None], grid[None]
        moments = [float((spread * p).sum()) for p in (up * up, up * right, right * right)]
        # the main direction of the covariance is that of the line, counterclockwise
        main = math.degrees(0.5 * math.atan2(2 * moments[1], moments[2] - moments[0])) % 180
        assert main == pytest.approx(angle, abs=2)
        assert float(spread.min()) >= -1e-15
    torch.testing.assert_close(room.MotionBlur((1, 15, 15), 1.0)(x), x)


def test_a_nearly_singular_kernel_keeps_its_spectrum_orthogonal():
    kernel = torch.outer(*(2 * [torch.hann_window(9, periodic=False, dtype=torch.float64)[1:-1]]))
    operator = room.Convolution((1, 16, 16), kernel)
    x = _normal(5, 1, 16, 16)
    spectrum = operator.spectrum()
    seen = (spectrum.values > 0).double()
    c = spectrum.to(x) * seen
    torch.testing.assert_close(spectrum.measurement(c).square().sum(), c.square().sum())
    torch.testing.assert_close(spectrum.measured(spectrum.measurement(c)), c)
