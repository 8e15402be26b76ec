r"""ADM's classifier of noisy items, ``log p(y | x_t)`` as the logits of the way down of ADM.

The way down and the middle of ADM, then one of four pools:

    adaptive:    W mean(silu(norm h)) + b
    attention:   one query, the mean of all positions, attends to them and to itself
    spatial:     a perceptron of the mean of every feature map of the way down, joined
    spatial-v2:  the same, with a group norm and SiLU instead of the ReLU

Its gradient in ``x_t`` guides a model that was trained on the same chain.

Sources: Diffusion Models Beat GANs on Image Synthesis (Dhariwal & Nichol, 2021), section 4,
https://arxiv.org/abs/2105.05233; attention as a pool: Learning Transferable Visual Models From
Natural Language Supervision (Radford et al., 2021), https://arxiv.org/abs/2103.00020.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..config import unknown
from .adm import Condition, Parts, Trunk, check, silence
from .layers import activate
from .layout import padded, weights_last

POOLS = ("adaptive", "attention", "spatial", "spatial-v2")
HIDDEN = 2048


class AttentionPool(nn.Module):
    """What the mean of all positions gathers from them by attention.

    Args:
        positions: number of positions.
        channels: channels of the input.
        outside: channels of the output.
        heads: number of heads.
    """

    def __init__(self, positions: int, channels: int, outside: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels do not split into {heads} attention heads")
        self.heads = heads
        places = torch.randn(positions + 1, channels) / math.sqrt(channels)
        self.positions = nn.Parameter(places)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, outside)

    def forward(self, h: Tensor) -> Tensor:
        """``(B, C, *spatial)`` to ``(B, outside)``."""
        tokens = h.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + self.positions
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = functional.scaled_dot_product_attention(q[:, :, :1], k, v)
        return self.out(h.flatten(1))


@dataclass(eq=False, repr=False)
class ADMClassifier(nn.Module):
    """Logits ``F(x, c_noise)`` of the classes of noisy items ``(C, *spatial)``.

    Args:
        shape: shape of one item, ``(C, *spatial)``; sizes that are no multiples of
            ``2^(levels - 1)`` are padded with zeros.
        num_classes: number of classes.
        width: ``M``; the embedding is four times as wide.
        multipliers: channels of each level, in units of ``width``.
        blocks: residual blocks a level.
        attention: levels (0 is the full resolution) with self-attention after each block; it
            also sits in the middle of the network.
        head_dim: channels of an attention head; a level with fewer has no attention.
        pool: ``"adaptive"``, ``"attention"``, ``"spatial"`` or ``"spatial-v2"``.
        adaptive: whether the embedding scales and shifts instead of being added.
        resample: ``"block"``, ``"conv"`` or ``"plain"``, as in :class:`~scoresde.nets.adm.ADM`.
        groups: groups of the group norms; None for a quarter of the channels, at most 32.
        embedding: features of ``c_noise``, ``"waves"`` for a quarter of the log of the noise
            level, or ``"positional"`` for a step of 0 to 1000.
        dropout: rate of dropout within the residual blocks.
        checkpointing: whether blocks are computed again in the backward pass, to save memory.
    """

    shape: tuple[int, ...]
    num_classes: int = 1000
    width: int = 128
    multipliers: tuple[float, ...] = (1, 2, 3, 4)
    blocks: int = 2
    attention: tuple[int, ...] = (1, 2, 3)
    head_dim: int = 64
    pool: str = "attention"
    adaptive: bool = True
    resample: str = "block"
    groups: int | None = 32
    embedding: str = "waves"
    dropout: float = 0.0
    checkpointing: bool = False

    name: ClassVar[str] = "adm-classifier"
    presets: ClassVar[dict[str, dict[str, object]]] = {
        "tiny": {
            "width": 32,
            "multipliers": (1, 2),
            "blocks": 1,
            "attention": (1,),
            "head_dim": 32,
        },
        "small": {
            "width": 64,
            "multipliers": (1, 2, 2),
            "blocks": 1,
            "attention": (2,),
            "head_dim": 32,
            "dropout": 0.1,
        },
        "imagenet-64": {"blocks": 4},
        "imagenet-128": {"multipliers": (1, 1, 2, 3, 4), "attention": (2, 3, 4)},
        "imagenet-256": {"multipliers": (1, 1, 2, 2, 4, 4), "attention": (3, 4, 5)},
        "imagenet-512": {"multipliers": (0.5, 1, 1, 2, 2, 4, 4), "attention": (4, 5, 6)},
    }

    def __post_init__(self) -> None:
        super().__init__()
        check("adm-classifier", self)
        if self.pool not in POOLS:
            raise unknown("pool of adm-classifier", self.pool, POOLS)
        if self.num_classes < 1:
            raise ValueError(f"the adm-classifier needs classes, num_classes={self.num_classes}")
        channels, *spatial = self.shape
        self.stride = 2 ** (len(self.multipliers) - 1)
        parts = Parts(
            len(spatial),
            4 * self.width,
            self.adaptive,
            self.resample,
            self.groups,
            None,
            self.head_dim,
            self.dropout,
        )
        widths = [round(self.width * m) for m in self.multipliers]
        self.condition = Condition(self.embedding, self.width, None, 0)
        self.trunk = Trunk(parts, channels, widths, self.blocks, self.attention)
        silence(self)
        last = widths[-1]
        self.norm: nn.GroupNorm | None = None
        if self.pool in ("adaptive", "attention"):
            self.norm = parts.norm(last)
        if self.pool == "adaptive":
            self.out: nn.Module = nn.Linear(last, self.num_classes)
            nn.init.zeros_(self.out.weight)  # type: ignore[arg-type]
            nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]
        elif self.pool == "attention":
            positions = math.prod(-(-size // self.stride) for size in spatial)
            heads = max(1, last // self.head_dim)
            self.out = AttentionPool(positions, last, self.num_classes, heads)
        else:
            features = sum(self.trunk.skips) + last
            between = (
                [nn.ReLU()] if self.pool == "spatial" else [nn.GroupNorm(32, HIDDEN), nn.SiLU()]
            )
            ends = nn.Linear(features, HIDDEN), nn.Linear(HIDDEN, self.num_classes)
            self.out = nn.Sequential(ends[0], *between, ends[1])
        weights_last(self, len(spatial))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """``x (B, *shape)``, ``c_noise (B,)`` to logits ``(B, num_classes)``.

        Raises:
            ValueError: for items of another shape.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"x of shape {tuple(x.shape)} does not fit a classifier of (B, *{self.shape})"
            )
        embedding = self.condition(c_noise, None, None)
        h, skips = self.trunk(padded(x, self.stride), embedding, self.checkpointing)
        if self.norm is None:
            return self.out(torch.cat([part.flatten(2).mean(2) for part in [*skips, h]], 1))
        h = activate(self.norm(h))
        return self.out(h if self.pool == "attention" else h.flatten(2).mean(2))
