"""Names of the weights of diffusers' ``UNet2DModel``, turned into ours and back.

Each of our layers has one of theirs, but for attention, whose ``qkv`` joins three. Ours holds 1x1
convolutions as matrices. The oldest files call the four layers of attention ``query``, ``key``,
``value`` and ``proj_attn``.

Source: keys are those that diffusers 0.42 shows,
https://huggingface.co/docs/diffusers/api/models/unet2d.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..files import CheckpointError
from ..nets.layers import Pointwise
from ..nets.ncsnpp import NCSNpp

BLOCK = {
    "norm1": ("norm1",),
    "conv1": ("conv1",),
    "affine": ("time_emb_proj",),
    "norm2": ("norm2",),
    "conv2": ("conv2",),
    "skip": ("conv_shortcut",),
}
ATTENTION = {"norm": ("group_norm",), "qkv": ("to_q", "to_k", "to_v"), "out": ("to_out.0",)}
ENDS = {
    "stem": "conv_in",
    "features": "time_proj",
    "embed1": "time_embedding.linear_1",
    "embed2": "time_embedding.linear_2",
    "class_table": "class_embedding",
    "class_mlp.0": "class_embedding.linear_1",
    "class_mlp.2": "class_embedding.linear_2",
    "head_norm": "conv_norm_out",
    "head": "conv_out",
}
SIDES = {"encoder": "down", "decoder": "up"}
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

STAGE = re.compile(r"(encoder|decoder)\.(\d+)\.stages\.(\d+)\.(block|attention)\.(\w+)")
MIDDLE = re.compile(r"(?:mid|middle)\.(\d+)\.(block|attention)\.(\w+)")
LEVEL = re.compile(r"(encoder|decoder)\.(\d+)\.(resample|attention|pyramid|norm)(?:\.(\w+))?")
OLD_ATTENTION = re.compile(rf"(.*\.attentions\.\d+)\.({'|'.join(OLD)})\.(weight|bias)")


def layers(net: nn.Module) -> dict[str, tuple[str, ...]]:
    """Our layers that hold weights, each with those of diffusers that it joins."""
    skips = isinstance(net, NCSNpp)
    last = len(net.decoder) - 1  # type: ignore[arg-type]
    found = {}
    for key in net.state_dict():
        layer = key.rpartition(".")[0]
        found[layer] = _theirs(layer, skips, last)
    return found


def _theirs(layer: str, skips: bool, last: int) -> tuple[str, ...]:
    if layer in ENDS:
        return (ENDS[layer],)
    if match := STAGE.fullmatch(layer):
        side, level, index, part, leaf = match.groups()
        return _parts(f"{SIDES[side]}_blocks.{level}", index, part, leaf)
    if match := MIDDLE.fullmatch(layer):
        index, part, leaf = match.groups()
        return _parts("mid_block", index, part, leaf)
    match = LEVEL.fullmatch(layer)
    assert match is not None, layer
    side, level, part, leaf = match.groups()
    block = f"{SIDES[side]}_blocks.{level}"
    if part == "resample":
        name = f"resnet_{SIDES[side]}" if skips else f"{SIDES[side]}samplers.0"
        return tuple(f"{block}.{name}.{x}" for x in BLOCK.get(leaf, (leaf,)))
    if part == "attention":
        return _parts(block, "0", part, leaf)
    if side == "decoder" and int(level) == last:  # the last of the pyramid is the network's head
        return ("conv_norm_out",) if part == "norm" else ("conv_out",)
    return (f"{block}.skip_{'norm' if part == 'norm' else 'conv'}",)


def _parts(block: str, index: str, part: str, leaf: str) -> tuple[str, ...]:
    if part == "block":
        return tuple(f"{block}.resnets.{index}.{x}" for x in BLOCK[leaf])
    return tuple(f"{block}.attentions.{index}.{x}" for x in ATTENTION[leaf])


def _keys(net: nn.Module) -> dict[str, tuple[str, ...]]:
    joined, found = layers(net), {}
    for key in net.state_dict():
        layer, _, kind = key.rpartition(".")
        kind = "weight" if kind == "frequencies" else kind
        found[key] = tuple(f"{theirs}.{kind}" for theirs in joined[layer])
    return found


def to_ours(net: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dictionary of a network that one of diffusers is.

    Args:
        net: the network, whose weights are not read (it may lie on the meta device).
        state: the weights of a ``UNet2DModel``.

    Raises:
        CheckpointError: naming keys that are missing or unknown, or a shape that does not fit.
    """
    state = {OLD_ATTENTION.sub(_modern, key): value for key, value in state.items()}
    keys = _keys(net)
    wanted = [k for theirs in keys.values() for k in theirs]
    known = set(wanted)
    missing = [k for k in wanted if k not in state]
    extra = [k for k in state if k not in known]
    for names, what in ((missing, "missing"), (extra, "unknown")):
        if names:
            raise CheckpointError(
                f"the weights do not fit the UNet2DModel of this configuration: "
                f"{what} are {_some(names)}"
            )
    ours = {}
    for key, value in net.state_dict().items():
        rows = len(value) // len(keys[key])
        parts = []
        for k in keys[key]:
            part, shape = state[k], (rows, *value.shape[1:])
            bare = tuple(part.shape[: len(shape)])
            if bare != shape or part.numel() != value.numel() // len(keys[key]):
                raise CheckpointError(
                    f"the weights do not fit the UNet2DModel of this configuration: {k} is "
                    f"{tuple(part.shape)}, the network has {shape}"
                )
            parts.append(part.reshape(shape))
        ours[key] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return ours


def to_theirs(net: nn.Module) -> dict[str, Tensor]:
    """The weights of a network of ours as diffusers names them, copies."""
    state, keys = net.state_dict(), _keys(net)
    matrices = {n for n, m in net.named_modules() if isinstance(m, Pointwise)}
    theirs = {}
    for key, value in state.items():
        layer, _, kind = key.rpartition(".")
        value = value.detach()
        if layer in matrices and kind == "weight":
            value = value[:, :, None, None]
        for k, part in zip(keys[key], value.chunk(len(keys[key])), strict=True):
            theirs[k] = part.clone(memory_format=torch.contiguous_format)
    return theirs


def _modern(match: re.Match[str]) -> str:
    block, name, kind = match.groups()
    return f"{block}.{OLD[name]}.{kind}"


def _some(keys: Iterable[str], most: int = 4) -> str:
    """The first keys, and how many more there are."""
    keys = list(keys)
    rest = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + rest
