import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import scoresde as sd
from scoresde.checkpoint import CheckpointError
from scoresde.interop import dhariwal
from scoresde.interop import guided_diffusion as gd

FILE = Path("nowhere/model000100.pt")


class Tape(dict):
    """Tensors that a reference takes by name; a name taken first is drawn at random."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def take(self, key: str, *shape: int) -> torch.Tensor:
        if key not in self:
            fan = max(1, int(np.prod(shape[1:])))
            self[key] = torch.randn(shape, generator=self.generator) / fan**0.5
        assert self[key].shape == shape, key
        return self[key]

    def affine(self, key: str, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.take(f"{key}.weight", *shape), self.take(f"{key}.bias", shape[0])


# The wiring once more, as functions of foreign names.


def norm(p, key, x):
    w, b = p.affine(key, x.shape[1])
    return F.group_norm(x, 32, w, b, 1e-5)


def conv3(p, key, x, out, **options):
    return F.conv2d(x, *p.affine(key, out, x.shape[1], 3, 3), padding=1, **options)


def linear(p, key, x, out):
    return F.linear(x, *p.affine(key, out, x.shape[1]))


def res(p, key, x, e, out, o, change=None):
    def changed(x):
        if change == "up":
            return x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        if change == "down":
            return (
                x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]
            ) / 4
        return x

    h = conv3(p, f"{key}.in_layers.2", changed(F.silu(norm(p, f"{key}.in_layers.0", x))), out)
    x = changed(x)
    a = linear(p, f"{key}.emb_layers.1", F.silu(e), out * (2 if o["adaptive"] else 1))[
        ..., None, None
    ]
    if o["adaptive"]:
        h = F.silu(norm(p, f"{key}.out_layers.0", h) * (1 + a[:, :out]) + a[:, out:])
    else:
        h = F.silu(norm(p, f"{key}.out_layers.0", h + a))
    h = conv3(p, f"{key}.out_layers.3", h, out)
    if x.shape[1] != out:
        x = F.conv2d(x, *p.affine(f"{key}.skip_connection", out, x.shape[1], 1, 1))
    return x + h


def attended(qkv, heads, new):
    """``(B, 3C, T)`` to ``(B, C, T)``, head by head."""
    width = qkv.shape[1] // 3
    d, out = width // heads, []
    for n in range(heads):
        if new:
            q, k, v = (qkv[:, i * width + n * d : i * width + (n + 1) * d] for i in range(3))
        else:
            q, k, v = qkv[:, n * 3 * d : (n + 1) * 3 * d].split(d, 1)
        weight = torch.einsum("bct,bcs->bts", q * d**-0.25, k * d**-0.25).softmax(-1)
        out.append(torch.einsum("bts,bcs->bct", weight, v))
    return torch.cat(out, 1)


def attend(p, key, x, heads, new):
    c = x.shape[1]
    h = norm(p, f"{key}.norm", x).flatten(2)
    h = attended(F.conv1d(h, *p.affine(f"{key}.qkv", 3 * c, c, 1)), heads, new)
    return x + F.conv1d(h, *p.affine(f"{key}.proj_out", c, c, 1)).reshape(x.shape)


BASE = {
    "width": 32,
    "mult": (1, 2),
    "blocks": 1,
    "attention": (1,),
    "updown": True,
    "adaptive": True,
    "new": False,
    "conv": True,
    "heads": lambda c, up: c // 16,
    "out": 6,
    "classes": None,
}


def trunk(p, x, t, y, o):
    M = o["width"]
    angle = t[:, None] * 10000.0 ** (-torch.arange(M // 2) / (M // 2))
    e = linear(p, "time_embed.0", torch.cat([angle.cos(), angle.sin()], 1), 4 * M)
    e = linear(p, "time_embed.2", F.silu(e), 4 * M)
    if o["classes"]:
        e = e + p.take("label_emb.weight", o["classes"], 4 * M)[y]
    widths = [int(m * M) for m in o["mult"]]
    h = conv3(p, "input_blocks.0.0", x, widths[0])
    skips, i = [h], 0
    for level, width in enumerate(widths):
        for _ in range(o["blocks"]):
            i += 1
            h = res(p, f"input_blocks.{i}.0", h, e, width, o)
            if level in o["attention"]:
                h = attend(p, f"input_blocks.{i}.1", h, o["heads"](width, False), o["new"])
            skips.append(h)
        if level < len(widths) - 1:
            i += 1
            if o["updown"]:
                h = res(p, f"input_blocks.{i}.0", h, e, width, o, "down")
            elif o["conv"]:
                h = conv3(p, f"input_blocks.{i}.0.op", h, width, stride=2)
            else:
                h = F.avg_pool2d(h, 2)
            skips.append(h)
    h = res(p, "middle_block.0", h, e, width, o)
    h = attend(p, "middle_block.1", h, o["heads"](width, False), o["new"])
    return res(p, "middle_block.2", h, e, width, o), skips, e


def reference(p, x, t, y=None, **changes):
    o = {**BASE, **changes}
    h, skips, e = trunk(p, x, t, y, o)
    j = 0
    for level, m in reversed(list(enumerate(o["mult"]))):
        width = int(m * o["width"])
        for i in range(o["blocks"] + 1):
            h = res(p, f"output_blocks.{j}.0", torch.cat([h, skips.pop()], 1), e, width, o)
            next_part = 1
            if level in o["attention"]:
                h = attend(p, f"output_blocks.{j}.1", h, o["heads"](width, True), o["new"])
                next_part = 2
            if level and i == o["blocks"]:
                key = f"output_blocks.{j}.{next_part}"
                if o["updown"]:
                    h = res(p, key, h, e, width, o, "up")
                else:
                    h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
                    h = conv3(p, f"{key}.conv", h, width) if o["conv"] else h
            j += 1
    assert not skips
    return conv3(p, "out.2", F.silu(norm(p, "out.0", h)), o["out"])


FLAGS = {"image_size": 16, "num_head_channels": "16"}


def inputs(classes=None, size=16):
    generator = torch.Generator().manual_seed(5)
    y = torch.tensor([0, 3]) if classes else None
    return torch.randn(2, 3, size, size, generator=generator), torch.tensor([7.0, 850.5]), y


def told(flags=FLAGS, **changes):
    """The state dict of a reference, what it gives, and the model read from it."""
    p, (x, t, y) = Tape(), inputs(changes.get("classes"), changes.pop("size", 16))
    expected = reference(p, x, t, y, **changes)
    return p, expected, gd.read(dict(p), FILE, config=flags).model, (x, t, y)


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max()


CASES = {
    "updown": ({}, {}),
    "added": ({"use_scale_shift_norm": False}, {"adaptive": False}),
    "convolutions": ({"resblock_updown": "False"}, {"updown": False}),
    "added, convolutions": ({}, {"adaptive": False, "updown": False}),
    "nothing": ({"conv_resample": False}, {"updown": False, "conv": False}),
    "new order": ({"use_new_attention_order": "true"}, {"new": True}),
    "four heads": ({"num_head_channels": -1}, {"heads": lambda c, up: 4}),
    "heads upwards": (
        {"num_head_channels": "-1", "num_heads": "1", "num_heads_upsample": 8},
        {"heads": lambda c, up: 8 if up else 1},
    ),
    "classes": ({"class_cond": True}, {"classes": 5}),
    "three channels": ({"learn_sigma": "no"}, {"out": 3}),
    "attention everywhere": ({"attention_resolutions": "16,8"}, {"attention": (0, 1)}),
    "no attention": ({"attention_resolutions": ""}, {"attention": ()}),
    "three levels": (
        {"channel_mult": "1,1,2", "num_res_blocks": "2", "attention_resolutions": "16,4"},
        {"mult": (1, 1, 2), "blocks": 2, "attention": (0, 2)},
    ),
    "half a width": ({"channel_mult": "0.5,1"}, {"width": 64, "mult": (0.5, 1)}),
    "one level": ({}, {"mult": (2,), "attention": (0,)}),
}


@pytest.mark.parametrize("case", CASES)
def test_networks_give_what_the_original_wiring_gives(case):
    flags, changes = CASES[case]
    _, expected, model, args = told({**FLAGS, **flags}, **changes)
    with torch.no_grad():
        close(model.net(*args), expected)
    assert not model.training


def test_super_resolution():
    p, (x, t, _) = Tape(), inputs()
    small = torch.randn(2, 3, 4, 4)
    # The middle of each target pixel, in units of the small picture, between its neighbours.
    at = ((torch.arange(16) + 0.5) / 4 - 0.5).clamp(0, 3)
    low = at.floor().long().clamp(max=2)
    part = at - low
    rows = small[:, :, low] * (1 - part)[:, None] + small[:, :, low + 1] * part[:, None]
    large = rows[..., low] * (1 - part) + rows[..., low + 1] * part
    expected = reference(p, torch.cat([x, large], 1), t)
    for flags in (
        {"large_size": 16, "small_size": 4, "num_head_channels": 16},
        {**FLAGS, "learn_sigma": True},
    ):
        net = gd.read(dict(p), FILE, config=flags).model.net
        assert net.shape == (3, 16, 16)
        with torch.no_grad():
            close(net(x, t, low_res=small), expected)


def test_one_hot_rows_are_classes():
    _, expected, model, (x, t, y) = told(classes=5)
    with torch.no_grad():
        close(model.net(x, t, torch.eye(5)[y]), expected)


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2"])
@pytest.mark.parametrize("updown", [True, False])
def test_classifiers(tmp_path, pool, updown):
    o = {**BASE, "blocks": 2, "updown": updown, "heads": lambda c, up: c // 64}
    o |= {"width": 64, "mult": (1, 2)}
    p, (x, t, _) = Tape(), inputs(size=8)
    h, skips, _ = trunk(p, x, t, None, o)
    if pool in ("adaptive", "attention"):
        h = F.silu(norm(p, "out.0", h))
    if pool == "adaptive":
        mean = h.mean((2, 3), keepdim=True)
        expected = F.conv2d(mean, *p.affine("out.3", 10, 128, 1, 1)).flatten(1)
    elif pool == "attention":
        h = h.flatten(2)
        h = torch.cat([h.mean(2, keepdim=True), h], 2)
        h = h + p.take("out.2.positional_embedding", 128, 17)
        h = attended(F.conv1d(h, *p.affine("out.2.qkv_proj", 384, 128, 1)), 2, True)
        expected = F.conv1d(h, *p.affine("out.2.c_proj", 10, 128, 1))[..., 0]
    else:
        h = torch.cat([s.mean((2, 3)) for s in [*skips, h]], 1)
        h = linear(p, "out.0", h, 2048)
        h = F.relu(h) if pool == "spatial" else F.silu(norm(p, "out.1", h))
        expected = linear(p, "out.2" if pool == "spatial" else "out.3", h, 10)
    flags = {"image_size": 8, "classifier_pool": pool, "classifier_resblock_updown": str(updown)}
    # The flag of the model that it guides does not concern it.
    flags |= {"classifier_attention_resolutions": "4", "use_new_attention_order": True}
    net = gd.read_classifier(dict(p), FILE, flags)
    with torch.no_grad():
        close(net(x, t), expected)
    assert net.num_classes == 10
    torch.save(dict(p), tmp_path / "classifier.pt")
    loaded = sd.load_classifier(tmp_path, config=flags)
    with torch.no_grad():
        assert torch.equal(loaded.net(x, t), net(x, t))
        close(loaded(x, (t.double() + 1) / 1000), expected.log_softmax(1))
    with pytest.raises(CheckpointError, match="use load_classifier"):
        sd.load(tmp_path, config=flags)
    with pytest.raises(CheckpointError, match="classifier_width is 32, but by time_embed"):
        gd.read_classifier(dict(p), FILE, {**flags, "classifier_width": 32})
    with pytest.raises(CheckpointError, match="use load_classifier"):
        gd.read(dict(p), FILE, config=flags)
    wrong = "attention" if pool != "attention" else "spatial"
    with pytest.raises(CheckpointError, match=f"classifier_pool is '{wrong}', but by out"):
        gd.read_classifier(dict(p), FILE, {**flags, "classifier_pool": wrong})


def test_classifier_without_a_head_is_none():
    p, (x, t, _) = Tape(), inputs()
    trunk(p, x, t, None, BASE)
    with pytest.raises(CheckpointError, match="no classifier of guided-diffusion: it lacks out"):
        gd.read_classifier(dict(p), FILE, {**FLAGS, "classifier_depth": 1})
    with pytest.raises(CheckpointError, match="4 input_blocks do not make levels of 2"):
        gd.read_classifier(dict(p), FILE, FLAGS)


# The chain.


def alpha_bars(schedule, steps):
    if schedule == "linear":
        betas = torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64)
    else:
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        f = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return (1 - betas).cumprod(0)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("steps", "rescale"), [(1000, True), (100, "False"), (100, True)])
@pytest.mark.parametrize("xstart", [True, False])
def test_process_and_label(schedule, steps, rescale, xstart):
    flags = {
        **FLAGS,
        "noise_schedule": schedule,
        "diffusion_steps": str(steps),
        "rescale_timesteps": rescale,
        "predict_xstart": xstart,
    }
    p, _, model, (x, _, _) = told(flags)
    bars = alpha_bars(schedule, steps)
    for step in (0, 3, steps // 2, steps - 2):
        bar = bars[step]
        label = torch.full((2,), step * (1000 / steps if rescale is True else 1.0))
        with torch.no_grad():
            out, v = reference(p, x, label).chunk(2, 1)
            noise, variance = model.noise_and_variance(x, (step + 1) / steps)
        expected = (x - bar.sqrt() * out) / (1 - bar).sqrt() if xstart else out
        close(noise, expected.float(), 1e-4)
        close(variance, v, 1e-4)
    assert model.sde.t_min == model.sde.t_min_sampling == model.sde.t_min_likelihood == 1 / steps


def test_pictures_are_scaled_to_the_model_range():
    *_, model, _ = told()
    levels = torch.tensor([[0, 255]])
    torch.testing.assert_close(
        model.scaler.encode(levels, dequantize=False), torch.tensor([[-1, 1]]) * 255 / 256
    )


# Flags.


def test_flags_beside_the_file(tmp_path):
    p, expected, _, args = told()
    file = tmp_path / "ema_0.9999_100.pt"
    with pytest.raises(CheckpointError, match="holds no flags: put flags"):
        gd.read(dict(p), file)
    (tmp_path / "config.json").write_text(json.dumps(FLAGS))
    with torch.no_grad():
        close(gd.read(dict(p), file).model.net(*args), expected)
    (tmp_path / "flags.json").write_text(json.dumps({**FLAGS, "image_size": 24}))
    assert gd.read(dict(p), file).model.shape == (3, 24, 24)
    assert gd.read(dict(p), file, config=tmp_path / "config.json").model.shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("name", "asked", "got"),
    [
        ("ema_0.9999_1.pt", "raw", "ema"),
        ("model000100.pt", "ema", "raw"),
        ("256x256_diffusion.pt", "ema", "ema"),
        ("256x256_diffusion.pt", "raw", "raw"),
    ],
)
def test_names_say_which_weights(name, asked, got):
    p = told()[0]
    assert gd.read(dict(p), Path(name), weights=asked, config=FLAGS).model.weights == got


def test_unused_flags_are_named():
    p = told()[0]
    flags = {**FLAGS, "use_fp16": True, "timestep_respacing": "250", "colour": "blue"}
    found = gd.read(dict(p), FILE, config={**flags, "classifier_scale": 1.0}).unmapped
    assert len(found) == 2
    assert found[0].startswith("timestep_respacing=250: ")
    assert found[1] == "colour: unknown flag, ignored"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"image_size": None}, "lack image_size, which no tensor tells"),
        ({"image_size": "big"}, "image_size must be a number, got 'big'"),
        ({"image_size": 0}, "image_size must be a whole number of at least 1"),
        ({"class_cond": "perhaps"}, "class_cond must be true or false, got 'perhaps'"),
        ({"class_cond": True}, "class_cond is True, but by label_emb.weight it is False"),
        ({"channel_mult": "1,two"}, "channel_mult must be numbers with commas"),
        ({"channel_mult": "1,3"}, r"channel_mult is '1,3', but by input_blocks.3.0.out_layers"),
        ({"channel_mult": "1,2,2"}, r"channel_mult is '1,2,2', but by input_blocks.3.0.out_lay"),
        ({"num_channels": 64}, "num_channels is 64, but by time_embed.0.weight it is 32"),
        ({"num_res_blocks": 2}, "num_res_blocks is 2, but by the number of input_blocks it is 1"),
        ({"learn_sigma": False}, "learn_sigma is False, but by out.2.weight it is True"),
        ({"use_scale_shift_norm": False}, "use_scale_shift_norm is False, but by input_blocks.1"),
        ({"resblock_updown": False}, "resblock_updown is False, but by input_blocks.2 it is True"),
        ({"attention_resolutions": "16"}, "'16', but by input_blocks.1.1.qkv.weight it is '8'"),
        ({"num_head_channels": 48}, "num_head_channels must be a divisor of the channels"),
        ({"num_head_channels": -1, "num_heads": 3}, "64 channels do not split into 3 attention"),
        ({"noise_schedule": "sqrt"}, "noise_schedule must be linear or cosine, got 'sqrt'"),
        ({"diffusion_steps": 4000}, "lack rescale_timesteps: for 4000 steps it matters"),
        ({"diffusion_steps": 10, "rescale_timesteps": 1}, "DDPM needs 0 < beta_start"),
        ({"dropout": "much"}, "dropout must be a number"),
    ],
)
def test_wrong_flags_give_one_line(flags, message):
    p = told()[0]
    with pytest.raises(CheckpointError, match=message) as error:
        gd.read(dict(p), FILE, config={**FLAGS, **flags})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("out.2.weight", (5, 32, 3, 3), "out.2.weight gives 5 channels for pictures of 3"),
        ("out.2.weight", None, "out.2.weight is missing"),
        ("middle_block.2.out_layers.3.bias", None, "middle_block.2.out_layers.3.bias is missing"),
        (
            "middle_block.2.out_layers.3.bias",
            (32,),
            r"out_layers.3.bias is \(32,\), the network's",
        ),
        ("middle_block.1.qkv.weight", (64, 64, 1), r"qkv.weight is \(64, 64, 1\), the network's"),
        ("middle_block.3.bias", (2,), "middle_block.3.bias has no place"),
        ("input_blocks.3.0.out_layers.3.weight", None, "it lacks input_blocks.3.0.out_layers.3"),
    ],
)
def test_tensors_that_do_not_fit_are_named(key, shape, message):
    p = dict(told()[0])
    p.pop(key, None)
    if shape:
        p[key] = torch.zeros(shape)
    with pytest.raises(CheckpointError, match=message):
        gd.read(p, FILE, config=FLAGS)


def test_claims():
    p = dict(told()[0])
    assert gd.claims(p)
    del p["middle_block.0.in_layers.0.weight"]
    assert not gd.claims(p)
    for other in (None, [], {}, {"ema": p}, {"time_embed.0.weight": 1}, torch.zeros(2)):
        assert not gd.claims(other)


def test_half_precision_is_widened():
    p, expected, _, args = told()
    half = {key: value.half() for key, value in p.items()}
    net = gd.read(half, FILE, config=FLAGS).model.net
    assert {q.dtype for q in net.parameters()} == {torch.float32}
    with torch.no_grad():
        close(net(*args), expected, 1e-2)


# EDM's version.

EDM = {
    "img_resolution": 16,
    "img_channels": 3,
    "label_dim": 5,
    "model_channels": 64,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [8],
    "augment_dim": 9,
    "use_fp16": False,
}


def edm_norm(p, key, x):
    return F.group_norm(x, min(x.shape[1] // 4, 32), *p.affine(key, x.shape[1]), 1e-5)


def edm_block(p, key, x, e, out, heads, change=None):
    h = F.silu(edm_norm(p, f"{key}.norm0", x))
    if change == "down":
        h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
    elif change == "up":
        h, x = (a.repeat_interleave(2, 2).repeat_interleave(2, 3) for a in (h, x))
    h = conv3(p, f"{key}.conv0", h, out)
    scale, shift = linear(p, f"{key}.affine", e, 2 * out)[..., None, None].chunk(2, 1)
    h = F.silu(shift + edm_norm(p, f"{key}.norm1", h) * (scale + 1))
    h = conv3(p, f"{key}.conv1", h, out)
    if x.shape[1] != out:
        x = F.conv2d(x, *p.affine(f"{key}.skip", out, x.shape[1], 1, 1))
    elif change:
        p[f"{key}.skip.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
    x = x + h
    if heads:
        qkv = F.conv2d(edm_norm(p, f"{key}.norm2", x), *p.affine(f"{key}.qkv", 3 * out, out, 1, 1))
        q, k, v = qkv.reshape(len(x) * heads, out // heads, 3, -1).unbind(2)
        w = torch.einsum("ncq,nck->nqk", q, k / (out // heads) ** 0.5).softmax(2)
        a = torch.einsum("nqk,nck->ncq", w, v).reshape(x.shape)
        x = F.conv2d(a, *p.affine(f"{key}.proj", out, out, 1, 1)) + x
    return x


def edm_reference(p, x, c, y, augment=None, M=64, out=3):
    angle = c[:, None] * 10000.0 ** (-torch.arange(M // 2) / (M // 2))
    e = torch.cat([angle.cos(), angle.sin()], 1)
    weight = p.take("map_augment.weight", M, 9)
    if augment is not None:
        e = e + F.linear(augment, weight)
    e = linear(p, "map_layer1", F.silu(linear(p, "map_layer0", e, 4 * M)), 4 * M)
    e = F.silu(e + F.linear(y, p.take("map_label.weight", 4 * M, 5)))
    h = conv3(p, "enc.16x16_conv", x, M)
    skips = [h]
    for name, width, heads, change in (
        ("16x16_block0", M, 0, None),
        ("8x8_down", M, 0, "down"),
        ("8x8_block0", 2 * M, 2 * M // 64, None),
    ):
        h = edm_block(p, f"enc.{name}", h, e, width, heads, change)
        skips.append(h)
    h = edm_block(p, "dec.8x8_in0", h, e, 2 * M, 2 * M // 64)
    h = edm_block(p, "dec.8x8_in1", h, e, 2 * M, 0)
    for name, width in (("8x8", 2 * M), ("16x16", M)):
        if name == "16x16":
            h = edm_block(p, "dec.16x16_up", h, e, 2 * M, 0, "up")
        for i in range(2):
            h, heads = torch.cat([h, skips.pop()], 1), width // 64 if name == "8x8" else 0
            h = edm_block(p, f"dec.{name}_block{i}", h, e, width, heads)
    return conv3(p, "out_conv", F.silu(edm_norm(p, "out_norm", h)), out)


@pytest.mark.parametrize(("width", "out"), [(64, 3), (32, 3), (40, 6)])
def test_edm_version(width, out):
    p, (x, _, _) = Tape(), inputs()
    c, y = torch.tensor([-1.2, 0.9]), torch.eye(5)[[1, 4]]
    augment = torch.randn(2, 9, generator=p.generator)
    settings = {**EDM, "model_channels": width, "out_channels": out}
    plain = edm_reference(p, x, c, y, M=width, out=out)
    changed = edm_reference(p, x, c, y, augment, M=width, out=out)
    nothing = edm_reference(p, x, c, 0 * y, M=width, out=out)
    net = dhariwal.network(settings).eval()
    state = {f"model.{key}": value for key, value in p.items()}
    net.load_state_dict(dhariwal.tensors(state, settings))
    with torch.no_grad():
        close(net(x, c, y), plain)
        close(net(x, c, y.argmax(1)), plain)
        close(net(x, c, y, augment=augment), changed)
        close(net(x, c), nothing)


def test_edm_refuses_what_it_does_not_know():
    p = Tape()
    edm_reference(p, inputs()[0], torch.zeros(2), torch.zeros(2, 5))
    assert dhariwal.tensors(p, EDM)
    for change, message in (
        ({"out_conv.bias": None}, "out_conv.bias is missing"),
        ({"out_conv.bias": torch.zeros(4)}, r"out_conv.bias is \(4,\), the network's head.bias"),
        ({"more": torch.zeros(1)}, "more has no place"),
        ({"dec.16x16_up.skip.resample_filter": torch.ones(1, 1, 2, 2)}, "must be the mean"),
    ):
        state = {k: v for k, v in {**p, **change}.items() if v is not None}
        with pytest.raises(CheckpointError, match=message):
            dhariwal.tensors(state, EDM)
    with pytest.raises(CheckpointError, match="lack img_channels"):
        dhariwal.network({"img_resolution": 8})
    with pytest.raises(CheckpointError, match="channel_mult_emb of a DhariwalUNet must be 4"):
        dhariwal.network({**EDM, "channel_mult_emb": 2})
    with pytest.raises(CheckpointError, match="settings of a DhariwalUNet: the adm needs"):
        dhariwal.network({**EDM, "channel_mult": []})
