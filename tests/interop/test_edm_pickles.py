import itertools
import math

import pytest
import torch
from karras import SONG, denoised, drawn, snapshot, song_unet, steps
from tape import distance

import scoresde as sd
from scoresde.checkpoint import CheckpointError

SIGMA = torch.tensor([0.021, 0.5, 3.3, 61.0])


def batch(given, n=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = given["img_resolution"]
    return torch.randn(n, given["img_channels"], size, size, generator=generator)


def compared(tmp_path, kind, given, sigma=SIGMA, labels=None, y=None, bound=5e-6):
    weights = drawn(kind, given)
    model = sd.load(snapshot(tmp_path / "network-snapshot-000001.pkl", weights, kind, given))
    x = batch(given, len(sigma)) * sigma[:, None, None, None]
    cond = {} if y is None else {"y": y}
    with torch.no_grad():
        found = model.denoise(x, sigma.double(), **cond)
        expected = denoised(weights, kind, given, x, sigma, labels)
        for i in range(len(sigma)):  # each has a scale of its own
            assert distance(found[i], expected[i]) < bound, f"at sigma = {sigma[i]}"
        score = model(x, sigma.double(), **cond)
        s = sigma[:, None, None, None]
        for i in range(len(sigma)):
            off = (expected[i] - x[i]) / s[i] ** 2
            assert distance(score[i], off) < 10 * bound
    assert isinstance(model.sde, sd.EDM)
    assert model.weights == "ema"
    assert model.shape == x.shape[1:]
    return model


@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1]], ids=["box", "fir"])
@pytest.mark.parametrize("decoder", ["standard", "skip"])
@pytest.mark.parametrize("encoder", ["standard", "skip", "residual"])
def test_song_networks(encoder, decoder, taps, tmp_path):
    given = {**SONG, "channel_mult": [2, 1, 2], "encoder_type": encoder, "decoder_type": decoder,
             "resample_filter": taps, "attn_resolutions": [4, 8]}  # fmt: skip
    compared(tmp_path, "EDMPrecond", given)


VARIANTS = {
    "published ncsnpp": {
        "embedding_type": "fourier", "encoder_type": "residual", "decoder_type": "standard",
        "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1], "channel_mult": [2, 2, 2],
        "augment_dim": 9,
    },
    "published ddpmpp": {
        "embedding_type": "positional", "encoder_type": "standard", "decoder_type": "standard",
        "channel_mult_noise": 1, "resample_filter": [1, 1], "channel_mult": [2, 2, 2],
        "augment_dim": 9,
    },
    "more blocks": {"num_blocks": 3, "channel_mult": [1, 1]},
    "no attention listed": {"attn_resolutions": []},
    "wider noise embedding": {"channel_mult_noise": 3},
    "one channel": {"img_channels": 1, "encoder_type": "skip", "decoder_type": "skip"},
    "large": {"img_resolution": 16, "attn_resolutions": [16, 4], "channel_mult": [1, 2, 2]},
    "one level": {"channel_mult": [1], "attn_resolutions": []},
    "six taps": {"resample_filter": [1, 5, 10, 10, 5, 1], "encoder_type": "residual"},
    "other data": {"sigma_data": 0.8},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, tmp_path):
    compared(tmp_path, "EDMPrecond", {**SONG, **VARIANTS[name]}, bound=1e-5)


@pytest.mark.parametrize("embedding", ["positional", "fourier"])
@pytest.mark.parametrize("kind", ["VPPrecond", "VEPrecond", "iDDPMPrecond", "EDMPrecond"])
def test_preconditioners(kind, embedding, tmp_path):
    compared(tmp_path, kind, {**SONG, "embedding_type": embedding})


def test_coefficients_that_are_given(tmp_path):
    compared(tmp_path, "VPPrecond", {**SONG, "beta_d": 12.0, "beta_min": 0.3})
    compared(tmp_path, "EDMPrecond", {**SONG, "sigma_data": 1.0})


