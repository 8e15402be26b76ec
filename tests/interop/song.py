"""score_sde_pytorch's networks `ncsnpp` and `ddpm` as functions of their keys, and their scores.

A second description of the wiring, beside scoresde/nets, in plain operations.
"""

import itertools
import math

import torch
from tape import Tape, sinusoids
from torch.nn import functional as F

NONLINEAR = {
    "swish": F.silu,
    "elu": F.elu,
    "relu": F.relu,
    "lrelu": lambda x: F.leaky_relu(x, 0.2),
}

MODEL = {
    "name": "ncsnpp", "sigma_min": 0.01, "sigma_max": 50, "num_scales": 1000, "beta_min": 0.1,
    "beta_max": 20.0, "dropout": 0.1, "embedding_type": "positional", "scale_by_sigma": False,
    "ema_rate": 0.9999, "normalization": "GroupNorm", "nonlinearity": "swish", "nf": 8,
    "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [4], "resamp_with_conv": True,
    "conditional": True, "fir": False, "fir_kernel": [1, 3, 3, 1], "skip_rescale": True,
    "resblock_type": "biggan", "progressive": "none", "progressive_input": "none",
    "progressive_combine": "sum", "attention_type": "ddpm", "init_scale": 0.0,
    "fourier_scale": 16, "conv_size": 3,
}  # fmt: skip
DATA = {"dataset": "CIFAR10", "image_size": 8, "num_channels": 3, "centered": True,
        "random_flip": True, "uniform_dequantization": False}  # fmt: skip
TRAINING = {"batch_size": 128, "sde": "vpsde", "continuous": True, "reduce_mean": True,
            "likelihood_weighting": False}  # fmt: skip


def settings(**changes):
    """The original's sections, with changes by bare name."""
    config = {
        "training": dict(TRAINING), "data": dict(DATA), "model": dict(MODEL),
        "sampling": {"method": "pc", "predictor": "euler_maruyama", "snr": 0.16},
        "optim": {"lr": 2e-4, "optimizer": "Adam"}, "seed": 42,
    }  # fmt: skip
    for name, value in changes.items():
        sections = [s for s in ("training", "data", "model") if name in config[s]]
        assert len(sections) == 1, name
        config[sections[0]][name] = value
    return config


# Resampling


def grey(kernel):
    """The separable filter, to be applied by F.conv2d, which does not flip: so it is flipped."""
    k = torch.tensor(kernel, dtype=torch.float32)
    plane = k[:, None] * k[None, :]
    return (plane / plane.sum()).flip(0, 1)


def filtered(x, plane, before, after):
    x = F.pad(x, (before, after, before, after))
    return F.conv2d(x, plane.expand(x.shape[1], 1, *plane.shape), groups=x.shape[1])


