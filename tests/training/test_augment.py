"""Augmentation: each change against a closed form on a smooth image, its odds and its labels."""

import math

import numpy as np
import pytest
import torch

from scoresde import nets
from scoresde.config import ConfigError, build
from scoresde.noise import KeyedNoise
from scoresde.training import augment, warp
from scoresde.training.step_noise import StepNoise

OFF = {
    "x_flip": False, "y_flip": False, "scale": 1.0, "rotation": 0.0, "anisotropy": 1.0,
    "translation": 0.0,
}  # fmt: skip
CHANGES = list(OFF)
S = 2**0.2
BILINEAR = 0.006
"""Largest error of samples h = 1/2 apart at the blob's top: h^2/8 times its curvature, 0.185."""


class Given:
    """Noise whose numbers are the given ones, the same for every item."""

    def __init__(self, uniform, normal):
        self.numbers = {"uniform": uniform, "normal": normal}

    def _rows(self, name, shape):
        row = torch.tensor(self.numbers[name], dtype=torch.float64)
        assert row.shape == shape[1:]
        return row.expand(shape)

    def uniform(self, shape, device=None, dtype=None):
        return self._rows("uniform", shape)

    def normal(self, shape, device=None, dtype=None):
        return self._rows("normal", shape)


def given(a0=0, a1=0, a2=0.0, a3=0.0, a4=0.0, a5=0.0, a6=0.0, a7=0.0, gates=0.0):
    """Noise that makes these variables, if their changes are drawn."""
    u = [0.25 if a0 else 0.75, 0.25 if a1 else 0.75]
    u += [(angle / math.pi + 1) / 2 for angle in (a3, a4)]
    return Given(u + [gates] * 5, [a2, a5, a6, a7])


def only(name, p=1.0):
    """The pipeline with one change."""
    return augment.EDM(p=p, **{k: v for k, v in OFF.items() if k != name})


def blob(places, mean=(3.0, -2.0), cov=((16.0, 3.0), (3.0, 9.0))):
    """A Gaussian of height 1 at places ``(..., 2)``, right and down from the centre, in pixels."""
    d = places - np.array(mean)
    return np.exp(-0.5 * np.einsum("...i,ij,...j->...", d, np.linalg.inv(np.array(cov)), d))


def places(height, width):
    down, right = np.meshgrid(
        np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2, indexing="ij"
    )
    return np.stack([right, down], -1)


def mirrored(where, height=56, width=64):
    """Places brought back into the frame by mirrors at the centres of its outermost pixels."""
    half = np.array([width - 1, height - 1]) / 2
    return np.arcsin(np.sin(where / half * math.pi / 2)) / math.pi * 2 * half


def picture(height=56, width=64):
    """One channel of a blob well inside the frame, ``(1, 1, H, W)``, float64."""
    return torch.from_numpy(blob(places(height, width)))[None, None]


def turn(angle):
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


