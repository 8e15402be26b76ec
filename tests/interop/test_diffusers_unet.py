import pytest
import torch

from scoresde.checkpoint import CheckpointError
from scoresde.interop.diffusers_unet import export, network, tensors
from scoresde.nets.ddpm import DDPMUNet
from scoresde.nets.ncsnpp import NCSNpp
from scoresde.nets.unet import UNet

diffusers = pytest.importorskip("diffusers")

BASE = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": None,
}
CIFAR = {  # google/ddpm-cifar10-32 at a quarter of its width
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": (32, 64, 64, 64),
    "center_input_sample": False,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
SKIP = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("SkipDownBlock2D",) * 2,
    "up_block_types": ("SkipUpBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": None,
    "attention_head_dim": None,
    "norm_eps": 1e-6,
    "mid_block_scale_factor": 1.41421356237,
    "time_embedding_type": "fourier",
    "center_input_sample": True,
}
ATTENTIVE = {
    "block_out_channels": (32, 128),
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
}
RESNET = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D"),
}
HIDDEN = {
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
PLAIN = [
    {},
    {"downsample_padding": 0, "norm_eps": 0.1},
    {"attention_head_dim": 4, "layers_per_block": 3},
    {"resnet_time_scale_shift": "scale_shift"},
    {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2},
    {"attn_norm_num_groups": 2, "mid_block_scale_factor": 1.7},
    {"add_attention": False, "center_input_sample": True},
    {"mid_block_type": None},
    RESNET,
    {**HIDDEN, "resnet_time_scale_shift": "scale_shift"},
    {"act_fn": "relu"},
    {"act_fn": "gelu"},
    {"act_fn": "mish"},
    {"act_fn": "swish", "freq_shift": 1},
    {"time_embedding_type": "fourier"},
    {"time_embedding_type": "fourier", "flip_sin_to_cos": False, "class_embed_type": "timestep"},
    {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    {"num_class_embeds": 5, "sample_size": (8, 16)},
    {"class_embed_type": "timestep"},
    {"class_embed_type": "identity"},
    {"in_channels": 1, "out_channels": 2, "time_embedding_dim": 24},
]
SKIPS = [
    {},
    {**ATTENTIVE, "layers_per_block": 2},
    {"time_embedding_type": "positional", "freq_shift": 1, "flip_sin_to_cos": False,
     "center_input_sample": False},
    {"block_out_channels": (16, 32, 128), "sample_size": (16, 8),
     "down_block_types": ("SkipDownBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D"),
     "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D", "SkipUpBlock2D")},
    {**ATTENTIVE, "block_out_channels": (32, 64), "layers_per_block": 2},
    {"block_out_channels": (32, 32, 64), "down_block_types": ("SkipDownBlock2D",
     "AttnSkipDownBlock2D", "AttnSkipDownBlock2D"),
     "up_block_types": ("AttnSkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D")},
]  # fmt: skip
CONFIGS = [CIFAR, *({**BASE, **c} for c in PLAIN), *({**SKIP, **c} for c in SKIPS)]
IDS = ["cifar10", *map(str, PLAIN), *(f"skip {c}" for c in SKIPS)]


def foreign(fields):
    """A network of diffusers with random weights, those of its norms too."""
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(**fields).eval()
    for parameter in net.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return net


def inputs(fields, shape):
    torch.manual_seed(1)
    fourier = fields.get("time_embedding_type") == "fourier"
    label = torch.tensor([0.02, 3.0, 40.0] if fourier else [0.0, 421.0, 999.0])
    y = None
    if fields.get("class_embed_type") == "timestep":
        y = torch.tensor([1.0, 2.0, 30.0])
    elif fields.get("class_embed_type") == "identity":
        y = torch.randn(3, 32)
    elif "num_class_embeds" in fields:
        y = torch.tensor([0, 4, 2])
    return torch.randn(3, *shape), label, y


def theirs_on(net, x, label, y):
    label = label.long() if net.config.time_embedding_type == "learned" else label
    with torch.no_grad():
        return net(x, label, class_labels=y).sample


def ours(config, state):
    net = network(config).eval()
    net.load_state_dict(tensors(config, state))
    return net


def differ(a, b):
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("fields", CONFIGS, ids=IDS)
def test_output_is_that_of_diffusers_both_ways(fields):
    theirs = foreign(fields)
    net = ours(dict(theirs.config), theirs.state_dict())
    x, label, y = inputs(fields, net.shape)
    wanted = theirs_on(theirs, x, label, y)
    with torch.no_grad():
        assert differ(net(x, label, y), wanted) < 1e-5
    config, state = export(net)
    again = diffusers.UNet2DModel.from_config(config).eval()
    again.load_state_dict(state)
    assert torch.equal(theirs_on(again, x, label, y), wanted)
    read_again = network(config)
    assert type(read_again) is type(net)
    assert vars(read_again).keys() == vars(net).keys()
    for name in type(net).__dataclass_fields__:
        assert getattr(read_again, name) == getattr(net, name), name


def test_the_defaults_are_those_of_diffusers():
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel(sample_size=8)
        net = network({"sample_size": 8})
    config = export(net)[0]
    for key, value in theirs.config.items():
        if not key.startswith("_") and key != "sample_size":
            assert config[key] == (list(value) if isinstance(value, tuple) else value), key
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_the_published_networks_are_the_presets():
    cifar = {**CIFAR, "block_out_channels": (128, 256, 256, 256)}
    large = {
        **CIFAR,
        "sample_size": 256,
        "block_out_channels": (128, 128, 256, 256, 512, 512),
        "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
    }
    with torch.device("meta"):
        for config, preset in ((cifar, "ddpm-cifar10"), (large, "ddpm-256")):
            fields = {**DDPMUNet.presets[preset], "dropout": 0.0, "embedding": "positional"}
            size = config["sample_size"]
            wanted, net = DDPMUNet((3, size, size), **fields), network(config)
            for name in DDPMUNet.__dataclass_fields__:
                assert getattr(net, name) == getattr(wanted, name), name


def test_old_names_of_attention():
    theirs = foreign(CIFAR | {"layers_per_block": 1})
    state = theirs.state_dict()
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, value in state.items():
        for new, name in names.items():
            key = key.replace(f".{new}.", f".{name}.")
        old[key] = value
    assert old.keys() != state.keys()
    new, again = tensors(dict(theirs.config), state), tensors(dict(theirs.config), old)
    assert all(torch.equal(new[k], again[k]) for k in new | again)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "tanh"}, "act_fn of a UNet2DModel is 'tanh', accepted: silu"),
        ({"sample_size": None}, "no sample_size"),
        ({"downsample_padding": 2}, "downsample_padding of a UNet2DModel is 2"),
        ({"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}, "CrossAttnDownBlock2D"),
        ({"down_block_types": ("DownBlock2D",)}, "differ in their lengths"),
        ({"down_block_types": ("DownBlock2D", "SkipDownBlock2D")}, "of Skip blocks is"),
        ({"attention_head_dim": 3}, "do not split into 5 attention heads"),
        ({"norm_num_groups": None}, "not a UNet2DModel of plain blocks"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type"),
        ({"encoder_hid_dim": 32}, "unknown field encoder_hid_dim"),
        ({"downsample_type": "fir"}, "downsample_type of a UNet2DModel is 'fir'"),
        ({"resnet_time_scale_shift": "spatial"}, "accepted: default, scale_shift"),
    ],
    ids=str,
)
def test_refuses_a_configuration_in_one_line(change, message):
    with pytest.raises(CheckpointError, match=message) as error:
        network({**BASE, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_num_groups": 32}, "norm_num_groups of a UNet2DModel of Skip blocks"),
        ({"in_channels": 1}, "in_channels .* accepted: 3"),
        ({"mid_block_scale_factor": 1.0}, "accepted: sqrt"),
        ({"attention_head_dim": 8}, "attention_head_dim"),
        ({"norm_eps": 1e-5}, "norm_eps"),
        ({"time_embedding_type": "positional"}, "freq_shift"),
        ({"num_class_embeds": 4}, "num_class_embeds"),
        ({"block_out_channels": (32, 48)}, "multiples of the first"),
        ({**ATTENTIVE, "up_block_types": ("SkipUpBlock2D",) * 2}, "at different levels"),
    ],
    ids=str,
)
def test_refuses_skip_blocks_that_ncsnpp_has_not(change, message):
    with pytest.raises(CheckpointError, match=message):
        network({**SKIP, **change})


def test_the_ends_resample_nothing():
    kinds = {k: (v[::-1] if "up" in k else (v[0],) * 2) for k, v in RESNET.items()}
    net = network({**BASE, **kinds})
    assert (net.residual_down, net.residual_up) == ((0,), ())


def test_unknown_fields_that_are_off_pass():
    assert network({**BASE, "new_option": None, "_diffusers_version": "9"}).blocks == 1


def test_names_the_weights_that_do_not_fit():
    state = foreign(BASE).state_dict()
    short = {k: v for k, v in state.items() if k != "conv_in.bias"}
    with pytest.raises(CheckpointError, match=r"missing are conv_in\.bias"):
        tensors(BASE, short)
    with pytest.raises(CheckpointError, match=r"unknown are conv_more\.bias"):
        tensors(BASE, {**state, "conv_more.bias": torch.zeros(1)})
    for key in ("conv_in.weight", "down_blocks.1.attentions.0.to_k.weight"):
        with pytest.raises(CheckpointError, match=rf"{key} is \(7, .*the network has"):
            tensors(BASE, {**state, key: torch.zeros(7, *state[key].shape[1:])})


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (lambda: UNet((3, 8, 8)), "cannot hold a UNet; accepted: DDPMUNet"),
        (lambda: tiny(embedding="waves"), "embedding is 'waves'"),
        (lambda: tiny(shape=(3, 8)), "shape is"),
        (lambda: tiny(act="elu"), "act is 'elu'"),
        (lambda: tiny(over_label=True), "over_label is True"),
        (lambda: tiny(middle_groups=0), "middle_groups is 0"),
        (lambda: tiny(widths=(8, 8, 8), attention=(0, 1), residual_down=(0,)), "residual_down"),
        (lambda: tiny(widths=(8, 8, 8), attention=(1, 2), residual_up=(1,)), "residual_up"),
        (lambda: NCSNpp((3, 8, 8), **NCSNpp.presets["tiny"]), "NCSNpp: taps is None"),
        (lambda: network({**SKIP, "layers_per_block": 1}).__class__((3, 8, 8), width=16,
         multipliers=(1,), blocks=1, attention=(), taps=(1.0, 3.0, 3.0, 1.0), input_pyramid="skip",
         output_pyramid="skip", embedding="positional", num_classes=2), "num_classes is 2"),
    ],
)  # fmt: skip
def test_names_what_cannot_be_exported(net, message):
    with pytest.raises(CheckpointError, match=message):
        export(net())


def tiny(shape=(3, 8, 8), **changes):
    fields = {"widths": (8, 16), "blocks": 1, "groups": 4, "embedding": "positional"}
    return DDPMUNet(shape, **{**fields, **changes})


def test_an_adaptive_middle_keeps_its_norm():
    net = tiny(adaptive=True)
    assert export(net)[0]["attn_norm_num_groups"] == 4
    assert export(tiny(adaptive=True, middle_groups=0))[0]["attn_norm_num_groups"] is None
