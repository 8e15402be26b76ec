r"""ADM, the U-Net of guided diffusion, and EDM's version of it.

Residual blocks modulated by the embedding (a scale and a shift, or a sum), self-attention at
several resolutions on both ways, and blocks (or convolutions) that change the resolution. With
``M = width`` and the label's row of a table,

    e = silu(W_2 silu(W_1 (waves(c_noise) + A augment)) + classes[y])

Networks of OpenAI's improved- and guided-diffusion are told a step of their chain and often give
twice the channels, the second half about the variance; EDM's is told a quarter of the log of the
noise level. A network for super-resolution sees the small picture, stretched, as more channels.

Sources: Diffusion Models Beat GANs on Image Synthesis (Dhariwal & Nichol, 2021),
https://arxiv.org/abs/2105.05233; Improved Denoising Diffusion Probabilistic Models (Nichol &
Dhariwal, 2021), https://arxiv.org/abs/2102.09672; Elucidating the Design Space of Diffusion-Based
Generative Models (Karras et al., 2022), https://arxiv.org/abs/2206.00364.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..config import unknown
from .embed import Positional, Waves, class_rows
from .layers import (
    CONV,
    Attention,
    Downsample,
    GroupNorm,
    Level,
    Resampling,
    ResBlock,
    Stage,
    Upsample,
    activate,
    group_norm,
    positive,
    run,
    typed,
)
from .layout import cropped, image_for, padded, weights_last
from .resample import Resampler

STRETCH = {1: "linear", 2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True)
class Parts:
    """The layers that the network and its classifier are built of.

    Args:
        n: number of spatial axes.
        embedding: width of the embedding.
        adaptive: whether the embedding scales and shifts instead of being added.
        resample: ``"block"``, ``"conv"`` or ``"plain"``.
        groups: groups of the group norms; None for a quarter of the channels, at most 32.
        heads: number of heads, None for ``channels // head_dim``.
        head_dim: channels of a head.
        dropout: rate of dropout within the residual blocks.
    """

    n: int
    embedding: int
    adaptive: bool
    resample: str
    groups: int | None
    heads: int | None
    head_dim: int
    dropout: float

    @cached_property
    def resampler(self) -> Resampler:
        """The mean of neighbours, and the nearest neighbour."""
        return Resampler(self.n)

    def norm(self, channels: int) -> GroupNorm:
        """A group norm."""
        return group_norm(channels, self.groups, 1e-5)

    def block(self, inside: int, outside: int, resample: str | None = None) -> ResBlock:
        """A residual block, which may change the resolution."""
        return ResBlock(
            self.n,
            inside,
            outside,
            self.embedding,
            norm=self.norm,
            adaptive=self.adaptive,
            resample=resample,
            resampler=self.resampler,
            dropout=self.dropout,
        )

    def attention(self, channels: int, heads: int | None = None) -> Attention | None:
        """Self-attention; None where the channels do not make one head."""
        heads = heads or self.heads or channels // self.head_dim
        return Attention(channels, heads, norm=self.norm) if heads else None

    def resampled(self, channels: int, way: str) -> nn.Module:
        """What halves (``way`` is ``"down"``) or doubles (``"up"``) the resolution."""
        if self.resample == "block":
            return self.block(channels, channels, way)
        if self.resample == "plain":
            return Resampling(self.resampler, way)
        if way == "up":
            return Upsample(self.n, channels, channels, self.resampler)
        return Downsample(self.n, channels, channels)


class Condition(nn.Module):
    """The activated embedding of noise level, class and augmentation, see the module's equation.

    Args:
        kind: ``"waves"`` of a quarter of the log of the noise level, or ``"positional"``.
        width: number of features; the embedding has four times as many.
        num_classes: number of classes, None for none.
        augment: number of augmentation labels, 0 for none.
    """

    def __init__(self, kind: str, width: int, num_classes: int | None, augment: int) -> None:
        super().__init__()
        if kind not in ("waves", "positional"):
            raise unknown("embedding of adm", kind, ("waves", "positional"))
        self.features = Waves(width) if kind == "waves" else Positional(width, 0.0, cos_first=True)
        self.augmentation = nn.Linear(augment, width, bias=False) if augment else None
        self.embed1, self.embed2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)
        self.classes = nn.Embedding(num_classes, 4 * width) if num_classes else None
        if self.augmentation is not None:
            nn.init.zeros_(self.augmentation.weight)

    def forward(self, c_noise: Tensor, y: Tensor | None, augment: Tensor | None) -> Tensor:
        """Labels ``c_noise (B,)``, ``y (B,)`` or ``(B, num_classes)``, to ``(B, 4 width)``."""
        dtype = self.embed1.weight.dtype
        e = self.features(c_noise).to(dtype)
        if self.augmentation is not None and augment is not None:
            e = e + self.augmentation(augment.to(dtype))
        e = self.embed2(functional.silu(self.embed1(e)))
        if self.classes is not None and y is not None:
            rows = class_rows(y, self.classes.num_embeddings)
            e = e + rows.to(dtype) @ self.classes.weight
        return functional.silu(e)


class Trunk(nn.Module):
    """The way down and the middle, with which both the network and its classifier begin.

    Attributes:
        skips: channels of each of the ways across.
    """

    def __init__(
        self,
        parts: Parts,
        inside: int,
        widths: list[int],
        blocks: int,
        attention: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.stem = CONV[parts.n](inside, widths[0], 3, padding=1)
        self.levels = nn.ModuleList()
        current, self.skips = widths[0], [widths[0]]
        for i, width in enumerate(widths):
            level = Level()
            for _ in range(blocks):
                attend = parts.attention(width) if i in attention else None
                level.stages.append(Stage(parts.block(current, width), attend))
                current = width
                self.skips.append(current)
            if i < len(widths) - 1:
                level.resample = parts.resampled(current, "down")
                self.skips.append(current)
            self.levels.append(level)
        self.middle = nn.ModuleList(
            [
                Stage(parts.block(current, current), parts.attention(current)),
                Stage(parts.block(current, current), None),
            ]
        )

    def forward(
        self, x: Tensor, embedding: Tensor, checkpointing: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """``(B, C, *spatial)``, ``(B, E)`` to the middle and the ways across, the first first."""
        h = self.stem(x)
        skips = [h]
        for level in typed(self.levels):
            for stage in level.stages:
                h = run(stage, h, embedding, again=checkpointing)
                skips.append(h)
            if level.resample is not None:
                h = resampled(level.resample, h, embedding, again=checkpointing)
                skips.append(h)
        for stage in self.middle:
            h = run(stage, h, embedding, again=checkpointing)
        return h, skips


def resampled(layer: nn.Module, h: Tensor, embedding: Tensor, *, again: bool) -> Tensor:
    """The output of what changes the resolution, a block or a layer that takes no embedding."""
    return run(layer, h, embedding, again=again) if isinstance(layer, ResBlock) else layer(h)


@dataclass(eq=False, repr=False)
class ADM(nn.Module):
    """ADM ``F(x, c_noise, y)`` for items ``(C, *spatial)`` with 1 to 3 spatial axes.

    Args:
        shape: shape of one item, ``(C, *spatial)``.
        width: ``M``; the embedding is four times as wide.
        multipliers: channels of each level, in units of ``width``; fractions too.
        blocks: residual blocks a level on the way down (one more on the way up).
        attention: levels (0 is the full resolution) with self-attention after each block; it
            also sits in the middle of the network.
        heads: number of heads, None for as many as ``head_dim`` gives.
        head_dim: channels of a head; a level with fewer has no attention.
        decoder_heads: number of heads on the way up, as the others if None.
        adaptive: whether the embedding scales and shifts instead of being added.
        resample: what changes the resolution: a ``"block"``, a ``"conv"``, or nothing but the
            mean and the nearest neighbour, ``"plain"``.
        groups: groups of the group norms; None for a quarter of the channels, at most 32.
        embedding: features of ``c_noise``: ``"waves"`` for a quarter of the log of the noise
            level, ``"positional"`` (cosines first) for a step of 0 to 1000, and in EDM's version.
        dropout: rate of dropout within the residual blocks.
        low_res: whether the network refines a smaller picture, the condition ``low_res``.
        out_channels: channels of the output, those of the items if None.
        num_classes: number of classes of ``y``, None for an unconditional network.
        image_channels: channels of the condition ``image``, joined to the input; 0 for none.
        augment: number of augmentation labels, 0 for none.
        checkpointing: whether blocks are computed again in the backward pass, to save memory.
    """

    shape: tuple[int, ...]
    width: int = 128
    multipliers: tuple[float, ...] = (1, 2, 3, 4)
    blocks: int = 2
    attention: tuple[int, ...] = (1, 2, 3)
    heads: int | None = None
    head_dim: int = 64
    decoder_heads: int | None = None
    adaptive: bool = True
    resample: str = "block"
    groups: int | None = 32
    embedding: str = "waves"
    dropout: float = 0.0
    low_res: bool = False
    out_channels: int | None = None
    num_classes: int | None = None
    image_channels: int = 0
    augment: int = 0
    checkpointing: bool = False

    name: ClassVar[str] = "adm"
    presets: ClassVar[dict[str, dict[str, object]]] = {
        "tiny": {
            "width": 32,
            "multipliers": (1, 2),
            "blocks": 1,
            "attention": (1,),
            "head_dim": 32,
        },
        "imagenet-64": {"width": 192, "blocks": 3, "dropout": 0.1},
        "imagenet-128": {
            "width": 256,
            "multipliers": (1, 1, 2, 3, 4),
            "attention": (2, 3, 4),
            "heads": 4,
        },
        "imagenet-256": {
            "width": 256,
            "multipliers": (1, 1, 2, 2, 4, 4),
            "attention": (3, 4, 5),
        },
        "imagenet-512": {
            "width": 256,
            "multipliers": (0.5, 1, 1, 2, 2, 4, 4),
            "attention": (4, 5, 6),
        },
        "edm-imagenet-64": {"width": 192, "blocks": 3, "groups": None, "dropout": 0.1},
    }

    def __post_init__(self) -> None:
        super().__init__()
        check("adm", self)
        positive("adm", self, "num_classes", "out_channels")
        n, data = len(self.shape) - 1, self.shape[0]
        widths = [round(self.width * m) for m in self.multipliers]
        self.stride = 2 ** (len(widths) - 1)
        self.condition = Condition(self.embedding, self.width, self.num_classes, self.augment)
        parts = Parts(
            n,
            4 * self.width,
            self.adaptive,
            self.resample,
            self.groups,
            self.heads,
            self.head_dim,
            self.dropout,
        )
        inside = (2 * data if self.low_res else data) + self.image_channels
        self.trunk = Trunk(parts, inside, widths, self.blocks, self.attention)
        self.decoder = nn.ModuleList()
        current, skips = widths[-1], list(self.trunk.skips)
        for i, width in reversed(list(enumerate(widths))):
            level = Level()
            for _ in range(self.blocks + 1):
                attend = i in self.attention
                level.stages.append(
                    Stage(
                        parts.block(current + skips.pop(), width),
                        parts.attention(width, self.decoder_heads) if attend else None,
                    )
                )
                current = width
            if i:
                level.resample = parts.resampled(current, "up")
            self.decoder.append(level)
        self.head_norm = parts.norm(current)
        self.head = CONV[n](current, self.out_channels or data, 3, padding=1)
        silence(self)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)
        weights_last(self, n)

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        y: Tensor | None = None,
        low_res: Tensor | None = None,
        augment: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        """``x (B, C, *spatial)``, ``c_noise (B,)``, conditions to ``(B, out, *spatial)``.

        Args:
            x: noisy items.
            c_noise: what the network is told about the noise.
            y: classes, indices ``(B,)`` or one-hot rows ``(B, num_classes)``; None, a row of
                zeros and the index ``num_classes`` say nothing.
            low_res: the small pictures ``(B, C, *smaller)``, for a network with ``low_res``.
            augment: augmentation labels ``(B, augment)``, None for none.
            image: joined to the input, ``(B, image_channels, *spatial)``; None is one of zeros.

        Raises:
            ValueError: if ``low_res`` is missing where the network needs it, or given otherwise.
        """
        embedding = self.condition(c_noise, y, augment)
        spatial = x.shape[2:]
        if self.low_res != (low_res is not None):
            have = "needs the condition low_res" if self.low_res else "takes no condition low_res"
            raise ValueError(f"this adm {have}, field low_res is {self.low_res}")
        image = image_for(x, image, self.image_channels)
        if low_res is not None:
            mode = STRETCH[len(spatial)]
            small = functional.interpolate(low_res.to(x.dtype), size=spatial, mode=mode)
            x = torch.cat([x, small], 1)
        x = torch.cat([x, image], 1)
        h, skips = self.trunk(padded(x, self.stride), embedding, self.checkpointing)
        for level in typed(self.decoder):
            for stage in level.stages:
                h = torch.cat([h, skips.pop()], 1)
                h = run(stage, h, embedding, again=self.checkpointing)
            if level.resample is not None:
                h = resampled(level.resample, h, embedding, again=self.checkpointing)
        return cropped(self.head(activate(self.head_norm(h))), spatial)


def silence(net: nn.Module) -> None:
    """Zero weights at the end of each residual branch, so that it starts as the identity."""
    for module in net.modules():
        if isinstance(module, (ResBlock, Attention)):
            end = module.conv2 if isinstance(module, ResBlock) else module.out
            for parameter in end.parameters():
                nn.init.zeros_(parameter)


def check(name: str, net: Any) -> None:
    """Refuses fields that make no network, and makes tuples of lists."""
    for field in ("shape", "multipliers", "attention"):
        setattr(net, field, tuple(getattr(net, field)))
    if len(net.shape) - 1 not in CONV:
        raise ValueError(
            f"the {name} takes items of shape (C, *spatial) with 1 to 3 spatial axes, "
            f"not {net.shape}; use the mlp for vectors"
        )
    if not net.multipliers or min(net.multipliers) <= 0 or net.width < 4 or net.blocks < 1:
        raise ValueError(f"the {name} needs width >= 4, blocks >= 1 and multipliers > 0")
    if net.head_dim < 1 or (getattr(net, "heads", None) or 1) < 1:
        raise ValueError(f"the {name} needs head_dim >= 1, and heads >= 1 or none given")
    if net.resample not in ("block", "conv", "plain"):
        raise unknown(f"resample of {name}", net.resample, ("block", "conv", "plain"))
