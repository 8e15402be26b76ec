"""Weights of a network of diffusers: one file or shards, perhaps of several variants.

A set of weights is ``diffusion_pytorch_model[.VARIANT].safetensors`` or ``.bin``, or shards that
``diffusion_pytorch_model.safetensors.index[.VARIANT].json`` lists. Variants are known by their
names only: ``fp16`` and ``bf16`` are half precision, ``non_ema`` raw weights beside averaged ones.

Source: the layout is that of diffusers 0.42, https://huggingface.co/docs/diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from ..files import CheckpointError, read_tensors
from ..inert import read_torch
from .foreign import settings

STEM = "diffusion_pytorch_model"
WEIGHTS = re.compile(
    rf"{STEM}(?:\.(?P<variant>[A-Za-z0-9_]+))?\.(?P<kind>safetensors|bin)"
    rf"|{STEM}\.(?P<kind_>safetensors|bin)\.index(?:\.(?P<variant_>[A-Za-z0-9_]+))?\.json"
)


def read_weights(place: Path, weights: str) -> tuple[dict[str, Tensor], Path, str]:
    """Tensors as stored, the file that holds or lists them, and its variant.

    Args:
        place: the network's folder.
        weights: ``"ema"`` or ``"raw"``, where it holds variants of these names.

    Raises:
        CheckpointError: if there are no weights, or a file of them is missing or damaged.
    """
    found = {(variant, kind): path for variant, kind, path in _weight_files(place)}
    if not found:
        raise CheckpointError(
            f"no weights at {place}: there is neither {STEM}.safetensors nor {STEM}.bin"
        )
    first = ["ema", ""] if weights == "ema" else ["non_ema", "raw", ""]
    rest = sorted({variant for variant, _ in found} - set(first))
    for variant in first + rest:
        for kind in ("safetensors", "bin"):
            if (variant, kind) in found:
                file = found[variant, kind]
                state = _sharded(file) if file.suffix == ".json" else _tensors(file)
                return state, file, variant
    raise AssertionError


def _weight_files(place: Path) -> Iterator[tuple[str, str, Path]]:
    """Variant, kind and path of each set of weights, whole files last, which override."""
    files = sorted(place.iterdir(), key=lambda p: p.suffix != ".json")
    for path in files:
        if match := WEIGHTS.fullmatch(path.name):
            variant = match["variant"] or match["variant_"] or ""
            yield variant, match["kind"] or match["kind_"], path


def has(place: Path, variant: str) -> bool:
    """Whether a folder holds weights of this variant."""
    return any(found == variant for found, _, _ in _weight_files(place))


def _sharded(file: Path) -> dict[str, Tensor]:
    shards = settings(file, (), file).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{file} has no weight_map")
    state: dict[str, Tensor] = {}
    for name in sorted(set(map(str, shards.values()))):
        if Path(name).name != name:
            raise CheckpointError(f"{file} names a shard outside of its folder: {name}")
        state |= _tensors(file.parent / name)
    lacking = [key for key in shards if key not in state]
    if lacking:
        raise CheckpointError(f"{file} lists {lacking[0]}, which none of its shards holds")
    return state


def _tensors(file: Path) -> dict[str, Tensor]:
    state = read_tensors(file) if file.suffix == ".safetensors" else read_torch(file)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{file} holds no state dictionary, names and tensors")
    return state
