"""EDM's SongUNet: settings and weights of its DDPM++ and NCSN++ as those of ours.

The two compute the same function (but for the order in which a few linear maps are applied), so
that only names change: attention moves out of its block, and the rows of ``qkv``, whose fastest
index is which of the three they are, are put in order.

Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
https://arxiv.org/abs/2206.00364.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..files import CheckpointError
from ..nets.ncsnpp import NCSNpp

ARGUMENTS = (
    "img_resolution", "in_channels", "out_channels", "label_dim", "augment_dim",
    "model_channels", "channel_mult", "channel_mult_emb", "num_blocks", "attn_resolutions",
    "dropout", "label_dropout", "embedding_type", "channel_mult_noise", "encoder_type",
    "decoder_type", "resample_filter",
)  # fmt: skip
PYRAMID = {"standard": "none", "skip": "skip", "residual": "residual"}
TOP = {
    "map_noise": "features",
    "map_label": "classes",
    "map_augment": "augmentation",
    "map_layer0": "embed1",
    "map_layer1": "embed2",
}
BLOCK = {
    "norm0": "norm1",
    "conv0": "conv1",
    "affine": "affine",
    "norm1": "norm2",
    "conv1": "conv2",
    "skip": "skip",
}
ATTENTION = {"norm2": "norm", "qkv": "qkv", "proj": "out"}
PART = re.compile(r"(enc|dec)\.(\d+)x\d+_(\w+?)(\d*)\.(.+)")


def network(kwargs: Mapping[str, Any]) -> NCSNpp:
    """The untrained network that SongUNet's arguments describe.

    Raises:
        CheckpointError: for an argument that is missing or not supported.
    """
    size, channels = int(kwargs["img_resolution"]), int(kwargs["in_channels"])
    multipliers = row(kwargs, "channel_mult", (1, 2, 2, 2))
    width = int(kwargs.get("model_channels", 128))
    taps = tuple(float(v) for v in row(kwargs, "resample_filter", (1, 1), whole=False))
    listed = set(row(kwargs, "attn_resolutions", (16,)))
    if taps != taps[::-1] or len(taps) % 2 or len(taps) > 64 or not 0 < abs(sum(taps)) < math.inf:
        raise CheckpointError(f"resample_filter {taps[:8]} is not symmetric and of even length")
    if kwargs.get("channel_mult_emb", 4) != 4:
        raise CheckpointError(f"channel_mult_emb is {kwargs['channel_mult_emb']}; accepted: 4")
    encoder, decoder = (
        PYRAMID[choice(kwargs, f"{way}_type", accepted)]
        for way, accepted in (("encoder", tuple(PYRAMID)), ("decoder", ("standard", "skip")))
    )
    return NCSNpp(
        shape=(channels, size, size),
        out_channels=int(kwargs["out_channels"]),
        width=width,
        multipliers=multipliers,
        blocks=int(kwargs.get("num_blocks", 4)),
        attention=tuple(i for i in range(len(multipliers)) if size >> i in listed),
        taps=taps,
        input_pyramid=encoder,
        output_pyramid=decoder,
        embedding=choice(kwargs, "embedding_type", ("positional", "fourier")),
        noise_width=width * int(kwargs.get("channel_mult_noise", 1)),
        dropout=float(kwargs.get("dropout", 0.1)),
        num_classes=int(kwargs.get("label_dim", 0)) or None,
        augment=int(kwargs.get("augment_dim", 0)),
    )


def row(
    kwargs: Mapping[str, Any], name: str, default: tuple[int, ...], *, whole: bool = True
) -> tuple[Any, ...]:
    """An argument that must be a list of numbers, whole ones unless said otherwise."""
    value, kinds = kwargs.get(name, default), (int,) if whole else (int, float)
    if not isinstance(value, (list, tuple)) or not all(type(v) in kinds for v in value):
        words = "a list of whole numbers" if whole else "a list of numbers"
        raise CheckpointError(f"{name} is {value!r}; accepted: {words}")
    return tuple(value)


def choice(kwargs: Mapping[str, Any], name: str, accepted: tuple[str, ...]) -> str:
    """An argument that must be one of some words, the first by default."""
    value = str(kwargs.get(name, accepted[0]))
    if value not in accepted:
        raise CheckpointError(f"{name} is {value!r}; accepted: {', '.join(accepted)}")
    return value


def tensors(state: Mapping[str, Tensor], net: NCSNpp) -> dict[str, Tensor]:
    """SongUNet's weights under our names; those that have none keep their own.

    The filters, which the network makes itself, are left out.
    """
    found = {}
    for key, value in state.items():
        if not key.endswith("resample_filter"):
            name, moved = renamed(key, value, net)
            found[name] = moved
    return found


def renamed(key: str, value: Tensor, net: NCSNpp) -> tuple[str, Tensor]:
    """One weight's name here, and its value in our layout."""
    first, _, rest = key.partition(".")
    if first in TOP:
        return f"{TOP[first]}.{'frequencies' if rest == 'freqs' else rest}", value
    match = PART.fullmatch(key)
    if match is None:
        return key, value
    side, size, part, number, inner = match.groups()
    levels = len(net.multipliers)
    level = (net.shape[1] // int(size)).bit_length() - 1
    if side == "enc":
        # What leads down belongs to the level above it.
        above = f"encoder.{level - 1}"
        place = {
            "conv": "stem",
            "down": f"{above}.resample",
            "aux_skip": f"{above}.pyramid",
            "aux_residual": f"{above}.pyramid.conv",
            "block": f"encoder.{level}.stages.{number}",
        }.get(part)
    else:
        # What leads up belongs to the level below it; number 0 of ours is the lowest.
        at = f"decoder.{levels - 1 - level}"
        alone = net.output_pyramid != "skip"
        place = {
            "in": f"middle.{number}",
            "up": f"decoder.{levels - 2 - level}.resample",
            "aux_norm": "head_norm" if alone else f"{at}.norm",
            "aux_conv": "head" if alone else f"{at}.pyramid",
            "block": f"{at}.stages.{number}",
        }.get(part)
    if place is None:
        return key, value
    layer, _, kind = inner.partition(".")
    if layer in ATTENTION:
        decoder_block = side == "dec" and part == "block"
        holder = f"decoder.{levels - 1 - level}" if decoder_block else place
        if layer == "qkv":
            value = grouped(value)
        return f"{holder}.attention.{ATTENTION[layer]}.{kind}", flat(value)
    if layer in BLOCK:
        block = place if part in ("down", "up") else f"{place}.block"
        return f"{block}.{BLOCK[layer]}.{kind}", flat(value) if layer == "skip" else value
    return f"{place}.{inner}", flat(value) if part == "aux_skip" else value


def grouped(rows: Tensor, heads: int = 1) -> Tensor:
    """Rows of ``qkv`` from (head, channel, which) to (which, head, channel)."""
    return rows.unflatten(0, (heads, -1, 3)).movedim(2, 0).flatten(0, 2)


def flat(weight: Tensor) -> Tensor:
    """A 1x1 convolution (out, in, 1, ...) as a matrix (out, in)."""
    return weight.flatten(1) if weight.ndim > 1 else weight