def test_the_nearest_step_of_iddpm(tmp_path):
    """Labels jump in the middle between two levels; both sides of some are tried."""
    u = steps()
    assert math.isclose(u[999], 0.0064223, rel_tol=1e-4)
    assert math.isclose(u[0], 20291.17, rel_tol=1e-4)
    middles = (u[[300, 700, 950]] + u[[301, 701, 951]]) / 2
    sigma = torch.cat([u[[200, 640, 999]], middles * 1.001, middles * 0.999, u[:1]])
    model = compared(tmp_path, "iDDPMPrecond", SONG, sigma=sigma)
    assert isinstance(model.parameterization.label, sd.noise_labels.NearestStep)


@pytest.mark.parametrize("kind", ["EDMPrecond", "VEPrecond", "iDDPMPrecond"])
def test_classes(kind, tmp_path):
    given = {**SONG, "label_dim": 5}
    index = torch.tensor([3, 0, 4, 1])
    onehot = torch.nn.functional.one_hot(index, 5).float()
    compared(tmp_path, kind, given, labels=onehot, y=onehot)
    compared(tmp_path, kind, given, labels=onehot, y=index)
    compared(tmp_path, kind, given)  # zeros, and the bias still acts
    soft = torch.full((4, 5), 0.2)
    model = compared(tmp_path, kind, given, labels=soft, y=soft)
    x = batch(given)
    with torch.no_grad():
        apart = distance(model.denoise(x, 3.0, y=index), model.denoise(x, 3.0))
    assert apart > 1e-3  # or the classes would not have mattered


def test_augmentation_labels_are_for_training(tmp_path):
    given = {**SONG, "augment_dim": 9, "label_dim": 3, "out_channels": 3}
    weights = drawn("EDMPrecond", given)
    del given["out_channels"]
    file = snapshot(tmp_path / "n.pkl", weights, "EDMPrecond", given)
    model = sd.load(file)
    x, label, augment = batch(given), torch.linspace(-1, 1, 4), torch.randn(4, 9)
    onehot = torch.eye(3)[[0, 2, 1, 1]]
    given["out_channels"] = 3
    with torch.no_grad():
        plain = model.net(x, label, onehot)
        led = model.net(x, label, onehot, augment=augment)
    assert distance(plain, song_unet(weights, given, x, label, onehot)) < 4e-6
    assert distance(led, song_unet(weights, given, x, label, onehot, augment)) < 4e-6


def test_what_was_read_is_saved_and_read_again(tmp_path):
    for i, (kind, fields) in enumerate(itertools.product(
        ("VPPrecond", "VEPrecond", "iDDPMPrecond", "EDMPrecond"),
        ({}, {"label_dim": 3, "encoder_type": "residual", "resample_filter": [1, 3, 3, 1]}),
    )):  # fmt: skip
        given = {**SONG, **fields}
        model = sd.load(snapshot(tmp_path / "n.pkl", drawn(kind, given), kind, given))
        model.save(tmp_path / str(i))
        again = sd.load(tmp_path / str(i))
        x = batch(given)
        with torch.no_grad():
            assert torch.equal(again.denoise(x, 0.7), model.denoise(x, 0.7))


def test_a_network_without_a_preconditioner_or_of_defaults(tmp_path):
    """Only what was passed is stored: the rest is the original's default."""
    given = {"img_resolution": 8, "img_channels": 3, "model_type": "SongUNet",
             "model_channels": 4, "attn_resolutions": [4]}  # fmt: skip
    model = compared(tmp_path, "EDMPrecond", given)
    assert (model.net.blocks, model.net.multipliers) == (4, (1, 2, 2, 2))


# Errors


