"""The U-Net of diffusers, ``UNet2DModel``: its configuration and weights as ours, and back.

Pure maps, nothing here reads files. Networks of plain blocks are a
:class:`~scoresde.nets.ddpm.DDPMUNet`, those of ``Skip`` blocks a
:class:`~scoresde.nets.ncsnpp.NCSNpp`, see :mod:`~scoresde.interop.diffusers_skip`.

With ``time_embedding_type`` ``"fourier"`` the label is a noise level, by which the output is
divided; otherwise it is a step of 0 to N - 1.

Source: fields, defaults and conventions are those that diffusers 0.42 shows,
https://huggingface.co/docs/diffusers/api/models/unet2d.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..files import CheckpointError
from ..nets.ddpm import DDPMUNet
from ..nets.ncsnpp import NCSNpp
from . import diffusers_keys, diffusers_skip

DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", *("AttnDownBlock2D",) * 3),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": (*("AttnUpBlock2D",) * 3, "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1.0,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
"""Fields of a ``UNet2DModel``, at the values that a configuration without them has."""

DOWN = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
EMBEDDINGS = {"positional": "positional", "fourier": "log-fourier", "learned": "learned"}
CLASSES = {None: "table", "timestep": "label", "identity": "vector"}
ACTS = {"silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "mish": "mish"}
ADAPTIVE = {"default": False, "scale_shift": True}


def network(config: Mapping[str, Any]) -> DDPMUNet | NCSNpp:
    """The network that a configuration of diffusers describes, with initial weights.

    Args:
        config: ``config.json`` of a ``UNet2DModel``, with its ``sample_size``, in pixels.

    Raises:
        CheckpointError: for a field that is unknown, or a value that neither network has.
    """
    for key, value in config.items():
        if key not in DEFAULTS and not key.startswith("_") and value not in (None, False):
            raise CheckpointError(
                f"unknown field {key} of a UNet2DModel; accepted: {', '.join(DEFAULTS)}"
            )
    c = {key: config.get(key, default) for key, default in DEFAULTS.items()}
    size = c["sample_size"]
    if size is None:
        raise CheckpointError(
            "the configuration of the UNet2DModel has no sample_size, the pixels of a side: "
            "give one"
        )
    _check_kinds(c)
    c["sample_size"] = (size, size) if isinstance(size, int) else tuple(size)
    if any("Skip" in str(kind) for kind in (*c["down_block_types"], *c["up_block_types"])):
        return diffusers_skip.network(c)
    adaptive = _one_of(c, "resnet_time_scale_shift", ADAPTIVE)
    groups = c["attn_norm_num_groups"]
    try:
        _check_blocks(c)
        return DDPMUNet(
            shape=(c["in_channels"], *c["sample_size"]),
            widths=tuple(c["block_out_channels"]),
            blocks=c["layers_per_block"],
            **_levels(c),
            middle=_middle(c),
            padding=_one_of(c, "downsample_padding", {0: (0, 1), 1: (1, 1)}),
            head_dim=c["attention_head_dim"],
            groups=c["norm_num_groups"],
            # Of an adaptive network the middle has no norm unless one is asked for.
            middle_groups=0 if groups is None and adaptive else groups,
            eps=c["norm_eps"],
            adaptive=adaptive,
            middle_scale=c["mid_block_scale_factor"],
            act=_one_of(c, "act_fn", ACTS),
            dropout=c["dropout"],
            embedding=_one_of(c, "time_embedding_type", EMBEDDINGS),
            embedding_width=c["time_embedding_dim"],
            freq_shift=c["freq_shift"],
            cos_first=bool(c["flip_sin_to_cos"]),
            steps=c["num_train_timesteps"] or 1000,
            num_classes=c["num_class_embeds"] if c["class_embed_type"] is None else None,
            classes=_one_of(c, "class_embed_type", CLASSES),
            center_input=bool(c["center_input_sample"]),
            over_label=c["time_embedding_type"] == "fourier",
            out_channels=None if c["out_channels"] == c["in_channels"] else c["out_channels"],
        )
    except CheckpointError:
        raise
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"not a UNet2DModel of plain blocks: {error}") from error


def tensors(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dictionary of :func:`network` that a foreign one is.

    Args:
        config: ``config.json`` of a ``UNet2DModel``.
        state: its weights.

    Raises:
        CheckpointError: naming keys that are missing or unknown, or a shape that does not fit.
    """
    with torch.device("meta"):
        net = network(config)
    return diffusers_keys.to_ours(net, state)


