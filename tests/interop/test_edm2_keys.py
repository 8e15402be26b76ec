import pytest
import torch

from scoresde.checkpoint import CheckpointError
from scoresde.interop import edm2

SETTINGS = {
    "img_resolution": 8,
    "img_channels": 3,
    "label_dim": 5,
    "use_fp16": False,
    "sigma_data": 0.5,
    "logvar_channels": 12,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "channel_mult_noise": None,
    "channel_mult_emb": None,
    "num_blocks": 1,
    "attn_resolutions": [4],
    "label_balance": 0.5,
    "concat_balance": 0.5,
    "resample_filter": [1, 1],
    "channels_per_head": 8,
    "dropout": 0.1,
    "res_balance": 0.3,
    "attn_balance": 0.3,
    "clip_act": 256,
}


def block(theirs: str, ours: str, inside: int, outside: int, flavor: str, attend: bool) -> dict:
    """Foreign name to our name and shape, written out from the layout of a block."""
    first = outside if flavor == "enc" else inside
    parts = {
        "emb_gain": ("gain", ()),
        "conv_res0.weight": ("conv0.weight", (outside, first, 3, 3)),
        "emb_linear.weight": ("modulation.weight", (outside, 16)),
        "conv_res1.weight": ("conv1.weight", (outside, outside, 3, 3)),
    }
    if inside != outside:
        parts["conv_skip.weight"] = ("skip.weight", (outside, inside, 1, 1))
    if attend:
        parts["attn_qkv.weight"] = ("qkv.weight", (3 * outside, outside, 1, 1))
        parts["attn_proj.weight"] = ("proj.weight", (outside, outside, 1, 1))
    return {f"unet.{flavor}.{theirs}.{k}": (f"{ours}.{n}", s) for k, (n, s) in parts.items()}


LAYOUT = {
    "unet.emb_fourier.freqs": ("fourier.freqs", (8,)),
    "unet.emb_fourier.phases": ("fourier.phases", (8,)),
    "unet.emb_noise.weight": ("noise.weight", (16, 8)),
    "unet.emb_label.weight": ("label.weight", (16, 5)),
    "unet.enc.8x8_conv.weight": ("stem.weight", (8, 4, 3, 3)),
    **block("8x8_block0", "encoder.8x8_block0", 8, 8, "enc", False),
    **block("4x4_down", "encoder.4x4_down", 8, 8, "enc", False),
    **block("4x4_block0", "encoder.4x4_block0", 8, 16, "enc", True),
    **block("4x4_in0", "decoder.4x4_in0", 16, 16, "dec", True),
    **block("4x4_in1", "decoder.4x4_in1", 16, 16, "dec", False),
    **block("4x4_block0", "decoder.4x4_block0", 32, 16, "dec", True),
    **block("4x4_block1", "decoder.4x4_block1", 24, 16, "dec", True),
    **block("8x8_up", "decoder.8x8_up", 16, 16, "dec", False),
    **block("8x8_block0", "decoder.8x8_block0", 24, 8, "dec", False),
    **block("8x8_block1", "decoder.8x8_block1", 16, 8, "dec", False),
    "unet.out_gain": ("out_gain", ()),
    "unet.out_conv.weight": ("out.weight", (3, 8, 3, 3)),
    "logvar_fourier.freqs": ("uncertainty_fourier.freqs", (12,)),
    "logvar_fourier.phases": ("uncertainty_fourier.phases", (12,)),
    "logvar_linear.weight": ("uncertainty.weight", (1, 12)),
}


@pytest.fixture
def state():
    """Tensors as the original pickles hold them: float16, foreign names."""
    generator = torch.Generator().manual_seed(0)
    return {k: torch.randn(s, generator=generator).half() for k, (_, s) in LAYOUT.items()}