def up(x, m):
    if not m["fir"]:
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    b, c, h, w = x.shape
    wide = x.new_zeros(b, c, 2 * h, 2 * w)
    wide[:, :, ::2, ::2] = x
    p = len(m["fir_kernel"]) - 2
    return filtered(wide, 4 * grey(m["fir_kernel"]), -(-p // 2) + 1, p // 2)


def down(x, m):
    if not m["fir"]:
        b, c, h, w = x.shape
        return x.reshape(b, c, h // 2, 2, w // 2, 2).mean((3, 5))
    p = len(m["fir_kernel"]) - 2
    return filtered(x, grey(m["fir_kernel"]), -(-p // 2), p // 2)[:, :, ::2, ::2]


def down_conv(p, key, x, out, m):
    if not m["fir"]:
        return p.conv(f"{key}.Conv_0", F.pad(x, (0, 1, 0, 1)), out, stride=2, padding=0)
    n = len(m["fir_kernel"])
    x = filtered(x, grey(m["fir_kernel"]), -(-n // 2), n // 2)
    return p.conv(f"{key}.Conv2d_0", x, out, stride=2, padding=0)


# Blocks


def norm(p, key, x, m):
    groups = 32 if m["name"] == "ddpm" else min(x.shape[1] // 4, 32)
    return p.norm(key, x, groups, 1e-6)


def nin(p, key, x, out):
    w = p.take(f"{key}.W", x.shape[1], out, std=x.shape[1] ** -0.5)
    return torch.einsum("bihw,io->bohw", x, w) + p.take(f"{key}.b", out)[:, None, None]


def res(p, key, x, temb, out, m, change=None):
    act = NONLINEAR[m["nonlinearity"]]
    h = act(norm(p, f"{key}.GroupNorm_0", x, m))
    if change is not None:
        h, x = change(h, m), change(x, m)
    h = p.conv(f"{key}.Conv_0", h, out)
    w, b = p.affine(f"{key}.Dense_0", out, 4 * m["nf"])  # there even if nothing is embedded
    if temb is not None:
        h = h + F.linear(act(temb), w, b)[:, :, None, None]
    h = p.conv(f"{key}.Conv_1", act(norm(p, f"{key}.GroupNorm_1", h, m)), out)
    if m["resblock_type"] == "ddpm" or m["name"] == "ddpm":
        if x.shape[1] != out:
            x = nin(p, f"{key}.NIN_0", x, out)
    elif x.shape[1] != out or change is not None:
        x = p.conv(f"{key}.Conv_2", x, out, 1)
    return rescaled(x + h, m)


def attention(p, key, x, m):
    c = x.shape[1]
    h = norm(p, f"{key}.GroupNorm_0", x, m)
    q, k, v = (nin(p, f"{key}.NIN_{i}", h, c).flatten(2) for i in range(3))
    weight = (torch.einsum("bcq,bck->bqk", q, k) * c**-0.5).softmax(-1)
    h = torch.einsum("bqk,bck->bcq", weight, v).reshape(x.shape)
    return rescaled(x + nin(p, f"{key}.NIN_3", h, c), m)


def rescaled(x, m):
    return x / math.sqrt(2) if m["skip_rescale"] else x


# Networks


def network(p, config, x, label):
    """The output of `ncsnpp` or `ddpm`; missing weights are drawn, in the original's order."""
    m, data = dict(config["model"]), config["data"]
    if m["name"] == "ddpm":
        m.update(embedding_type="positional", fir=False, skip_rescale=False, progressive="none",
                 progressive_input="none", resblock_type="ddpm")  # fmt: skip
    nf, mult, act = m["nf"], m["ch_mult"], NONLINEAR[m["nonlinearity"]]
    last, d = len(mult) - 1, data["num_channels"]
    listed = [data["image_size"] // 2**i in m["attn_resolutions"] for i in range(len(mult))]
    keys = (f"all_modules.{i}" for i in itertools.count())
    ends = [math.log(m["sigma_max"]), math.log(m["sigma_min"])]
    table = torch.linspace(*ends, m["num_scales"], dtype=torch.float64).exp()
    sigmas = p.keep("sigmas", table)

    if m["embedding_type"] == "fourier":
        w = p.take(f"{next(keys)}.W", nf, std=m["fourier_scale"])
        angle = label.log()[:, None] * w[None] * 2 * math.pi
        emb, sigma = torch.cat([angle.sin(), angle.cos()], 1), label
    else:
        emb, sigma = sinusoids(label, nf), sigmas[label.long()]
    temb = None
    if m["conditional"]:
        temb = p.linear(next(keys), emb, 4 * nf)
        temb = p.linear(next(keys), act(temb), 4 * nf)

    if not data["centered"]:
        x = 2 * x - 1
    pyramid = x
    h = p.conv(next(keys), x, nf)
    skips = [h]
    for level, factor in enumerate(mult):
        for _ in range(m["num_res_blocks"]):
            h = res(p, next(keys), h, temb, nf * factor, m)
            if listed[level]:
                h = attention(p, next(keys), h, m)
            skips.append(h)
        if level == last:
            break
        key = next(keys)
        if m["resblock_type"] == "biggan":
            h = res(p, key, h, temb, h.shape[1], m, down)
        else:
            h = down_conv(p, key, h, h.shape[1], m) if m["resamp_with_conv"] else down(h, m)
        if m["progressive_input"] == "input_skip":
            pyramid = down(pyramid, m)
            side = p.conv(f"{next(keys)}.Conv_0", pyramid, h.shape[1], 1)
            h = side + h if m["progressive_combine"] == "sum" else torch.cat([side, h], 1)
        elif m["progressive_input"] == "residual":
            pyramid = h = rescaled(down_conv(p, next(keys), pyramid, h.shape[1], m) + h, m)
        skips.append(h)

    h = res(p, next(keys), h, temb, h.shape[1], m)
    h = attention(p, next(keys), h, m)
    h = res(p, next(keys), h, temb, h.shape[1], m)

    out = None
    for level in reversed(range(len(mult))):
        for _ in range(m["num_res_blocks"] + 1):
            joined = torch.cat([h, skips.pop()], 1)
            h = res(p, next(keys), joined, temb, nf * mult[level], m)
        if listed[level]:
            h = attention(p, next(keys), h, m)
        if m["progressive"] == "output_skip":
            side = act(norm(p, next(keys), h, m))
            side = p.conv(next(keys), side, d)
            out = side if out is None else up(out, m) + side
        if level:
            key = next(keys)
            if m["resblock_type"] == "biggan":
                h = res(p, key, h, temb, h.shape[1], m, up)
            else:
                h = up(h, m)
                h = p.conv(f"{key}.Conv_0", h, h.shape[1]) if m["resamp_with_conv"] else h
    assert not skips
    if out is None:
        h = act(norm(p, next(keys), h, m))
        out = p.conv(next(keys), h, d)
    return out / sigma[:, None, None, None] if m["scale_by_sigma"] else out


# Scores


def score(p, config, x, t=None, step=None):
    """The original's score at its continuous time `t`, or of a discrete process at `step`.

    Steps count from little noise: the time of step i is i/(N - 1).
    """
    m, training = config["model"], config["training"]
    kind, n = training["sde"], m["num_scales"]
    if step is not None:
        t = step.double() / (n - 1)
    bmin, bmax = m["beta_min"], m["beta_max"]
    log_mean = -(t.double() ** 2) * (bmax - bmin) / 4 - t.double() * bmin / 2
    if kind == "vesde":
        if training["continuous"]:
            label = m["sigma_min"] * (m["sigma_max"] / m["sigma_min"]) ** t.double()
        else:
            label = ((1 - t) * (n - 1)).round()
        return network(p, config, x, label.float())
    if kind == "subvpsde":
        label, std = 999 * t, 1 - torch.exp(2 * log_mean)
    elif training["continuous"]:
        label, std = 999 * t, (1 - torch.exp(2 * log_mean)).sqrt()
    else:
        kept = (1 - torch.linspace(bmin / n, bmax / n, n, dtype=torch.float64)).cumprod(0)
        label, std = t * (n - 1), (1 - kept).sqrt()[step]
    return -network(p, config, x, label.float()) / std[:, None, None, None].float()


def drawn(config, seed=0):
    """A state dict of random weights."""
    tape, data = Tape(seed), config["data"]
    network(tape, config, torch.zeros(1, data["num_channels"], *[data["image_size"]] * 2),
            torch.ones(1))  # fmt: skip
    return tape
