"""EDM's SongUNet and its preconditioners as functions of their keys, and the pickle of them.

A second description of the wiring, beside scoresde/nets; the pickle is what the original's
decorator of persistent classes writes.
"""

import math
import pickle
import sys
import types

import torch
from tape import Tape, sinusoids
from torch import nn
from torch.nn import functional as F

SONG = {
    "img_resolution": 8, "img_channels": 3, "label_dim": 0, "model_type": "SongUNet",
    "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4],
}  # fmt: skip
DEFAULTS = {
    "label_dim": 0, "augment_dim": 0, "model_channels": 128, "channel_mult": [1, 2, 2, 2],
    "channel_mult_emb": 4, "num_blocks": 4, "attn_resolutions": [16], "dropout": 0.1,
    "label_dropout": 0, "embedding_type": "positional", "channel_mult_noise": 1,
    "encoder_type": "standard", "decoder_type": "standard", "resample_filter": [1, 1],
}  # fmt: skip
M = 1000


# Convolutions that resample first; none of them flips the filter, which all are symmetric


def plane(p, key, taps):
    f = torch.tensor(taps, dtype=torch.float32)
    return p.keep(f"{key}.resample_filter", torch.outer(f, f)[None, None] / f.sum() ** 2)


def up(p, key, x, taps):
    f = 4 * plane(p, key, taps).repeat(x.shape[1], 1, 1, 1)
    pad = (len(taps) - 1) // 2
    return F.conv_transpose2d(x, f, stride=2, padding=pad, groups=x.shape[1])


def down(p, key, x, taps, pad=None):
    f = plane(p, key, taps).repeat(x.shape[1], 1, 1, 1)
    pad = (len(taps) - 1) // 2 if pad is None else pad
    return F.conv2d(x, f, stride=2, padding=pad, groups=x.shape[1])


