import numpy as np
import pytest
import torch

from scoresde.nets.resample import Resampler

KERNELS = [(1, 1), (1, 3, 3, 1), (1, 2, 1), (1, 2, 3, 4), (1, 4, 6, 4, 1), (2, 0, 1, 5, 3, 1)]


def down(x: np.ndarray, k: np.ndarray) -> np.ndarray:
    """``y_i = sum_j k_j x_{2i - j + n//2}`` along the last axis, zeros outside."""
    n, size = len(k), x.shape[-1]
    y = np.zeros((*x.shape[:-1], size // 2))
    for i in range(size // 2):
        for j in range(n):
            place = 2 * i - j + n // 2
            if 0 <= place < size:
                y[..., i] += k[j] * x[..., place]
    return y


def up(x: np.ndarray, k: np.ndarray) -> np.ndarray:
    """``y_i = 2 sum_j k_j z_{i - j + n//2 - 1}``, ``z`` the samples with zeros between them."""
    n, size = len(k), x.shape[-1]
    z = np.zeros((*x.shape[:-1], 2 * size))
    z[..., ::2] = x
    y = np.zeros_like(z)
    for i in range(2 * size):
        for j in range(n):
            place = i - j + n // 2 - 1
            if 0 <= place < 2 * size:
                y[..., i] += 2 * k[j] * z[..., place]
    return y


@pytest.mark.parametrize("taps", KERNELS, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_filters_equal_their_sums(taps, n):
    x = torch.randn(2, 3, *(8, 6, 4)[:n], generator=torch.Generator().manual_seed(0)).double()
    resampler = Resampler(n, taps).double()
    resampler.kernel = resampler.kernel.double()
    k = np.array(taps, dtype=float) / sum(taps)
    for ours, along in ((resampler.down(x), down), (resampler.up(x), up)):
        y = x.numpy()
        for axis in range(2, n + 2):
            y = np.moveaxis(along(np.moveaxis(y, axis, -1), k), -1, axis)
        np.testing.assert_allclose(ours.numpy(), y, rtol=1e-6, atol=1e-6)


def test_plain_ones_are_mean_and_nearest():
    x = torch.arange(8.0).reshape(1, 1, 8)
    resampler = Resampler(1)
    assert resampler.down(x).flatten().tolist() == [0.5, 2.5, 4.5, 6.5]
    assert resampler.up(x[..., :2]).flatten().tolist() == [0, 0, 1, 1]


def test_the_filter_doubles_linearly_inside():
    x = torch.linspace(0, 1, 16).expand(1, 1, 16)
    y = Resampler(1, (1, 3, 3, 1)).up(x)[0, 0]
    steps = y[2:-2].diff()
    torch.testing.assert_close(steps, steps.mean().expand_as(steps))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_filtered_in_float32(dtype):
    x = torch.randn(2, 8, 16, 16)
    resampler = Resampler(2, (1, 3, 3, 1))
    for way in (resampler.down, resampler.up):
        exact = way(x.to(dtype).float())
        assert (way(x.to(dtype)).float() - exact).abs().max() < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("taps", [(1,), (1, -1), (), (1,) * 65], ids=len)
def test_what_is_no_filter_is_refused(taps):
    with pytest.raises(ValueError, match="2 to 64 taps"):
        Resampler(2, taps)
