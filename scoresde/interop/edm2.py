"""Networks of EDM2: names of their settings and of their weights, turned into ours.

The original pickles hold a preconditioned network: the keyword arguments that it was built with,
and tensors, often float16, under ``unet.`` (the U-Net) and ``logvar_`` (its uncertainty). The
preconditioning itself, ``sigma_data`` and the VAE of the networks for latents are the reader's
concern. Not yet compared with published weights.

Source: Analyzing and Improving the Training Dynamics of Diffusion Models (Karras et al., 2024),
https://arxiv.org/abs/2312.02696.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..files import CheckpointError
from ..nets.edm2 import EDM2

FIELDS = {
    "model_channels": "width",
    "num_blocks": "blocks",
    "channels_per_head": "head_dim",
    "label_balance": "label_balance",
    "concat_balance": "concat_balance",
    "res_balance": "res_balance",
    "attn_balance": "attn_balance",
    "clip_act": "clip",
    "dropout": "dropout",
    "logvar_channels": "uncertainty_width",
}
"""Settings that only change their name."""
NEEDED = ("img_resolution", "img_channels", "label_dim")
OTHERS = (
    "channel_mult",
    "attn_resolutions",
    "channel_mult_noise",
    "channel_mult_emb",
    "resample_filter",
)
ASIDE = ("class_name", "use_fp16", "sigma_data")
"""Settings that do not concern the network itself."""

TOP = {
    "unet.emb_fourier.freqs": "fourier.freqs",
    "unet.emb_fourier.phases": "fourier.phases",
    "unet.emb_noise.weight": "noise.weight",
    "unet.emb_label.weight": "label.weight",
    "unet.out_gain": "out_gain",
    "unet.out_conv.weight": "out.weight",
    "logvar_fourier.freqs": "uncertainty_fourier.freqs",
    "logvar_fourier.phases": "uncertainty_fourier.phases",
    "logvar_linear.weight": "uncertainty.weight",
}
BLOCK = {
    "emb_gain": "gain",
    "conv_res0.weight": "conv0.weight",
    "emb_linear.weight": "modulation.weight",
    "conv_res1.weight": "conv1.weight",
    "conv_skip.weight": "skip.weight",
    "attn_qkv.weight": "qkv.weight",
    "attn_proj.weight": "proj.weight",
}
STEM = re.compile(r"unet\.enc\.\d+x\d+_conv\.weight")
PART = re.compile(r"unet\.(enc|dec)\.(\d+x\d+_(?:down|up|in[01]|block\d+))\.(.+)")


def network(init_kwargs: Mapping[str, Any]) -> EDM2:
    """The untrained network of given settings.

    Args:
        init_kwargs: keyword arguments of the preconditioned network, among them ``img_resolution``
            (pixels), ``img_channels`` and ``label_dim`` (0 for no classes).

    Raises:
        CheckpointError: for settings that are missing, unknown or not supported.
    """
    known = (*NEEDED, *FIELDS, *OTHERS, *ASIDE)
    missing = [key for key in NEEDED if key not in init_kwargs]
    if missing:
        raise CheckpointError(f"the settings of an EDM2 network lack {', '.join(missing)}")
    strange = sorted(key for key in init_kwargs if key not in known)
    if strange:
        raise CheckpointError(
            f"unknown settings of an EDM2 network: {', '.join(strange)}; "
            f"known: {', '.join(sorted(known))}"
        )
    taps = [float(tap) for tap in init_kwargs.get("resample_filter", (1, 1))]
    if len(taps) != 2 or taps[0] != taps[1] or not taps[0]:
        raise CheckpointError(f"resample_filter of an EDM2 network must be [1, 1], got {taps}")
    fields: dict[str, Any] = {
        ours: init_kwargs[theirs] for theirs, ours in FIELDS.items() if theirs in init_kwargs
    }
    multipliers = tuple(init_kwargs.get("channel_mult", EDM2.multipliers))
    width = fields.get("width", EDM2.width)
    for theirs, ours in (
        ("channel_mult_noise", "noise_width"),
        ("channel_mult_emb", "embedding_width"),
    ):
        times = init_kwargs.get(theirs)
        fields[ours] = None if times is None else int(width * times)
    resolution = init_kwargs["img_resolution"]
    try:
        return EDM2(
            (init_kwargs["img_channels"], resolution, resolution),
            multipliers=multipliers,
            attention=tuple(init_kwargs.get("attn_resolutions", EDM2.attention)),
            num_classes=init_kwargs["label_dim"] or None,
            **fields,
        )
    except ValueError as error:
        raise CheckpointError(f"settings of an EDM2 network: {error}") from error


def tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the preconditioned network under our names, half precision widened to float32.

    Args:
        state: names, such as ``unet.enc.64x64_conv.weight``, and tensors.

    Returns:
        What ``load_state_dict`` of :func:`network` takes strictly.

    Raises:
        CheckpointError: naming tensors that have no place in the network.
    """
    found, strange = {}, []
    for key, value in state.items():
        name = renamed(key)
        if name is None:
            strange.append(key)
            continue
        half = value.dtype in (torch.float16, torch.bfloat16)
        found[name] = value.float() if half else value
    if strange:
        more = f" and {len(strange) - 4} more" if len(strange) > 4 else ""
        raise CheckpointError(
            f"tensors that no EDM2 network has: {', '.join(strange[:4])}{more}; expected "
            f"names such as unet.enc.64x64_conv.weight, unet.out_gain, logvar_linear.weight"
        )
    return found


def renamed(key: str) -> str | None:
    """Our name of a tensor, None where there is none."""
    if key in TOP:
        return TOP[key]
    if STEM.fullmatch(key):
        return "stem.weight"
    match = PART.fullmatch(key)
    if match is None or match[3] not in BLOCK:
        return None
    side = {"enc": "encoder", "dec": "decoder"}[match[1]]
    return f"{side}.{match[2]}.{BLOCK[match[3]]}"
