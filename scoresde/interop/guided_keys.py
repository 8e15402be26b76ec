"""Weights of improved- and guided-diffusion: what they tell of their network, and their names.

Blocks are numbered through all levels; within one, a residual block, attention if there is any,
and (on the way up) what doubles the resolution. Rows of ``qkv`` go by head, then q, k, v (legacy),
or are ours (new order): keys and shapes are the same.

Source: Diffusion Models Beat GANs on Image Synthesis (Dhariwal & Nichol, 2021),
https://arxiv.org/abs/2105.05233.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import CheckpointError
from ..nets.adm import ADM
from ..nets.adm_classifier import ADMClassifier
from .placed import placed

RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "affine": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
ATTENTION = {"norm": "norm", "qkv": "qkv", "out": "proj_out"}
POOLS = {
    "adaptive": {"norm": "out.0", "out": "out.3"},
    "attention": {"norm": "out.0", "out.qkv": "out.2.qkv_proj", "out.out": "out.2.c_proj"},
    "spatial": {"out.0": "out.0", "out.2": "out.2"},
    "spatial-v2": {"out.0": "out.0", "out.1": "out.1", "out.3": "out.3"},
}


@dataclass(frozen=True)
class Layout:
    """What tensors tell of their network, in the terms of :class:`~scoresde.nets.adm.ADM`.

    Attributes:
        first: for each level, the number of its first block in ``input_blocks``.
    """

    width: int
    multipliers: tuple[float, ...]
    blocks: int
    attention: tuple[int, ...]
    adaptive: bool
    resample: str
    first: tuple[int, ...]

    @classmethod
    def of(cls, state: Mapping[str, Tensor], file: Path, blocks: int | None = None) -> Layout:
        """The layout of a state dictionary.

        Args:
            state: names and tensors.
            file: where they come from, for messages.
            blocks: blocks a level, for a classifier whose own blocks change the resolution.

        Raises:
            CheckpointError: for a missing key, or a number of blocks that makes no levels.
        """

        def shape(key: str) -> torch.Size:
            if key not in state:
                raise CheckpointError(f"{file} is no network of guided-diffusion: it lacks {key}")
            return state[key].shape

        into, out = numbers(state, "input_blocks"), numbers(state, "output_blocks")
        count = max(into) + 1
        strided = [i for i in into if f"input_blocks.{i}.0.op.weight" in state]
        absent = [i for i in range(count) if i not in into]  # nothing but the mean: no weights
        doubling = [
            i
            for i in out
            if any(f"output_blocks.{i}.{k}.in_layers.0.weight" in state for k in (1, 2))
        ]
        if strided:
            resample, level = "conv", strided[0]
        elif absent:
            resample, level = "plain", absent[0]
        elif doubling:
            resample, level = "block", doubling[0] + 1
        else:
            resample, level = "block", count if blocks is None else blocks + 1
        if level < 2 or count % level:
            raise CheckpointError(
                f"{file}: {count} input_blocks do not make levels of {level - 1} residual blocks"
            )
        first = tuple(range(1, count, level))
        width = shape("time_embed.0.weight")[1]
        widths = [shape(f"input_blocks.{i}.0.out_layers.3.weight")[0] for i in first]
        times = [w // width if w % width == 0 else w / width for w in widths]
        return cls(
            width=width,
            multipliers=tuple(times),
            blocks=level - 1,
            attention=tuple(
                n for n, i in enumerate(first) if f"input_blocks.{i}.1.qkv.weight" in state
            ),
            adaptive=shape("input_blocks.1.0.emb_layers.1.weight")[0] == 2 * widths[0],
            resample=resample,
            first=first,
        )


def numbers(state: Mapping[str, Tensor], part: str) -> set[int]:
    """The numbers of the blocks of a part, as ``input_blocks``."""
    found = (re.match(rf"{part}\.(\d+)\.", key) for key in state)
    return {int(match[1]) for match in found if match}


def ours(
    net: ADM | ADMClassifier, state: Mapping[str, Tensor], file: Path, legacy: bool
) -> dict[str, Tensor]:
    """The tensors under the names of ``net``, half precision widened to float32.

    Args:
        net: the network, which may be on the meta device.
        state: names and tensors.
        file: where they come from, for messages.
        legacy: whether rows of ``qkv`` go by head first.

    Raises:
        CheckpointError: naming a tensor that is missing, has no place or another shape.
    """
    layers = dict(modules(net))
    names, turned = {}, ""
    for key in net.state_dict():
        module, _, kind = key.rpartition(".")
        if kind == "positions":
            names[key], turned = "out.2.positional_embedding", key
        else:
            names[key] = f"{layers[module]}.{kind}"

    def rows(key: str, value: Tensor) -> Tensor:
        """Those of ``qkv`` from (head, which, channel) to (which, head, channel)."""
        module = key.rpartition(".")[0]
        if not legacy or not module.endswith("attention.qkv"):
            return value
        heads: Any = net.get_submodule(module.removesuffix(".qkv")).heads
        return value.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)

    found = placed(net, names, state, f"{file} does not fit its flags", turned, rows)
    used = set(names.values())
    extra = [key for key in state if key not in used]
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise CheckpointError(f"{file} does not fit its flags: {extra[0]}{more} has no place")
    return found


def modules(net: ADM | ADMClassifier) -> Iterator[tuple[str, str]]:
    """Names of all layers that the network may have, ours and theirs."""
    yield "condition.embed1", "time_embed.0"
    yield "condition.embed2", "time_embed.2"
    yield "condition.classes", "label_emb"
    yield "trunk.stem", "input_blocks.0.0"
    number = 0
    for n, level in enumerate(net.trunk.levels):
        for s in range(len(level.stages)):  # type: ignore[arg-type]
            number += 1
            yield from stage(f"trunk.levels.{n}.stages.{s}", f"input_blocks.{number}")
        if level.resample is not None:
            number += 1
            here = f"trunk.levels.{n}.resample"
            yield f"{here}.conv", f"input_blocks.{number}.0.op"
            yield from under(here, f"input_blocks.{number}.0", RESIDUAL)
    yield from stage("trunk.middle.0", "middle_block")
    yield from under("trunk.middle.1.block", "middle_block.2", RESIDUAL)
    if isinstance(net, ADMClassifier):
        yield from POOLS[net.pool].items()
        return
    number = 0
    for n, level in enumerate(net.decoder):
        for s in range(len(level.stages)):  # type: ignore[arg-type]
            yield from stage(f"decoder.{n}.stages.{s}", f"output_blocks.{number}")
            number += 1
        attended = level.stages[-1].attention is not None  # type: ignore[index, union-attr]
        place = f"output_blocks.{number - 1}.{2 if attended else 1}"
        yield f"decoder.{n}.resample.conv", f"{place}.conv"
        yield from under(f"decoder.{n}.resample", place, RESIDUAL)
    yield "head_norm", "out.0"
    yield "head", "out.2"


def stage(here: str, there: str) -> Iterator[tuple[str, str]]:
    """Names of the layers of a residual block and the attention after it."""
    yield from under(f"{here}.block", f"{there}.0", RESIDUAL)
    yield from under(f"{here}.attention", f"{there}.1", ATTENTION)


def under(here: str, there: str, names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Names of layers within two modules."""
    for mine, other in names.items():
        yield f"{here}.{mine}", f"{there}.{other}"