def test_every_tensor_lands_in_its_place(state):
    net = edm2.network(SETTINGS)
    found = edm2.tensors(state)
    net.load_state_dict(found, strict=True)
    loaded = net.state_dict()
    assert set(loaded) == {ours for ours, _ in LAYOUT.values()}
    for key, (ours, _) in LAYOUT.items():
        assert found[ours].dtype == torch.float32
        assert torch.equal(loaded[ours], state[key].float()), key
    x, c = torch.randn(2, 3, 8, 8), torch.zeros(2)
    with torch.no_grad():
        out = net.eval()(x, c, torch.tensor([0, 4]))
    assert out.isfinite().all()
    assert out.std() > 0.1


def test_wider_types_stay(state):
    state["unet.out_gain"] = torch.tensor(0.1, dtype=torch.float64)
    state["unet.out_conv.weight"] = state["unet.out_conv.weight"].float()
    found = edm2.tensors(state)
    assert found["out_gain"].dtype == torch.float64
    assert found["out.weight"].dtype == torch.float32


def test_settings_become_fields():
    changed = {
        "model_channels": 12,
        "channel_mult": [1, 3],
        "channel_mult_noise": 2,
        "channel_mult_emb": 4,
        "num_blocks": 2,
        "attn_resolutions": [8],
        "label_balance": 0.1,
        "concat_balance": 0.2,
        "res_balance": 0.4,
        "attn_balance": 0.6,
        "channels_per_head": 6,
        "clip_act": None,
        "dropout": 0.2,
        "logvar_channels": 20,
        "label_dim": 0,
    }
    net = edm2.network({**SETTINGS, **changed})
    assert net.shape == (3, 8, 8)
    assert (net.width, net.multipliers, net.blocks, net.attention) == (12, (1, 3), 2, (8,))
    assert (net.noise_width, net.embedding_width, net.uncertainty_width) == (24, 48, 20)
    assert (net.label_balance, net.concat_balance) == (0.1, 0.2)
    assert (net.res_balance, net.attn_balance) == (0.4, 0.6)
    assert (net.head_dim, net.clip, net.dropout, net.num_classes) == (6, None, 0.2, None)
    assert "label.weight" not in net.state_dict()


def test_settings_left_out_are_those_of_the_paper():
    with torch.device("meta"):
        net = edm2.network({"img_resolution": 64, "img_channels": 4, "label_dim": 1000})
    assert (net.shape, net.num_classes) == ((4, 64, 64), 1000)
    assert (net.width, net.multipliers, net.blocks) == (192, (1, 2, 3, 4), 3)
    assert (net.attention, net.head_dim, net.clip) == ((16, 8), 64, 256)
    assert (net.label_balance, net.concat_balance) == (0.5, 0.5)
    assert (net.res_balance, net.attn_balance) == (0.3, 0.3)
    # 280 million parameters, as the paper says of its size S.
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(280.2e6, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"img_channels": ...}, "lack img_channels"),
        (
            {"model_chanels": 3},
            "unknown settings of an EDM2 network: model_chanels; known: .*attn",
        ),
        ({"resample_filter": [1, 3, 3, 1]}, r"must be \[1, 1\], got \[1.0, 3.0, 3.0, 1.0\]"),
        ({"resample_filter": [1, 2]}, r"must be \[1, 1\]"),
        ({"img_resolution": 7}, "multiples of 2"),
    ],
)
def test_settings_that_do_not_fit(changes, match):
    settings = {k: v for k, v in {**SETTINGS, **changes}.items() if v is not ...}
    with pytest.raises(CheckpointError, match=match):
        edm2.network(settings)


@pytest.mark.parametrize(
    "key",
    [
        "enc.8x8_conv.weight",  # the U-Net without its preconditioning
        "unet.enc.8x8_block0.conv_res2.weight",
        "unet.enc.8x8_block0.extra.gain",
        "unet.dec.8x8_conv.weight",
        "unet.map_layer0.weight",
        "unet.dec.4x4_in2.emb_gain",
    ],
)
def test_tensors_without_a_place_are_named(state, key):
    state[key] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=f"no EDM2 network has: {key}; expected"):
        edm2.tensors(state)


def test_many_tensors_without_a_place_are_counted(state):
    state.update({f"strange{i}": torch.zeros(1) for i in range(6)})
    with pytest.raises(CheckpointError, match="strange3 and 2 more"):
        edm2.tensors(state)
