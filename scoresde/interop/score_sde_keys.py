"""Weights of score_sde_pytorch: one list of numbered modules, under the names of ours.

Items are numbered in the order in which the original builds its network:

    [Fourier], [Linear, Linear], stem, each level of the encoder, middle, of the decoder, [head]

Its averaged weights are a bare list, in the order of the parameters that are trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import CheckpointError
from ..nets.layers import Attention, Downsample, ResBlock, Upsample, typed
from ..nets.ncsnpp import NCSNpp

RES = {
    "GroupNorm_0": "norm1",
    "Conv_0": "conv1",
    "Dense_0": "affine",
    "GroupNorm_1": "norm2",
    "Conv_1": "conv2",
    "Conv_2": "skip",
    "NIN_0": "skip",
}


def bare(key: str) -> str:
    """A key without the prefix that DataParallel adds."""
    return key.removeprefix("module.")


def averaged(raw: Mapping[str, Tensor], ema: Any, file: Path) -> dict[str, Tensor]:
    """The raw weights with those of the list put in place of the trained parameters.

    The list leaves out the buffer ``sigmas`` and the Fourier frequencies ``all_modules.0.W``,
    which have no gradient.
    """
    shadow = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    if not isinstance(shadow, (list, tuple)):
        raise CheckpointError(
            f"{file} holds no averaged weights (ema.shadow_params): ask for weights='raw'"
        )
    keys = [key for key in raw if key not in ("sigmas", "all_modules.0.W")]
    if len(shadow) != len(keys):
        raise CheckpointError(
            f"{file}: {len(shadow)} averaged weights (ema.shadow_params) for {len(keys)} trained "
            "parameters"
        )
    for key, value in zip(keys, shadow, strict=True):
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{file}: the averaged {key} is no tensor")
        if value.shape != raw[key].shape:
            raise CheckpointError(
                f"{file}: the averaged {key} is {tuple(value.shape)}, "
                f"the raw one {tuple(raw[key].shape)}"
            )
    return {**raw, **dict(zip(keys, shadow, strict=True))}


def ours(
    net: NCSNpp, raw: Mapping[str, Tensor], file: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights under the names of ``net``, and the keys of the file that it does not use."""
    tensors, used = {}, set()
    # Frequencies have a number even where nothing is embedded.
    first = int(net.embedding == "log-fourier" and not net.conditional)
    for index, (name, module) in enumerate(numbered(net), first):
        prefix = f"all_modules.{index}."
        found = {k.removeprefix(prefix): v for k, v in raw.items() if k.startswith(prefix)}
        for key, value in translated(module, found).items():
            tensors[f"{name}.{key}"] = value
        used |= {prefix + key for key in found if kept(module, key)}
    missing = [key for key in net.state_dict() if key not in tensors]
    if missing:
        raise CheckpointError(
            f"{file} does not fit its configuration: nothing in it for {missing[0]}"
        )
    left = [key for key in raw if key not in used and key != "sigmas"]
    unknown = [key for key in left if net.conditional or not unused(key)]
    if unknown:
        raise CheckpointError(
            f"{file} does not fit its configuration: the network has no place for {unknown[0]}"
        )
    return tensors, left


def numbered(net: NCSNpp) -> Iterator[tuple[str, nn.Module]]:
    """The modules of ``net``, by name, in the order in which the original numbers its own."""
    named = dict(net.named_modules())

    def each(*names: str) -> Iterator[tuple[str, nn.Module]]:
        for name in names:
            if name in named:
                yield name, named[name]

    if net.embedding == "log-fourier" and net.conditional:
        yield from each("features")
    yield from each("embed1", "embed2", "stem")
    for i, level in enumerate(typed(net.encoder)):
        at = f"encoder.{i}"
        for j in range(len(level.stages)):
            yield from each(f"{at}.stages.{j}.block", f"{at}.stages.{j}.attention")
        yield from each(f"{at}.resample", f"{at}.pyramid")
    yield from each("middle.0.block", "middle.0.attention", "middle.1.block")
    for i, level in enumerate(typed(net.decoder)):
        at = f"decoder.{i}"
        for j in range(len(level.stages)):
            yield from each(f"{at}.stages.{j}.block")
        yield from each(f"{at}.attention", f"{at}.norm", f"{at}.pyramid", f"{at}.resample")
    yield from each("head_norm", "head")


def unused(key: str) -> bool:
    """Whether a network without embedding holds this weight in vain."""
    return key == "all_modules.0.W" or ".Dense_0." in key


def kept(module: nn.Module, key: str) -> bool:
    """Whether the module uses the weight: a block without embedding has no use for Dense_0."""
    return not (isinstance(module, ResBlock) and module.affine is None and "Dense_0" in key)


def translated(module: nn.Module, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of one numbered item under the names of its counterpart here."""
    if isinstance(module, ResBlock):
        return {
            f"{RES[block]}.{weight_or_bias(kind)}": matrix(value, kind, RES[block])
            for (block, _, kind), value in ((k.partition("."), v) for k, v in found.items())
            if block in RES and kept(module, block)
        }
    if isinstance(module, Attention):
        q, k, v = (f"NIN_{i}" for i in range(3))
        moved = {
            "norm.weight": found.get("GroupNorm_0.weight"),
            "norm.bias": found.get("GroupNorm_0.bias"),
            "out.weight": found["NIN_3.W"].T if "NIN_3.W" in found else None,
            "out.bias": found.get("NIN_3.b"),
        }
        if all(f"{n}.W" in found and f"{n}.b" in found for n in (q, k, v)):
            moved["qkv.weight"] = torch.cat([found[f"{n}.W"].T for n in (q, k, v)])
            moved["qkv.bias"] = torch.cat([found[f"{n}.b"] for n in (q, k, v)])
        return {key: value for key, value in moved.items() if value is not None}
    if isinstance(module, (Downsample, Upsample)):
        return {f"conv.{k.split('.')[-1]}": v for k, v in found.items()}
    if "W" in found:
        return {"frequencies": found["W"]}
    # An entry of the input pyramid is a 1x1 convolution called Conv_0; the rest has no such name.
    entry = any(key.startswith("Conv_0.") for key in found)
    return {
        k.removeprefix("Conv_0."): matrix(v, k.split(".")[-1], "skip") if entry else v
        for k, v in found.items()
    }


def weight_or_bias(kind: str) -> str:
    """The name that a "network in network" gives otherwise."""
    return {"W": "weight", "b": "bias"}.get(kind, kind)


def matrix(value: Tensor, kind: str, name: str) -> Tensor:
    """A 1x1 convolution (out, in, 1, 1), or a matrix (in, out), as a matrix (out, in)."""
    if name != "skip" or kind in ("bias", "b") or value.ndim < 2:
        return value
    return value.T if kind == "W" else value.flatten(1)
