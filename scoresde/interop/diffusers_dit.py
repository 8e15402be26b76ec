"""The transformer of diffusers, ``DiTTransformer2DModel``, as a :class:`~scoresde.nets.dit.DiT`.

Pure maps of configurations and of state dictionaries, both ways; nothing here reads files. In that
format each block has an embedding of step and class of its own, and the output layer takes the
first block's. Weights that were trained with a shared one, as the published DiT-XL, hold a copy
for each block: ``shared_embedding=True`` keeps one.

Labels are steps 0 to 999; the null class has the index ``num_embeds_ada_norm``; where
``out_channels`` is twice ``in_channels``, the first half is the noise. Older files are of the
class ``Transformer2DModel`` and may hold the fixed positions, which are compared to ours.

Source: keys, defaults and conventions are those that diffusers 0.42 shows,
https://huggingface.co/docs/diffusers/api/models/dit_transformer2d.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..files import CheckpointError
from ..nets.dit import DiT, grid_waves

DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "dropout": 0.0,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_eps": 1e-5,
}
"""Fields that shape the network, at the values that a configuration without them has."""

FIXED: dict[str, Any] = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
    # Fields of Transformer2DModel.
    "cross_attention_dim": None,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "double_self_attention": False,
    "use_linear_projection": False,
    "attention_type": "default",
    "caption_channels": None,
    "interpolation_scale": None,
    "use_additional_conditions": None,
}
"""Fields that have one value in a DiT."""

IDLE = ("norm_num_groups", "upcast_attention")
"""Fields without effect on a DiT's output."""

POSITIONS = "pos_embed.pos_embed"


def network(config: Mapping[str, Any], *, shared_embedding: bool = False) -> DiT:
    """The network that a configuration of diffusers describes, with initial weights.

    Args:
        config: ``config.json`` of a ``DiTTransformer2DModel``.
        shared_embedding: keep one embedding for all blocks; see :func:`shares_embedding`.

    Raises:
        CheckpointError: for a field that is unknown, or whose value a DiT does not have.
    """
    for key, value in config.items():
        if key in FIXED and value != FIXED[key]:
            raise CheckpointError(
                f"{key} of a diffusers DiT is {FIXED[key]!r} here, the configuration has {value!r}"
            )
        if not (key.startswith("_") or key in IDLE or key in FIXED or key in DEFAULTS):
            raise CheckpointError(
                f"unknown field {key} of a diffusers DiT; accepted: "
                f"{', '.join([*DEFAULTS, *FIXED, *IDLE])}"
            )
    c = {key: config.get(key, default) for key, default in DEFAULTS.items()}
    optional = ("out_channels", "dropout", "attention_bias", "norm_eps")
    for key in DEFAULTS:
        if key not in optional and (type(c[key]) is not int or c[key] < 1):
            raise CheckpointError(
                f"{key} of a diffusers DiT is a positive integer, the configuration has {c[key]!r}"
            )
    try:
        return DiT(
            shape=(c["in_channels"], c["sample_size"], c["sample_size"]),
            patch=c["patch_size"],
            width=c["num_attention_heads"] * c["attention_head_dim"],
            depth=c["num_layers"],
            heads=c["num_attention_heads"],
            dropout=c["dropout"],
            num_classes=c["num_embeds_ada_norm"],
            out_channels=c["out_channels"],
            embedding="positional",
            freq_shift=1.0,
            shared_embedding=shared_embedding,
            qkv_bias=c["attention_bias"],
            mlp_eps=c["norm_eps"],
        )
    except ValueError as error:
        raise CheckpointError(f"not a diffusers DiT: {error}") from error


def shares_embedding(state: Mapping[str, Tensor]) -> bool:
    """Whether all blocks of a state dictionary of diffusers hold the same embedding."""
    for key, tensor in state.items():
        _, found, rest = key.partition(".norm1.emb.")
        if found:
            first = state.get(_embedder(0, rest))
            if first is None or not torch.equal(tensor, first):
                return False
    return True


def tensors(
    config: Mapping[str, Any], state: Mapping[str, Tensor], *, shared_embedding: bool = False
) -> dict[str, Tensor]:
    """The state dictionary of :func:`network` that a foreign one is.

    Args:
        config: ``config.json`` of a ``DiTTransformer2DModel``.
        state: its weights.
        shared_embedding: as the network has it.

    Raises:
        CheckpointError: naming keys that are missing or unknown, a shape that does not fit, fixed
            positions other than ours, or an embedding that differs between blocks that share it.
    """
    with torch.device("meta"):
        net = network(config, shared_embedding=shared_embedding)
    wanted = export(net)[1]
    missing = [key for key in wanted if key not in state]
    extra = [key for key in state if key not in wanted and key != POSITIONS]
    for keys, what in ((missing, "are missing"), (extra, "are unknown")):
        if keys:
            raise CheckpointError(
                f"the weights do not fit a diffusers DiT of this configuration: "
                f"{_some(keys)} {what}"
            )
    for key, like in wanted.items():
        if state[key].shape != like.shape:
            raise CheckpointError(
                f"the weights do not fit a diffusers DiT of this configuration: {key} is "
                f"{tuple(state[key].shape)}, the network has {tuple(like.shape)}"
            )
    if POSITIONS in state:
        _compare_positions(net, state[POSITIONS])

    ours = {}
    for key, theirs in _keys(net).items():
        parts = [state[k] for k in theirs]
        if key.startswith("conditions."):
            for k, part in zip(theirs, parts, strict=True):
                if not torch.equal(part, parts[0]):
                    raise CheckpointError(
                        f"the embedding is not shared: {k} differs from {theirs[0]}; "
                        f"read it with shared_embedding=False"
                    )
            ours[key] = parts[0]
        elif key == "stem.weight":
            ours[key] = parts[0].permute(0, 2, 3, 1).flatten(1)
        else:
            ours[key] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return ours