def export(net: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A network as the configuration and the weights of a ``UNet2DModel``.

    Returns:
        the configuration, complete, and the weights, which are copies.

    Raises:
        CheckpointError: if the format cannot hold the network, naming the field.
    """
    if isinstance(net, NCSNpp):
        return {**DEFAULTS, **diffusers_skip.configuration(net)}, diffusers_keys.to_theirs(net)
    if not isinstance(net, DDPMUNet):
        raise CheckpointError(
            f"diffusers' UNet2DModel cannot hold a {type(net).__name__}; accepted: DDPMUNet, and "
            "NCSNpp with pyramids of skips"
        )
    embeddings = {ours: theirs for theirs, ours in EMBEDDINGS.items()}
    hidden = [i for i in net.attention if i in net.residual_down]
    shown = [i for i in net.attention if i not in net.residual_down and i < len(net.widths) - 1]
    up = net.attention if net.attention_up is None else net.attention_up
    hidden_up = [i for i in up if i in net.residual_up and i]
    shown_up = [i for i in up if i not in net.residual_up and i]
    no_norm = net.middle == "attention" and net.middle_groups == 0
    for field, fits, accepted in (
        ("shape", len(net.shape) == 3, "(C, height, width)"),
        ("embedding", net.embedding in embeddings, ", ".join(embeddings)),
        ("over_label", net.over_label == (net.embedding == "log-fourier"), "log-fourier's True"),
        ("residual_down", not (hidden and shown), "all or none of the levels with attention"),
        ("residual_up", not (hidden_up and shown_up), "all or none of those with attention"),
        ("middle_groups", net.adaptive or not no_norm, "more than 0 unless adaptive"),
        ("act", net.act in ACTS, ", ".join(ACTS)),
    ):
        if not fits:
            raise CheckpointError(
                f"diffusers' UNet2DModel cannot hold this DDPMUNet: {field} is "
                f"{getattr(net, field)!r}, accepted: {accepted}"
            )
    groups = net.middle_groups
    if net.adaptive:
        groups = net.groups if groups is None else groups or None
    levels = range(len(net.widths))
    config = {
        "sample_size": diffusers_skip.side(net.shape),
        "in_channels": net.shape[0],
        "out_channels": net.out_channels or net.shape[0],
        "center_input_sample": net.center_input,
        "time_embedding_type": embeddings[net.embedding],
        "time_embedding_dim": net.embedding_width,
        "freq_shift": net.freq_shift,
        "flip_sin_to_cos": net.cos_first,
        "down_block_types": [_kind(DOWN, i, net.attention, net.residual_down) for i in levels],
        "mid_block_type": None if net.middle == "none" else "UNetMidBlock2D",
        "up_block_types": [_kind(UP, i, up, net.residual_up) for i in reversed(levels)],
        "block_out_channels": list(net.widths),
        "layers_per_block": net.blocks,
        "mid_block_scale_factor": net.middle_scale,
        "downsample_padding": net.padding[0],
        "downsample_type": "resnet" if hidden else "conv",
        "upsample_type": "resnet" if hidden_up else "conv",
        "dropout": net.dropout,
        "act_fn": net.act,
        "attention_head_dim": net.head_dim,
        "norm_num_groups": net.groups,
        "attn_norm_num_groups": groups,
        "norm_eps": net.eps,
        "resnet_time_scale_shift": "scale_shift" if net.adaptive else "default",
        "add_attention": net.middle == "attention",
        "class_embed_type": {ours: theirs for theirs, ours in CLASSES.items()}[net.classes],
        "num_class_embeds": net.num_classes if net.classes == "table" else None,
        "num_train_timesteps": net.steps if net.embedding == "learned" else None,
    }
    return {"_class_name": "UNet2DModel", **config}, diffusers_keys.to_theirs(net)


def _one_of(config: Mapping[str, Any], key: str, accepted: Mapping[Any, Any]) -> Any:
    if config[key] not in accepted:
        raise CheckpointError(
            f"{key} of a UNet2DModel is {config[key]!r}, accepted: {', '.join(map(str, accepted))}"
        )
    return accepted[config[key]]


def _check_kinds(c: Mapping[str, Any]) -> None:
    """Refuses values of another type than the field's, naming it."""
    size = c["sample_size"]
    if type(size) is not int and not (_row_of(size, int) and len(size) == 2):
        raise CheckpointError(f"sample_size of a UNet2DModel is {size!r}, accepted: one or two "
                              "whole numbers")  # fmt: skip
    for key, default in DEFAULTS.items():
        value, many = c[key], isinstance(default, tuple)
        kind = float if key == "freq_shift" else type(default[0] if many else default)
        fits = _row_of(value, kind) if many else value is None or _is(value, kind)
        if default is not None and not fits:
            words = f"a list of type {kind.__name__}" if many else f"the type {kind.__name__}"
            raise CheckpointError(f"{key} of a UNet2DModel is {value!r}, accepted: {words}")
    if c["attention_head_dim"] is not None and c["attention_head_dim"] < 1:
        raise CheckpointError(
            f"attention_head_dim of a UNet2DModel is {c['attention_head_dim']}, accepted: 1 or "
            "more, null"
        )


def _row_of(value: Any, kind: type) -> bool:
    return isinstance(value, (list, tuple)) and all(_is(v, kind) for v in value)


def _is(value: Any, kind: type) -> bool:
    return type(value) is kind or (kind is float and type(value) is int)


def _check_blocks(c: Mapping[str, Any]) -> None:
    counts = {len(c[k]) for k in ("down_block_types", "up_block_types", "block_out_channels")}
    if len(counts) != 1:
        raise CheckpointError(
            "down_block_types, up_block_types and block_out_channels of a UNet2DModel differ in "
            "their lengths"
        )
    for key, accepted in (("down_block_types", DOWN), ("up_block_types", UP)):
        for kind in c[key]:
            if kind not in accepted:
                raise CheckpointError(
                    f"{key} of a UNet2DModel has {kind!r}, accepted: {', '.join(accepted)}"
                )
    for key in ("downsample_type", "upsample_type"):
        _one_of(c, key, {"conv": 0, "resnet": 1, None: 0})


def _levels(c: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of :class:`DDPMUNet` that list levels, of the blocks' names."""
    last = len(c["block_out_channels"]) - 1
    found: dict[str, Any] = {}
    for attention, residual, kinds, name, type_ in (
        ("attention", "residual_down", c["down_block_types"], DOWN, "downsample_type"),
        ("attention_up", "residual_up", c["up_block_types"][::-1], UP, "upsample_type"),
    ):
        unresampled = last if attention == "attention" else 0
        blocks = {name[2], name[1] if c[type_] == "resnet" else None}
        found[attention] = tuple(i for i, kind in enumerate(kinds) if kind == name[1])
        found[residual] = tuple(
            i for i, kind in enumerate(kinds) if kind in blocks and i != unresampled
        )
    if found["attention_up"] == found["attention"]:
        found["attention_up"] = None
    return found


def _middle(c: Mapping[str, Any]) -> str:
    if _one_of(c, "mid_block_type", {None: True, "UNetMidBlock2D": False}):
        return "none"
    return "attention" if c["add_attention"] else "plain"


def _kind(
    names: tuple[str, ...], level: int, attention: tuple[int, ...], residual: tuple[int, ...]
) -> str:
    if level in attention:
        return names[1]
    return names[2] if level in residual else names[0]