# Each change alone: the numbers drawn, the map of the plane (by hand), and the nine labels.
ALONE = {
    "x_flip": ({"a0": 1}, np.diag([-1.0, 1.0]), (0, 0), {0: 1.0}),
    "y_flip": ({"a1": 1}, np.diag([1.0, -1.0]), (0, 0), {1: 1.0}),
    "scale": ({"a2": 1.5}, np.eye(2) * 2**0.3, (0, 0), {2: 1.5}),
    # A quarter turn against the clock: what was right of the centre is above it.
    "rotation": ({"a3": math.pi / 2}, np.array([[0.0, 1], [-1, 0]]), (0, 0), {3: -1.0, 4: 1.0}),
    "anisotropy": (
        {"a4": math.pi / 4, "a5": 1.0},
        # Twice 2^0.2 along the diagonal, once its inverse across: ((c, s), (s, c)).
        np.array([[S + 1 / S, S - 1 / S], [S - 1 / S, S + 1 / S]]) / 2,
        (0, 0),
        {5: math.sqrt(0.5), 6: math.sqrt(0.5)},
    ),
    "translation": ({"a6": 0.5, "a7": -1.0}, np.eye(2), (4.0, -7.0), {7: 0.5, 8: -1.0}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_moves_a_blob_as_its_map_says(name):
    numbers, linear, shift, labels = ALONE[name]
    x, cond = only(name)(picture(), given(**numbers))
    back = (places(56, 64) - np.array(shift)) @ np.linalg.inv(linear).T
    assert np.abs(x[0, 0].numpy() - blob(mirrored(back))).max() < BILINEAR
    expected = torch.zeros(1, 9, dtype=torch.float64)
    for index, value in labels.items():
        expected[0, index] = value
    assert torch.allclose(cond["augment"], expected, atol=1e-12)


@pytest.mark.parametrize("name", CHANGES)
def test_where_the_centre_and_the_axes_of_a_blob_go(name):
    """Moments: the mean to ``M mean + shift``, the covariance to ``M cov M^T``."""
    numbers, linear, shift, _ = ALONE[name]
    x = only(name)(picture(), given(**numbers))[0][0, 0].numpy()
    weight = x / x.sum()
    where = places(56, 64)
    mean = np.einsum("hw,hwi->i", weight, where)
    cov = np.einsum("hw,hwi,hwj->ij", weight, where - mean, where - mean)
    first = blob(where) / blob(where).sum()
    old = np.einsum("hw,hwi->i", first, where)
    spread = np.einsum("hw,hwi,hwj->ij", first, where - old, where - old)
    assert mean == pytest.approx(linear @ old + np.array(shift), abs=0.01)
    # The filter adds next to nothing: a Gaussian's variance grows by less than a hundredth.
    assert cov == pytest.approx(linear @ spread @ linear.T, abs=0.1)


def test_all_changes_at_once_in_the_order_of_the_paper():
    a = {"a0": 1, "a1": 1, "a2": -0.7, "a3": 0.9, "a4": -1.3, "a5": 0.8, "a6": 0.3, "a7": -0.4}
    x, cond = augment.EDM(p=1)(picture(), given(**a))
    anisotropy = turn(-1.3) @ np.diag([S**0.8, S**-0.8]) @ turn(1.3)
    linear = anisotropy @ turn(-0.9) @ np.eye(2) * S**-0.7 @ np.diag([-1.0, -1.0])
    shift = np.array([64 / 8 * 0.3, 56 / 8 * -0.4])
    back = (places(56, 64) - shift) @ np.linalg.inv(linear).T
    assert np.abs(x[0, 0].numpy() - blob(mirrored(back))).max() < BILINEAR
    expected = [1, 1, -0.7, math.cos(0.9) - 1, math.sin(0.9),
                0.8 * math.cos(-1.3), 0.8 * math.sin(-1.3), 0.3, -0.4]  # fmt: skip
    assert cond["augment"][0].tolist() == pytest.approx(expected, abs=1e-12)


def test_what_is_beyond_the_frame_is_mirrored():
    """A ramp shifted right by five: the new pixels mirror at the centre of the first."""
    ramp = torch.arange(40, dtype=torch.float64).expand(1, 1, 40, 40)
    x, _ = only("translation")(ramp, given(a6=1.0))
    assert torch.allclose(x[0, 0, :, 12:], ramp[0, 0, :, 7:35], atol=1e-3)
    assert torch.allclose(x[0, 0, :, 0], torch.full((40,), 5.0, dtype=torch.float64), atol=1e-3)


def test_shrinking_does_not_alias():
    """A wave above half the new resolution vanishes, one below it stays."""
    where = torch.arange(64, dtype=torch.float64)
    for period, left in ((2.4, 0.05), (8.0, None)):
        wave = torch.cos(2 * math.pi * where / period).expand(1, 1, 64, 64)
        x, _ = only("scale")(wave, given(a2=-4.0))  # by 2^-0.8: periods 1.4 and 4.6 pixels
        power = x[0, 0, 16:48, 16:48].square().mean()
        assert power < left if left else power > 0.4


# -- what is exact ---------------------------------------------------------------------------


def test_no_change_returns_the_image_bit_for_bit_with_labels_of_zero():
    x = torch.rand(5, 3, 32, 32)
    out, cond = augment.EDM()(x, given(a2=1, a3=1, a4=1, a5=1, a6=1, a7=1, gates=0.5))
    assert torch.equal(out, x)
    assert torch.equal(cond["augment"], torch.zeros(5, 9))


@pytest.mark.parametrize(("a0", "a1", "axes"), [(1, 0, (3,)), (0, 1, (2,)), (1, 1, (2, 3))])
def test_flips_are_permutations(a0, a1, axes):
    x = torch.rand(2, 3, 16, 20)
    noise = given(a0=a0, a1=a1)
    out, _ = augment.EDM(p=1, scale=1, rotation=0, anisotropy=1, translation=0)(x, noise)
    assert torch.equal(out, x.flip(axes))


def test_turned_off_changes_are_off_in_image_and_labels():
    x = torch.rand(3, 1, 8, 8)
    noise = given(a0=1, a1=1, a2=2, a3=2, a4=2, a5=2, a6=2, a7=2)
    out, cond = augment.EDM(p=1, **OFF)(x, noise)
    assert torch.equal(out, x)
    assert not cond["augment"].any()


@pytest.mark.parametrize("name", CHANGES)
def test_leaving_out_a_change_leaves_the_others(name):
    x = torch.rand(20, 1, 8, 8)
    whole = augment.EDM(p=1)(x, KeyedNoise(0))[1]["augment"]
    parts = augment.EDM(p=1, **{name: OFF[name]})(x, KeyedNoise(0))[1]["augment"]
    own = {"x_flip": [0], "y_flip": [1], "scale": [2], "rotation": [3, 4], "anisotropy": [5, 6],
           "translation": [7, 8]}[name]  # fmt: skip
    others = [i for i in range(9) if i not in own]
    assert torch.equal(whole[:, others], parts[:, others])
    assert whole[:, own].any()
    assert not parts[:, own].any()


def test_float64_agrees_with_float32():
    x = torch.rand(16, 3, 32, 32, dtype=torch.float64)
    wide, labels = augment.EDM(p=0.7)(x, KeyedNoise(1))
    narrow, found = augment.EDM(p=0.7)(x.float(), KeyedNoise(1))
    assert (wide.dtype, narrow.dtype, found["augment"].dtype) == (
        torch.float64, torch.float32, torch.float32,
    )  # fmt: skip
    assert torch.allclose(wide, narrow.double(), atol=3e-5)
    assert torch.allclose(labels["augment"], found["augment"].double(), atol=1e-6)


@pytest.mark.parametrize("change", [augment.EDM(p=0.7), augment.Flip()], ids=["edm", "flip"])
def test_an_item_alone_is_the_same_as_in_a_batch(change):
    x = torch.rand(37, 3, 16, 16)
    whole, cond = change(x, StepNoise(3, 7, 0, 37))
    for i in (0, 16, 36):
        one, label = change(x[i : i + 1], StepNoise(3, 7, i, 37))
        assert torch.allclose(one, whole[i : i + 1], atol=1e-6)
        for key in cond:
            assert torch.equal(label[key], cond[key][i : i + 1])


# -- odds and laws ---------------------------------------------------------------------------


def labels_of(change, n=20000, seed=0):
    return change(torch.zeros(n, 1, 2, 2), KeyedNoise(seed))[1]["augment"].double()


def close(rate, expected, n=20000):
    """Within five standard errors of a share."""
    return abs(float(rate) - expected) < 5 * math.sqrt(expected * (1 - expected) / n)


@pytest.mark.parametrize("p", [0.12, 0.5])
def test_odds(p):
    labels = labels_of(augment.EDM(p=p))
    there = labels != 0
    assert close(there[:, 0].double().mean(), 0.5)
    assert close(there[:, 1].double().mean(), p / 2)
    for first, last in ((2, 2), (3, 4), (5, 6), (7, 8)):
        assert close(there[:, last].double().mean(), p)
        # Of a rotation by less than 2e-4 the cosine is 1 in float32.
        assert (there[:, first] != there[:, last]).double().mean() < 1e-3
    # Independent of each other, the x-flip's neighbour included.
    groups = there[:, [0, 1, 2, 4, 6, 8]].double()
    correlation = torch.corrcoef(groups.T) - torch.eye(6)
    assert correlation.abs().max() < 5 / math.sqrt(20000)


def test_laws_of_the_numbers():
    labels = labels_of(augment.EDM(p=1))
    for values in (labels[:, 2], labels[:, 7], labels[:, 8], labels[:, 5:7].norm(dim=1)):
        assert float(values.square().mean()) == pytest.approx(1, abs=0.06)
    angle = torch.atan2(labels[:, 4], labels[:, 3] + 1)
    u = (angle / math.pi + 1).div(2).sort().values
    ideal = (torch.arange(20000) + 0.5) / 20000
    assert (u - ideal).abs().max() < 1.95 / math.sqrt(20000)  # Kolmogorov-Smirnov at 0.001
    assert torch.allclose((labels[:, 3] + 1) ** 2 + labels[:, 4] ** 2, torch.ones(20000).double())
    assert labels[:, [2, 7, 8]].mean(0).abs().max() < 5 / math.sqrt(20000)


def test_a_smaller_rotation_stays_within_its_angle():
    labels = labels_of(augment.EDM(p=1, rotation=0.1))
    angle = torch.atan2(labels[:, 4], labels[:, 3] + 1).abs().max()
    assert 0.99 * 0.1 * math.pi < angle <= 0.1 * math.pi + 1e-6


@pytest.mark.parametrize("shape", [(3, 8), (3, 4, 6), (2, 3, 4, 5)])
def test_flip_reverses_the_last_axis_of_half_the_items(shape):
    x = torch.rand(4000, *shape)
    out, cond = augment.Flip()(x, KeyedNoise(0))
    assert cond == {}
    same = (out == x).flatten(1).all(1)
    turned = (out == x.flip(-1)).flatten(1).all(1)
    assert (same ^ turned).all()
    assert close(turned.double().mean(), 0.5, 4000)


# -- configuration ---------------------------------------------------------------------------


def test_names_and_fields():
    assert build("flip", augment, "augment") == augment.Flip()
    assert build({"name": "edm", "p": 0.2}, augment, "augment") == augment.EDM(p=0.2)
    for wrong in ({"p": 1.5}, {"scale": 0.9}, {"rotation": 2}, {"translation": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            build({"name": "edm", **wrong}, augment, "augment")
    with pytest.raises(ConfigError, match="accepted: edm, flip"):
        build("mirror", augment, "augment")


def net(augment_labels):
    return nets.NCSNpp((1, 8, 8), width=8, multipliers=(1,), blocks=1, augment=augment_labels)


@pytest.mark.parametrize(
    ("change", "network", "shape", "said"),
    [
        (augment.EDM(), None, (2,), r"'edm' takes images \(C, H, W\), not items of shape \(2,\)"),
        (augment.EDM(), None, (1, 8, 8, 8), "takes images"),
        (augment.EDM(), None, (1, 8, 1), "takes images"),
        (augment.EDM(), net(0), (1, 8, 8), "net.augment is 0; set net.augment=9"),
        (augment.EDM(), object(), (1, 8, 8), "set net.augment=9, which ncsnpp and adm have"),
        (augment.EDM(), net(6), (1, 8, 8), "tells the network 9 labels, but net.augment is 6"),
        (augment.Flip(), net(0), (2,), "'flip' takes images and signals"),
        (augment.Flip(), net(9), (1, 8, 8), "net.augment is 9, but .* no labels"),
        (None, net(9), (1, 8, 8), "net.augment is 9, but .* no labels"),
    ],
)
def test_what_does_not_fit_is_refused(change, network, shape, said):
    with pytest.raises(ConfigError, match=said):
        augment.check(change, network, shape)


def test_what_fits_is_accepted_and_the_network_takes_the_labels():
    augment.check(None, object(), (2,))
    augment.check(augment.Flip(), object(), (3, 8))
    network = net(9)
    augment.check(augment.EDM(), network, (1, 8, 8))
    x, cond = augment.EDM()(torch.rand(2, 1, 8, 8), KeyedNoise(0))
    assert network(x, torch.zeros(2), **cond).shape == x.shape


def test_small_images_are_taken():
    x, _ = augment.EDM(p=1)(torch.rand(4, 1, 2, 3), KeyedNoise(0))
    assert x.shape == (4, 1, 2, 3)
    assert x.isfinite().all()


def test_the_filters_keep_a_constant():
    x = warp.warp(torch.full((2, 1, 5, 9), 0.7).double(),
                  torch.tensor([[1.3, 0.2], [-0.1, 0.8]]).double().expand(2, 2, 2),
                  torch.tensor([[100.0, -3.3], [0.5, 0.5]]).double())  # fmt: skip
    assert torch.allclose(x, torch.full_like(x, 0.7), atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_no_wait_for_a_device():
    x = torch.rand(8, 3, 32, 32, device="cuda")
    change = augment.EDM()
    change(x, StepNoise(0, 0, 0, 8, "cuda"))  # the filters are made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, cond = change(x, StepNoise(0, 1, 0, 8, "cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.device == cond["augment"].device == x.device