def export(net: DiT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A network as the configuration and the state dictionary of a ``DiTTransformer2DModel``.

    Returns:
        the configuration, complete, and the weights, which are copies.

    Raises:
        CheckpointError: if the format cannot hold the network, naming the field.
    """
    _, *spatial = net.shape
    for key, fits, accepted in (
        ("shape", len(spatial) == 2 and len(set(spatial)) == 1, "(C, size, size)"),
        ("embedding", net.embedding == "positional", "'positional'"),
        ("freq_shift", net.freq_shift == 1, "1"),
        ("mlp_ratio", net.mlp_ratio == 4, "4"),
        ("num_classes", bool(net.num_classes), "at least 1"),
        ("width", net.width % 4 == 0, "a multiple of 4"),
    ):
        if not fits:
            raise CheckpointError(
                f"diffusers cannot hold this DiT: {key} is {getattr(net, key)!r}, "
                f"accepted: {accepted}"
            )
    config = {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": net.heads,
        "attention_head_dim": net.width // net.heads,
        "in_channels": net.shape[0],
        "out_channels": net.shape[0] if net.out_channels is None else net.out_channels,
        "num_layers": net.depth,
        "dropout": net.dropout,
        "norm_num_groups": 32,
        "attention_bias": net.qkv_bias,
        "sample_size": spatial[0],
        "patch_size": net.patch,
        "activation_fn": FIXED["activation_fn"],
        "num_embeds_ada_norm": net.num_classes,
        "upcast_attention": False,
        "norm_type": FIXED["norm_type"],
        "norm_elementwise_affine": FIXED["norm_elementwise_affine"],
        "norm_eps": net.mlp_eps,
    }
    state, foreign = net.state_dict(), {}
    for key, theirs in _keys(net).items():
        value = state[key].detach()
        if key.startswith("conditions."):
            parts = [value] * len(theirs)
        elif key == "stem.weight":
            cut = value.unflatten(1, (net.patch, net.patch, net.shape[0]))
            parts = [cut.permute(0, 3, 1, 2)]
        else:
            parts = list(value.chunk(len(theirs)))
        for k, part in zip(theirs, parts, strict=True):
            foreign[k] = part.clone(memory_format=torch.contiguous_format)
    return config, foreign


EMBEDDER = {
    "embed.mlp.0": "timestep_embedder.linear_1",
    "embed.mlp.2": "timestep_embedder.linear_2",
    "classes": "class_embedder.embedding_table",
}
BLOCK = {
    "modulation": ("norm1.linear",),
    "qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "out": ("attn1.to_out.0",),
    "mlp.0": ("ff.net.0.proj",),
    "mlp.3": ("ff.net.2",),
}
ENDS = {"stem": "pos_embed.proj", "head.modulation": "proj_out_1", "head.linear": "proj_out_2"}


def _embedder(block: int, key: str) -> str:
    return f"transformer_blocks.{block}.norm1.emb.{key}"


def _keys(net: DiT) -> dict[str, tuple[str, ...]]:
    """Our keys, each with those of diffusers that it joins or (an embedding) stands for."""
    layers: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in ENDS.items()}
    for i in range(len(net.conditions)):
        blocks = range(net.depth) if net.shared_embedding else (i,)
        for ours, name in EMBEDDER.items():
            layers[f"conditions.{i}.{ours}"] = tuple(_embedder(b, name) for b in blocks)
    for i in range(net.depth):
        for ours, parts in BLOCK.items():
            layers[f"body.{i}.{ours}"] = tuple(f"transformer_blocks.{i}.{p}" for p in parts)
    found = {}
    for key in net.state_dict():
        layer, _, kind = key.rpartition(".")
        found[key] = tuple(f"{name}.{kind}" for name in layers[layer])
    return found


def _compare_positions(net: DiT, stored: Tensor) -> None:
    """Refuses fixed positions that are not ours."""
    base = net.positions.base
    ours = grid_waves(base, base, net.width)
    stored = stored.detach().to("cpu", torch.float64).reshape(-1, stored.shape[-1])
    if stored.shape != ours.shape or (stored - ours).abs().max() > 1e-2:
        raise CheckpointError(
            f"{POSITIONS} does not hold the sines and cosines of a grid of {base[0]}x{base[1]}"
        )


def _some(keys: Iterable[str], most: int = 4) -> str:
    """The first keys, and how many more there are."""
    keys = list(keys)
    rest = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + rest