def fused_down(p, key, x, out, taps):
    weight, bias = p.affine(key, out, x.shape[1], 3, 3)
    x = F.conv2d(x, weight, padding=1 + (len(taps) - 1) // 2)
    return down(p, key, x, taps, pad=0) + bias[:, None, None]


def norm(p, key, x, eps=1e-6):
    return p.norm(key, x, min(32, x.shape[1] // 4), eps)


def block(p, key, x, emb, out, taps, change=None, attends=False):
    inside, scale = x.shape[1], math.sqrt(0.5)
    h = F.silu(norm(p, f"{key}.norm0", x))
    h = p.conv(f"{key}.conv0", change(p, f"{key}.conv0", h, taps) if change else h, out)
    h = h + p.linear(f"{key}.affine", emb, out)[:, :, None, None]
    h = p.conv(f"{key}.conv1", F.silu(norm(p, f"{key}.norm1", h)), out)
    if change is not None:
        x = change(p, f"{key}.skip", x, taps)
    if inside != out or change is not None:
        x = p.conv(f"{key}.skip", x, out, 1)
    h = (h + x) * scale
    if not attends:
        return h
    b, c, rows, columns = h.shape
    qkv = p.conv(f"{key}.qkv", norm(p, f"{key}.norm2", h), 3 * c, 1)
    q, k, v = qkv.reshape(b, c, 3, rows * columns).unbind(2)
    weight = torch.einsum("bcq,bck->bqk", q, k / math.sqrt(c)).softmax(-1)
    a = torch.einsum("bqk,bck->bcq", weight, v).reshape(h.shape)
    return (p.conv(f"{key}.proj", a, c, 1) + h) * scale


def song_unet(p, given, x, c_noise, labels=None, augment=None):
    """`F(x, c_noise)` of a SongUNet, whose keys begin with `model.`."""
    c = {**DEFAULTS, **given}
    width, mult, taps = c["model_channels"], c["channel_mult"], c["resample_filter"]
    wide, at = width * c["channel_mult_noise"], "model."
    if c["embedding_type"] == "positional":
        e = sinusoids(c_noise, wide)
    else:
        freqs = p.take("model.map_noise.freqs", wide // 2, std=16)
        angle = c_noise[:, None] * (2 * math.pi * freqs)
        e = torch.cat([angle.sin(), angle.cos()], 1)
    if c["label_dim"]:
        if labels is None:
            labels = x.new_zeros(1, c["label_dim"])
        e = e + p.linear("model.map_label", labels * math.sqrt(c["label_dim"]), wide)
    if c["augment_dim"]:
        w = p.take("model.map_augment.weight", wide, c["augment_dim"])
        e = e if augment is None else e + augment @ w.T
    emb = width * c["channel_mult_emb"]
    e = F.silu(p.linear("model.map_layer0", e, emb))
    e = F.silu(p.linear("model.map_layer1", e, emb))

    skips, aux, h = [], x, x
    for level, factor in enumerate(mult):
        r = c["img_resolution"] >> level
        at = f"model.enc.{r}x{r}"
        if level == 0:
            skips.append(h := p.conv(f"{at}_conv", h, width))
        else:
            skips.append(h := block(p, f"{at}_down", h, e, h.shape[1], taps, down))
            if c["encoder_type"] == "skip":
                aux = down(p, f"{at}_aux_down", aux, taps)
                skips[-1] = h = h + p.conv(f"{at}_aux_skip", aux, h.shape[1], 1)
            elif c["encoder_type"] == "residual":
                aux = (h + fused_down(p, f"{at}_aux_residual", aux, h.shape[1], taps)) / 2**0.5
                skips[-1] = h = aux
        for i in range(c["num_blocks"]):
            attends = r in c["attn_resolutions"]
            h = block(p, f"{at}_block{i}", h, e, width * factor, taps, attends=attends)
            skips.append(h)

    out = None
    for level, factor in reversed(list(enumerate(mult))):
        r = c["img_resolution"] >> level
        at = f"model.dec.{r}x{r}"
        if level == len(mult) - 1:
            h = block(p, f"{at}_in0", h, e, h.shape[1], taps, attends=True)
            h = block(p, f"{at}_in1", h, e, h.shape[1], taps)
        else:
            h = block(p, f"{at}_up", h, e, h.shape[1], taps, up)
        for i in range(c["num_blocks"] + 1):
            attends = i == c["num_blocks"] and r in c["attn_resolutions"]
            h = torch.cat([h, skips.pop()], 1)
            h = block(p, f"{at}_block{i}", h, e, width * factor, taps, attends=attends)
        if c["decoder_type"] == "skip" or level == 0:
            if c["decoder_type"] == "skip" and level < len(mult) - 1:
                out = up(p, f"{at}_aux_up", out, taps)
            side = F.silu(norm(p, f"{at}_aux_norm", h))
            side = p.conv(f"{at}_aux_conv", side, c["out_channels"])
            out = side if out is None else side + out
    assert not skips
    return out


# Preconditioners


def steps():
    """iDDPM's noise levels, in float32 as there."""
    j = torch.arange(M + 1)
    bar = (0.5 * math.pi * j / M / 1.008).sin() ** 2
    u = torch.zeros(M + 1)
    for i in range(M, 0, -1):
        u[i - 1] = ((u[i] ** 2 + 1) / (bar[i - 1] / bar[i]).clip(min=0.001) - 1).sqrt()
    return u


def denoised(p, kind, given, x, sigma, labels=None):
    """`D(x, sigma)` of a preconditioner; missing weights are drawn.

    Labels are taken in float64. The original's own float32 rounds `1 + s^2` (VP), and its labels
    of small noise levels err by that: 5e-5 of the output at 0.02.
    """
    s, exact = sigma.float()[:, None, None, None], sigma.double()
    one, channels = torch.ones_like(s), given["img_channels"]
    if kind == "VPPrecond":
        bd, bmin = given.get("beta_d", 19.9), given.get("beta_min", 0.1)
        t = ((bmin**2 + 2 * bd * (1 + exact**2).log()).sqrt() - bmin) / bd
        skip, out, scale, label = one, -s, 1 / (s**2 + 1).sqrt(), (M - 1) * t
    elif kind == "VEPrecond":
        skip, out, scale, label = one, s, one, (exact / 2).log()
    elif kind == "iDDPMPrecond":
        u = p.keep("u", steps())
        nearest = (s.flatten()[:, None] - u[None]).abs().argmin(1)
        skip, out, scale, label = one, -s, 1 / (s**2 + 1).sqrt(), M - 1 - nearest
    else:
        sd = given.get("sigma_data", 0.5)
        power, label = s**2 + sd**2, exact.log() / 4
        skip, out, scale = sd**2 / power, s * sd / power.sqrt(), 1 / power.sqrt()
    outputs = 2 * channels if kind == "iDDPMPrecond" else channels
    f = song_unet(p, {**given, "out_channels": outputs}, scale * x, label.float(), labels)
    return skip * x + out * f[:, :channels]


def drawn(kind, given, seed=0):
    """A state dict of random weights."""
    tape, size = Tape(seed), given["img_resolution"]
    denoised(tape, kind, given, torch.zeros(1, given["img_channels"], size, size), torch.ones(1))
    return tape


# Pickles

BOUNDS = {"VPPrecond": (0.0009765625, 152.16697), "VEPrecond": (0.02, 100.0),
          "iDDPMPrecond": (0.0064223, 20291.17), "EDMPrecond": (0.0, math.inf)}  # fmt: skip
BUFFERS = ("resample_filter", "freqs", "u")


class Kept(nn.Module):
    """An object whose class was decorated: it is pickled as a call with its source and state."""

    def __reduce__(self):
        meta = {"type": "class", "version": 6, "module_src": "raise SystemExit",
                "class_name": self.called, "state": dict(self.__dict__)}  # fmt: skip
        meta["state"].pop("called")
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,), None


def tree(weights, called="Part"):
    """Modules that hold tensors by their dotted keys; `enc` and `dec` are torch's own."""
    module = nn.ModuleDict() if called in ("enc", "dec") else Kept()
    if isinstance(module, Kept):
        module.called = called
        module._init_args, module._init_kwargs = (), {}
    inner = {}
    for key, value in weights.items():
        head, _, rest = key.partition(".")
        if rest:
            inner.setdefault(head, {})[rest] = value
        elif head in BUFFERS:
            module.register_buffer(head, value)
        else:
            module.register_parameter(head, nn.Parameter(value))
    for head, held in inner.items():
        module.add_module(head, tree(held, head))
    return module


def inner_arguments(kind, given):
    """What a preconditioner hands on to its network."""
    own = ("model_type", "img_channels", "sigma_data", "beta_d", "beta_min", "M", "C_1", "C_2")
    held = {"label_dim": 0, **{k: v for k, v in given.items() if k not in own}}
    channels = given.get("img_channels")
    return {**held, "in_channels": channels,
            "out_channels": 2 * channels if kind == "iDDPMPrecond" else channels}  # fmt: skip


def snapshot(file, weights, kind, given, **content):
    """Writes a `network-snapshot-*.pkl` with these weights as `ema`."""
    names = {}
    for name, called in (("torch_utils.persistence", "_reconstruct_persistent_obj"),
                         ("dnnlib.util", "EasyDict")):  # fmt: skip
        names[name.split(".")[0]] = types.ModuleType(name.split(".")[0])
        names[name] = types.ModuleType(name)
        value = type(called, (dict,), {}) if called == "EasyDict" else lambda meta: None
        value.__module__, value.__qualname__, value.__name__ = name, called, called
        setattr(names[name], called, value)
    net = tree(weights, kind)
    net._init_kwargs = names["dnnlib.util"].EasyDict(given)
    net.model.called = given.get("model_type", "DhariwalUNet")
    net.model._init_kwargs = inner_arguments(kind, given)
    net.sigma_min, net.sigma_max = BOUNDS.get(kind, (0.0, math.inf))
    net.label_dim, net.img_resolution = given.get("label_dim", 0), given.get("img_resolution")
    net.use_fp16, net.sigma_data = False, given.get("sigma_data", 0.5)
    held = {"ema": net, "loss_fn": None, "augment_pipe": None,
            "dataset_kwargs": names["dnnlib.util"].EasyDict(path="x.zip"), **content}  # fmt: skip
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(names)
    try:
        file.write_bytes(pickle.dumps(held))
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
    return file
