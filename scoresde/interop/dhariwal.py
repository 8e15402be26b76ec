"""EDM's version of ADM, its class DhariwalUNet: names of settings and weights, turned into ours.

Its wiring is that of :class:`~scoresde.nets.adm.ADM` with groups of four channels or more and
heads of 64; the pickle that holds it, and its preconditioning, are the reader's concern. Rows of
``qkv`` go by head, channel, and q, k, v fastest; the table of the classes is transposed.

Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
https://arxiv.org/abs/2206.00364.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..files import CheckpointError
from ..nets.adm import ADM
from .placed import placed
from .song_unet import grouped

DEFAULTS: dict[str, Any] = {
    "model_channels": 192,
    "channel_mult": (1, 2, 3, 4),
    "channel_mult_emb": 4,
    "num_blocks": 3,
    "attn_resolutions": (32, 16, 8),
    "dropout": 0.1,
    "augment_dim": 0,
    "label_dim": 0,
    "out_channels": None,
}
ARGUMENTS = ("img_resolution", "in_channels", *DEFAULTS, "label_dropout")
BLOCK = {
    "norm0": "block.norm1",
    "conv0": "block.conv1",
    "affine": "block.affine",
    "norm1": "block.norm2",
    "conv1": "block.conv2",
    "skip": "block.skip",
    "norm2": "attention.norm",
    "qkv": "attention.qkv",
    "proj": "attention.out",
}


def network(init_kwargs: Mapping[str, Any]) -> ADM:
    """The untrained network of given settings.

    Args:
        init_kwargs: keyword arguments of the network, or of the preconditioned one around it:
            ``img_resolution`` (pixels) and ``in_channels`` or ``img_channels`` are needed. What
            does not concern the network itself is passed over.

    Raises:
        CheckpointError: for settings that are missing or not supported.
    """
    channels = init_kwargs.get("in_channels", init_kwargs.get("img_channels"))
    if channels is None or "img_resolution" not in init_kwargs:
        name = "img_resolution" if channels else "img_channels"
        raise CheckpointError(f"the settings of a DhariwalUNet lack {name}")
    s = {key: init_kwargs.get(key, default) for key, default in DEFAULTS.items()}
    if s["channel_mult_emb"] != 4:
        raise CheckpointError(
            f"channel_mult_emb of a DhariwalUNet must be 4, got {s['channel_mult_emb']!r}"
        )
    size, levels = init_kwargs["img_resolution"], range(len(s["channel_mult"]))
    try:
        return ADM(
            (channels, size, size),
            width=s["model_channels"],
            multipliers=tuple(s["channel_mult"]),
            blocks=s["num_blocks"],
            attention=tuple(i for i in levels if size >> i in s["attn_resolutions"]),
            groups=None,
            embedding="positional",
            dropout=s["dropout"],
            out_channels=None if s["out_channels"] == channels else s["out_channels"],
            num_classes=s["label_dim"] or None,
            augment=s["augment_dim"],
        )
    except ValueError as error:
        raise CheckpointError(f"settings of a DhariwalUNet: {error}") from error


def tensors(state: Mapping[str, Tensor], init_kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors under our names, half precision widened to float32.

    Args:
        state: names, such as ``enc.32x32_conv.weight`` (``model.`` before them or not), and
            tensors.
        init_kwargs: as :func:`network` takes them.

    Returns:
        What ``load_state_dict`` of :func:`network` takes strictly.

    Raises:
        CheckpointError: naming tensors that are missing, have no place or another shape.
    """
    with torch.device("meta"):
        net = network(init_kwargs)
    state = {key.removeprefix("model."): value for key, value in state.items()}
    layers = dict(_modules(net))
    names = {}
    for key in net.state_dict():
        module, _, kind = key.rpartition(".")
        names[key] = f"{layers[module]}.{kind}"

    def rows(key: str, value: Tensor) -> Tensor:
        """Those of ``qkv`` from (head, channel, which) to (which, head, channel)."""
        module = key.rpartition(".")[0]
        if not module.endswith(".qkv"):
            return value
        heads: Any = net.get_submodule(module.removesuffix(".qkv")).heads
        return grouped(value, heads)

    misfit = "not a DhariwalUNet of these settings"
    found = placed(net, names, state, misfit, "condition.classes.weight", rows)
    used = set(names.values())
    for key in state:
        if key.endswith(".resample_filter"):
            if (state[key] != 0.25).any():
                raise CheckpointError(f"{key} of a DhariwalUNet must be the mean of 2x2 pixels")
        elif key not in used:
            raise CheckpointError(f"not a DhariwalUNet of these settings: {key} has no place")
    return found


def _modules(net: ADM) -> Iterator[tuple[str, str]]:
    """Names of all layers that the network may have, ours and theirs."""
    for ours, theirs in (("augmentation", "augment"), ("embed1", "layer0"), ("embed2", "layer1")):
        yield f"condition.{ours}", f"map_{theirs}"
    yield "condition.classes", "map_label"
    size = net.shape[1]
    yield "trunk.stem", f"enc.{size}x{size}_conv"
    last = len(net.multipliers) - 1
    blocks = {"trunk.middle.0": f"dec.{size >> last}x{size >> last}_in0"}
    blocks["trunk.middle.1"] = f"dec.{size >> last}x{size >> last}_in1"
    for level in range(last + 1):
        side = size >> level
        above, below, up = size >> max(level - 1, 0), size >> (level + 1), last - level
        for i in range(net.blocks):
            blocks[f"trunk.levels.{level}.stages.{i}"] = f"enc.{side}x{side}_block{i}"
        for i in range(net.blocks + 1):
            blocks[f"decoder.{up}.stages.{i}"] = f"dec.{side}x{side}_block{i}"
        for ours, theirs in (
            (f"trunk.levels.{level}.resample", f"enc.{below}x{below}_down"),
            (f"decoder.{up}.resample", f"dec.{above}x{above}_up"),
        ):
            for part, layer in BLOCK.items():
                yield f"{ours}.{layer.removeprefix('block.')}", f"{theirs}.{part}"
    for ours, theirs in blocks.items():
        for part, layer in BLOCK.items():
            yield f"{ours}.{layer}", f"{theirs}.{part}"
    yield "head_norm", "out_norm"
    yield "head", "out_conv"
