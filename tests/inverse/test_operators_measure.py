"""Measurements and their likelihood; what is refused, in one line."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal

from scoresde import config
from scoresde.inverse import operators as room


def _normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = torch.tensor([[1, 0, 1], [0, 0, 1]])


def test_noise_is_on_measured_entries_alone_with_its_std():
    x, noise = _normal(2, 2, 3), _normal(2, 2, 3, seed=1)
    mask = room.Mask(MASK)
    y = mask.measure(x, torch.tensor([0.5, 2.0]).reshape(2, 1, 1), noise)
    scale = torch.tensor([0.5, 2.0]).double().reshape(2, 1, 1)
    torch.testing.assert_close(y, MASK * (x + scale * noise))
    fourier = room.Fourier(MASK)
    y = fourier.measure(x, 0.5, noise)
    torch.testing.assert_close(y, fourier(x) + 0.5 * MASK * noise)
    pool = room.AveragePool((1, 4), 2)
    assert torch.equal(pool.measure(torch.ones(1, 1, 4)), torch.ones(1, 1, 2))


def test_drawn_noise_is_standard_and_keyed_by_seed_and_sample():
    pool = room.AveragePool((1, 64, 64), 2)
    x = torch.zeros(4, 1, 64, 64)
    y = pool.measure(x, 0.3, seed=7)
    assert float(y.std()) == pytest.approx(0.3, rel=0.05)
    assert torch.equal(y[:2], pool.measure(x[:2], 0.3, seed=7))
    assert not torch.equal(y, pool.measure(x, 0.3, seed=8))


@pytest.mark.parametrize("operator", [room.Mask(MASK), room.Fourier(MASK)])
def test_likelihood_is_a_gaussian_of_what_is_measured(operator):
    y, mean = _normal(3, 2, 3), _normal(3, 2, 3, seed=1)
    std = torch.tensor([0.1, 1.0, 3.0]).double()
    wanted = Normal(mean[:, MASK > 0], std[:, None]).log_prob(y[:, MASK > 0]).sum(1)
    ones = std.reshape(3, 1, 1)
    assert operator.count == 3
    torch.testing.assert_close(operator.log_likelihood(y, mean, ones), wanted)
    one = operator.log_likelihood(y[:1], mean, 1.0)
    assert one.shape == (3,)
    torch.testing.assert_close(one[1], Normal(mean[1], 1.0).log_prob(y[0])[MASK > 0].sum())


def test_likelihood_of_a_whole_measurement():
    pool = room.AveragePool((2, 4), 2)
    y, mean = _normal(3, 2, 2), _normal(3, 2, 2, seed=1)
    wanted = Normal(mean, 0.4).log_prob(y).flatten(1).sum(1)
    torch.testing.assert_close(pool.log_likelihood(y, mean, 0.4), wanted)


def test_what_is_not_measured_has_no_say_whatever_it_holds():
    mask = room.Mask(MASK)
    y = _normal(1, 2, 3)
    spoilt = torch.where(MASK > 0, y, torch.nan)
    for function in (mask, mask.adjoint, mask.pinv, mask.spectrum().measured):
        assert torch.equal(function(spoilt), MASK * y)
    assert bool(mask.log_likelihood(spoilt, torch.zeros_like(y), 1.0).isfinite())


def test_pooling_and_bicubic_are_those_of_torch():
    x = _normal(2, 3, 24, 12)
    pool, bicubic = room.AveragePool((3, 24, 12), 4), room.Bicubic((3, 24, 12), 3)
    torch.testing.assert_close(pool(x), F.avg_pool2d(x, 4))
    small = F.interpolate(x, (8, 4), mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(bicubic(x), small)
    torch.testing.assert_close(room.AveragePool((3, 24), 2)(x[..., 0]), F.avg_pool1d(x[..., 0], 2))
    cube = _normal(2, 1, 4, 4, 8)
    torch.testing.assert_close(room.AveragePool((1, 4, 4, 8), 2)(cube), F.avg_pool3d(cube, 2))


def test_a_sharper_bicubic_kernel_is_keys_with_its_own_a():
    plain = F.interpolate(_normal(1, 1, 8, 8), scale_factor=1.0, mode="bicubic")
    torch.testing.assert_close(room.Bicubic((1, 8, 8), 1, -0.75)(_normal(1, 1, 8, 8)), plain)
    # torch's without antialiasing has a = -0.75: at a quarter of a pixel its four weights are
    shifted = torch.zeros(1, 1, 1, 8, dtype=torch.float64)
    shifted[..., 4] = 1.0
    up = F.interpolate(shifted, (1, 16), mode="bicubic", align_corners=False)[0, 0, 0]
    inner = room.Bicubic((16,), 2, -0.75)._weights(16)[4]  # of u = distance / 2
    torch.testing.assert_close(inner[5:13] * 2, up[5:13])


def test_blur_is_a_truncated_gaussian_with_its_boundary():
    ndimage = pytest.importorskip("scipy.ndimage")
    x = _normal(1, 2, 9, 7)
    for std in (0.6, 1.3, 4.0):
        for ours, theirs in (("reflect", "reflect"), ("zeros", "constant"), ("circular", "wrap")):
            found = room.Blur((2, 9, 7), std, ours)(x)[0]
            wanted = ndimage.gaussian_filter(x[0].numpy(), std, mode=theirs, axes=(1, 2))
            torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=1e-6, atol=1e-8)


def test_luma_and_equal_weights():
    x = _normal(2, 3, 4, 4)
    luma = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
    torch.testing.assert_close(room.Grayscale((3, 4, 4))(x), luma)
    torch.testing.assert_close(room.Grayscale((3, 4, 4), "equal")(x), x.mean(1, keepdim=True))
    found = room.Grayscale((3, 4, 4), (0.0, 2.0, 0.0))(x)
    torch.testing.assert_close(found, 2 * x[:, 1:2])


def test_projections_are_orthonormal_or_of_unit_mean_square_by_seed():
    shape = (2, 5, 5)
    matrix = room.RandomProjection(shape, 20, seed=3).dense()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(20).double())
    assert torch.equal(matrix, room.RandomProjection(shape, 20, seed=3).dense())
    assert not torch.equal(matrix, room.RandomProjection(shape, 20, seed=4).dense())
    assert room.RandomProjection(shape, 20).count == 20
    gaussian = room.RandomProjection((40, 40), 60, orthonormal=False).dense()
    assert float(gaussian.var()) == pytest.approx(1 / 60, rel=0.02)


REFUSED = {
    "columns": (lambda: room.Linear(torch.ones(2, 3), (4,)), "3 columns"),
    "no matrix": (lambda: room.Linear(torch.ones(3)), "(M, D)"),
    "not finite": (lambda: room.Linear(torch.tensor([[torch.nan]])), "finite"),
    "mask values": (lambda: room.Mask(torch.tensor([0.5, 1.0])), "1 where"),
    "mask shape": (lambda: room.Mask(torch.ones(2, 3), (3, 3)), "(2, 3) does not fit"),
    "nothing known": (lambda: room.Mask(torch.zeros(3)), "zeros alone"),
    "pool": (lambda: room.AveragePool((3, 10, 8), 4), "(3, 10, 8)"),
    "pool of 0": (lambda: room.AveragePool((3, 8, 8), 0), "got 0"),
    "bicubic": (lambda: room.Bicubic((3, 8, 9), 4), "(3, 8, 9)"),
    "shape": (lambda: room.AveragePool("abc", 1), "shape of an item"),
    "no size": (lambda: room.Blur((3, 0)), "shape of an item"),
    "std": (lambda: room.Blur((3, 8), -1.0), "> 0"),
    "boundary": (lambda: room.Blur((3, 8), 1.0, "wrap"), "'wrap'"),
    "luma": (lambda: room.Grayscale((1, 8, 8)), "(1, 8, 8)"),
    "weights": (lambda: room.Grayscale((3, 8), (1.0, 2.0)), "one number a channel"),
    "zero weights": (lambda: room.Grayscale((2, 8), (0.0, 0.0)), "one number a channel"),
    "channels": (lambda: room.Channels((3, 8), torch.ones(2, 2)), "(C', 3)"),
    "directions": (lambda: room.RandomProjection((3, 2), 7), "1 to 6"),
    "no directions": (lambda: room.RandomProjection((3, 2), 0), "got 0"),
    "kernel axes": (lambda: room.Convolution((3, 8, 8), torch.ones(3)), "(3,)"),
    "kernel size": (lambda: room.Convolution((3, 8), torch.ones(9)), "no larger"),
    "zero kernel": (lambda: room.Convolution((3, 8), torch.zeros(3)), "not zero"),
    "motion axes": (lambda: room.MotionBlur((3, 8)), "pictures"),
    "motion length": (lambda: room.MotionBlur((3, 8, 8), 7.5), "[1, 7]"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_a_bad_operator_is_refused_in_one_line(case):
    make, said = REFUSED[case]
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "operator",
    [
        room.Linear(torch.ones(2, 6), (2, 3)),
        room.Mask(MASK),
        room.AveragePool((2, 4), 2),
        room.Fourier(MASK),
        room.Convolution((2, 3), torch.ones(2)),
    ],
)
def test_items_and_measurements_of_another_shape_are_refused(operator):
    for function in (operator, operator.spectrum().to):
        with pytest.raises(ValueError, match=r"items of .* have the shape"):
            function(torch.ones(2, 7, 7))
    for function in (
        operator.adjoint,
        operator.pinv,
        lambda y: operator.solve(y, 1.0, 1.0),
        lambda y: operator.log_likelihood(y, y, 1.0),
    ):
        with pytest.raises(ValueError, match=r"measurements of .* have the shape"):
            function(torch.ones(2, 7, 7))


NAMES = {
    "average-pool": {"factor": 8},
    "bicubic": {"factor": 2, "a": -0.75},
    "blur": {"std": 3, "boundary": "zeros"},
    "grayscale": {"weights": [0.5, 0.25, 0.25]},
    "fourier-lines": {"acceleration": 8, "seed": 3},
    "motion-blur": {"length": 5, "angle": 45},
    "random-projection": {"count": 7},
    "half": {"side": "bottom"},
    "middle-box": {"side": 0.25},
    "outpaint": {},
    "random-pixels": {"share": 0.1},
    "stripes": {"period": 4, "width": 1},
    "strokes": {"seed": 5},
}


@pytest.mark.parametrize("name", list(NAMES))
def test_operators_are_built_from_their_names(name):
    section = {"name": name, **NAMES[name]}
    operator = config.build(section, room, "operator", shape=(3, 16, 16))
    assert config.kebab(type(operator)) == name
    assert operator.shape == (3, 16, 16)
    for key, value in NAMES[name].items():
        wanted = tuple(value) if isinstance(value, list) else value
        assert getattr(operator, key) == wanted
    assert operator.adjointness() < 1e-12


def test_masks_and_matrices_take_the_shape_too():
    mask = config.build({"name": "mask", "mask": MASK}, room, "operator", shape=(5, 2, 3))
    assert mask.count == 15
    with pytest.raises(config.ConfigError, match="operator: the factor of average pooling"):
        config.build({"name": "average-pool", "factor": 5}, room, "operator", shape=(3, 16, 16))
    with pytest.raises(config.ConfigError, match="did you mean 'bicubic'"):
        config.build("bicubics", room, "operator", shape=(3, 16, 16))


def test_whole_numbers_are_refused():
    # In their dtype the weights of a mean would be zeros.
    pool = room.AveragePool((1, 4, 4), 2)
    pixels = torch.randint(0, 255, (2, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    for x in (pixels, pixels.byte(), pixels > 100):
        with pytest.raises(
            ValueError, match=r"items of AveragePool are floating-point .* got torch"
        ):
            pool(x)
    with pytest.raises(ValueError, match=r"measurements of AveragePool are floating-point"):
        pool.adjoint(pixels[:, :, :2, :2])