def refused(path, pattern, **options):
    with pytest.raises(CheckpointError, match=pattern) as caught:
        sd.load(path, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_raw_weights_are_not_in_the_file(tmp_path):
    file = snapshot(tmp_path / "n.pkl", drawn("EDMPrecond", SONG), "EDMPrecond", SONG)
    refused(file, "raw|ema|average", weights="raw")


def test_levels_that_are_not_those_of_iddpm(tmp_path):
    weights = drawn("iDDPMPrecond", SONG)
    weights["u"] = weights["u"] * 1.01
    refused(snapshot(tmp_path / "n.pkl", weights, "iDDPMPrecond", SONG), r"\bu\b")
    weights["u"] = steps()[1:]
    refused(snapshot(tmp_path / "n.pkl", weights, "iDDPMPrecond", SONG), r"\bu\b")


@pytest.mark.parametrize(
    ("kind", "fields", "pattern"),
    [
        ("FooPrecond", {}, "FooPrecond.*EDMPrecond"),
        ("EDMPrecond", {"model_type": "BarUNet"}, "BarUNet.*SongUNet"),
        ("EDMPrecond", {"embedding_type": "waves"}, "embedding_type.*waves"),
        ("EDMPrecond", {"encoder_type": "wide"}, "encoder_type.*wide"),
        ("EDMPrecond", {"decoder_type": "residual"}, "decoder_type.*residual"),
        ("EDMPrecond", {"img_resolution": None}, "img_resolution"),
        ("EDMPrecond", {"img_channels": "three"}, "img_channels"),
        ("EDMPrecond", {"model_channels": 0}, "model_channels|width"),
        ("EDMPrecond", {"model_channels": 12}, "does not fit"),
        ("EDMPrecond", {"channel_mult": []}, "channel_mult|multipliers"),
        ("EDMPrecond", {"channel_mult": 2}, "channel_mult"),
        ("EDMPrecond", {"channel_mult": [1, 2, 2]}, "does not fit"),
        ("EDMPrecond", {"num_blocks": "two"}, "num_blocks|two"),
        ("EDMPrecond", {"num_blocks": 2}, "does not fit"),
        ("EDMPrecond", {"attn_resolutions": [8]}, "does not fit"),
        ("EDMPrecond", {"attn_resolutions": 8}, "attn_resolutions"),
        ("EDMPrecond", {"encoder_type": "residual"}, "does not fit"),
        ("EDMPrecond", {"label_dim": 7}, "does not fit"),
        ("EDMPrecond", {"augment_dim": 9}, "does not fit"),
        ("EDMPrecond", {"resample_filter": [1, 2, 1]}, "resample_filter"),
        ("EDMPrecond", {"channel_mult_emb": 2}, "channel_mult_emb is 2.*accepted: 4"),
        ("EDMPrecond", {"resample_filter": []}, "resample_filter"),
        ("EDMPrecond", {"sigma_data": -1.0}, "sigma_data"),
        ("EDMPrecond", {"sigma_data": "half"}, "sigma_data"),
        ("VPPrecond", {"beta_min": -1.0}, "beta_min"),
        ("iDDPMPrecond", {"M": 500}, r"\bu\b|\bM\b"),
    ],
    ids=str,
)
def test_arguments_that_are_no_option_or_do_not_fit(kind, fields, pattern, tmp_path):
    held = kind if kind in ("VPPrecond", "iDDPMPrecond") else "EDMPrecond"
    weights = drawn(held, SONG)
    given = {**SONG, **fields}
    refused(snapshot(tmp_path / "n.pkl", weights, kind, given), pattern)


@pytest.mark.parametrize("name", ["img_resolution", "img_channels"])
def test_arguments_that_are_missing(name, tmp_path):
    given = {k: v for k, v in SONG.items() if k != name}
    refused(snapshot(tmp_path / "n.pkl", drawn("EDMPrecond", SONG), "EDMPrecond", given), name)


def test_contents_that_are_no_network(tmp_path):
    weights = drawn("EDMPrecond", SONG)
    file = snapshot(tmp_path / "n.pkl", weights, "EDMPrecond", SONG, ema=None)
    refused(file, "ema|network|known")
    file = snapshot(tmp_path / "n.pkl", weights, "EDMPrecond", SONG, ema={"a": 1})
    refused(file, "ema|network|known")
    fewer = {k: v for k, v in weights.items() if k != "model.dec.8x8_block0.conv1.bias"}
    refused(snapshot(tmp_path / "n.pkl", fewer, "EDMPrecond", SONG), "does not fit")
    more = {**weights, "model.dec.8x8_block0.extra.weight": torch.ones(2)}
    refused(snapshot(tmp_path / "n.pkl", more, "EDMPrecond", SONG), "extra")
    odd = {**weights, "model.map_layer0.bias": torch.ones(3)}
    refused(snapshot(tmp_path / "n.pkl", odd, "EDMPrecond", SONG), r"\(3,\)")
