"""NCSN++ in diffusers: a ``UNet2DModel`` of ``Skip`` blocks, its configuration as ours and back.

These blocks filter with (1, 3, 3, 1), divide residual sums by sqrt(2), and add pyramids of the
input and the output: an :class:`~scoresde.nets.ncsnpp.NCSNpp` of fixed options. Their group norms
hold a quarter of the channels as groups, at most 32, but at levels with attention some always have
32, or count the channels of a skip connection otherwise (``diffusers_groups``). From 128 channels
on all agree.

Source: fields and conventions are those that diffusers 0.42 shows,
https://huggingface.co/docs/diffusers/api/models/unet2d.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..files import CheckpointError
from ..nets.ncsnpp import NCSNpp

DOWN = ("SkipDownBlock2D", "AttnSkipDownBlock2D")
UP = ("SkipUpBlock2D", "AttnSkipUpBlock2D")
TAPS = (1.0, 3.0, 3.0, 1.0)
LEAST = 128
"""Channels from which the group norms of levels with attention are those of NCSN++."""


def network(c: Mapping[str, Any]) -> NCSNpp:
    """The network of a complete configuration, ``sample_size`` a pair.

    Raises:
        CheckpointError: for a value that NCSN++ does not have, naming the field.
    """
    down, up = tuple(c["down_block_types"]), tuple(c["up_block_types"])
    widths, fourier = tuple(c["block_out_channels"]), c["time_embedding_type"] == "fourier"
    if not widths or {len(down), len(up)} != {len(widths)}:
        raise CheckpointError(
            "down_block_types, up_block_types and block_out_channels of a UNet2DModel differ in "
            "their lengths"
        )
    positional = c["time_embedding_type"] == "positional"
    plain = c["freq_shift"] == 1 and not c["flip_sin_to_cos"]
    sqrt2 = math.isclose(c["mid_block_scale_factor"], math.sqrt(2), rel_tol=1e-6)
    for key, fits, accepted in (
        ("down_block_types", set(down) <= set(DOWN), ", ".join(DOWN)),
        ("up_block_types", set(up) <= set(UP), ", ".join(UP)),
        ("block_out_channels", not any(w % widths[0] for w in widths), "multiples of the first"),
        ("in_channels", c["in_channels"] == 3, "3"),
        ("out_channels", c["out_channels"] == 3, "3"),
        ("time_embedding_type", fourier or positional, "fourier, positional"),
        ("freq_shift", fourier or plain, "1, with flip_sin_to_cos false"),
        ("time_embedding_dim", c["time_embedding_dim"] in (None, 4 * widths[0]), "null"),
        ("mid_block_type", c["mid_block_type"] == "UNetMidBlock2D", "UNetMidBlock2D"),
        ("add_attention", c["add_attention"], "true"),
        ("mid_block_scale_factor", sqrt2, "sqrt(2)"),
        ("act_fn", c["act_fn"] in ("silu", "swish"), "silu"),
        ("attention_head_dim", c["attention_head_dim"] is None, "null"),
        ("norm_num_groups", c["norm_num_groups"] is None, "null"),
        ("attn_norm_num_groups", c["attn_norm_num_groups"] is None, "null"),
        ("norm_eps", math.isclose(c["norm_eps"], 1e-6), "1e-6"),
        ("resnet_time_scale_shift", c["resnet_time_scale_shift"] == "default", "default"),
        ("class_embed_type", c["class_embed_type"] is None, "null"),
        ("num_class_embeds", c["num_class_embeds"] is None, "null"),
    ):
        if not fits:
            raise CheckpointError(
                f"{key} of a UNet2DModel of Skip blocks is {c[key]!r}, accepted: {accepted}"
            )
    attention = tuple(i for i, kind in enumerate(down) if kind == DOWN[1])
    if attention != tuple(i for i, kind in enumerate(reversed(up)) if kind == UP[1]):
        raise CheckpointError(
            "down_block_types and up_block_types of a UNet2DModel of Skip blocks have attention "
            "at different levels: NCSN++ has it at the same"
        )
    try:
        return NCSNpp(
            shape=(3, *c["sample_size"]),
            width=widths[0],
            multipliers=tuple(w // widths[0] for w in widths),
            blocks=c["layers_per_block"],
            attention=attention,
            taps=TAPS,
            input_pyramid="skip",
            output_pyramid="skip",
            embedding="log-fourier" if fourier else "positional",
            noise_width=2 * widths[0] if fourier else None,
            dropout=c["dropout"],
            center_input=bool(c["center_input_sample"]),
            scale_by_sigma=fourier,
            diffusers_groups=bool(attention) and min(widths[i] for i in attention) < LEAST,
        )
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"not a UNet2DModel of Skip blocks: {error}") from error


def configuration(net: NCSNpp) -> dict[str, Any]:
    """The fields of a ``UNet2DModel`` that a network has.

    Raises:
        CheckpointError: if the format cannot hold the network, naming the field.
    """
    fourier = net.embedding == "log-fourier"
    features = 2 * net.width if fourier else net.width
    for field, fits, accepted in (
        ("shape", len(net.shape) == 3 and net.shape[0] == 3, "(3, height, width)"),
        ("resblock", net.resblock == "biggan", "biggan"),
        ("taps", net.taps == TAPS, str(TAPS)),
        ("input_pyramid", net.input_pyramid == "skip", "skip"),
        ("output_pyramid", net.output_pyramid == "skip", "skip"),
        ("combine", net.combine == "sum", "sum"),
        ("embedding", fourier or net.embedding == "positional", "log-fourier, positional"),
        ("noise_width", (net.noise_width or net.width) == features, str(features)),
        ("skip_rescale", net.skip_rescale, "True"),
        ("groups", net.groups is None, "None"),
        ("act", net.act == "silu", "silu"),
        ("conditional", net.conditional, "True"),
        ("scale_by_sigma", net.scale_by_sigma == fourier, str(fourier)),
        ("out_channels", net.out_channels in (None, 3), "3"),
        ("num_classes", not net.num_classes, "None"),
        ("augment", not net.augment, "0"),
    ):
        if not fits:
            raise CheckpointError(
                f"diffusers' UNet2DModel cannot hold this NCSNpp: {field} is "
                f"{getattr(net, field)!r}, accepted: {accepted}"
            )
    levels = range(len(net.multipliers))
    widths = [net.width * m for m in net.multipliers]
    least = min([widths[i] for i in levels if i in net.attention], default=LEAST)
    if least < LEAST and not net.diffusers_groups:
        raise CheckpointError(
            f"a level with attention of {least} channels: below {LEAST} the Skip blocks of "
            "diffusers normalise in other groups (diffusers_groups)"
        )
    return {
        "_class_name": "UNet2DModel",
        "sample_size": side(net.shape),
        "center_input_sample": net.center_input,
        "time_embedding_type": "fourier" if fourier else "positional",
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "down_block_types": [DOWN[i in net.attention] for i in levels],
        "up_block_types": [UP[i in net.attention] for i in reversed(levels)],
        "block_out_channels": widths,
        "layers_per_block": net.blocks,
        "mid_block_scale_factor": math.sqrt(2),
        "dropout": net.dropout,
        "attention_head_dim": None,
        "norm_num_groups": None,
        "norm_eps": 1e-6,
    }


def side(shape: tuple[int, ...]) -> int | list[int]:
    """``sample_size`` of a shape: one number of a square, which some pipelines need."""
    _, height, width = shape
    return height if height == width else [height, width]
