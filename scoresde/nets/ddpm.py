r"""DDPM's U-Net: attention after every block of a level, convolutions that halve and double.

    encoder level:  blocks x [residual block, attention], then half the resolution
    middle:         residual block, attention, residual block
    decoder level:  (blocks + 1) x [residual block of cat(h, skip), attention], then twice

Unlike in :class:`~scoresde.nets.ncsnpp.NCSNpp`, attention follows each block of the decoder too,
and nothing is rescaled. Later networks of the same build let residual blocks change the resolution
and the embedding scale and shift, cut attention into heads, and attend at other levels on the way
up than on the way down.

Sources: Denoising Diffusion Probabilistic Models (Ho et al., 2020),
https://arxiv.org/abs/2006.11239; the later options: Improved Denoising Diffusion Probabilistic
Models (Nichol & Dhariwal, 2021), https://arxiv.org/abs/2102.09672.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..config import unknown
from .embed import Positional, class_rows, noise_features
from .layers import (
    ACTIVATIONS,
    CONV,
    Attention,
    Downsample,
    ResBlock,
    Stage,
    Upsample,
    activate,
    group_norm,
    positive,
    run,
    uniform_,
)
from .layout import cropped, padded, weights_last
from .resample import Resampler

EMBEDDINGS = ("waves", "positional", "fourier", "log-fourier", "learned")
CLASSES = ("table", "label", "vector")
MIDDLES = ("attention", "plain", "none")


class Steps(nn.Embedding):
    """A learned vector for each step of a discrete chain; labels are rounded to the nearest."""

    def forward(self, c_noise: Tensor) -> Tensor:
        """``(B,)`` to ``(B, width)``."""
        return super().forward(c_noise.round().long().clamp(0, self.num_embeddings - 1))


class Level(nn.Module):
    """Stages at one resolution, and the way to the next one, None at the last."""

    def __init__(self, stages: list[Stage], resample: nn.Module | None) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.resample = resample


@dataclass(eq=False, repr=False)
class DDPMUNet(nn.Module):
    """DDPM's U-Net ``F(x, c_noise, y)`` for items ``(C, *spatial)``, 1 to 3 spatial axes.

    Args:
        shape: shape of one item, ``(C, *spatial)``.
        widths: channels of each level.
        blocks: residual blocks a level on the way down (one more on the way up).
        attention: levels (0 is the full resolution) with self-attention after each block.
        attention_up: the same of the decoder, as the encoder if None.
        middle: ``"attention"``, ``"plain"`` for its two residual blocks only, or ``"none"``.
        residual_down: levels after which a residual block, no convolution, halves the resolution.
        residual_up: levels after which a residual block doubles the resolution.
        padding: zeros before and after each axis that a convolution halves, (0, 1) or (1, 1).
        head_dim: channels of an attention head, None for one head.
        groups: groups of the group norms.
        middle_groups: groups of the norm of the middle's attention, as the others if None, 0 for
            no norm.
        eps: added to the variances of the group norms.
        adaptive: whether the embedding scales and shifts instead of being added.
        middle_scale: factor of the residual sums in the middle.
        act: name of the activation of the residual blocks.
        dropout: rate of dropout within the residual blocks.
        embedding: features of ``c_noise``: ``"waves"`` for a quarter of the log of the noise
            level, ``"positional"`` or ``"learned"`` for a step, ``"fourier"``, or
            ``"log-fourier"`` of the log of a noise level.
        embedding_width: width of the embedding, four times the first level if None.
        freq_shift: of ``"positional"``; 1 in DDPM, 0 in ADM.
        cos_first: of ``"positional"``; whether the cosines come first, as in ADM.
        steps: length of the chain of ``"learned"``.
        num_classes: number of classes of ``y``, None for a network without classes.
        classes: how ``y`` enters: a ``"table"`` of vectors, through the features of a
            ``"label"`` and layers of its own, or as the ``"vector"`` that is added itself.
        center_input: whether items lie in [0, 1] and the network takes them to [-1, 1].
        over_label: whether the output is divided by ``c_noise``, a noise level.
        out_channels: channels of the output, those of the items if None.
        checkpointing: whether blocks are computed again in the backward pass, to save memory.
    """

    shape: tuple[int, ...]
    widths: tuple[int, ...] = (128, 256, 256, 256)
    blocks: int = 2
    attention: tuple[int, ...] = (1,)
    attention_up: tuple[int, ...] | None = None
    middle: str = "attention"
    residual_down: tuple[int, ...] = ()
    residual_up: tuple[int, ...] = ()
    padding: tuple[int, int] = (0, 1)
    head_dim: int | None = None
    groups: int = 32
    middle_groups: int | None = None
    eps: float = 1e-6
    adaptive: bool = False
    middle_scale: float = 1.0
    act: str = "silu"
    dropout: float = 0.0
    embedding: str = "waves"
    embedding_width: int | None = None
    freq_shift: float = 1.0
    cos_first: bool = False
    steps: int = 1000
    num_classes: int | None = None
    classes: str = "table"
    center_input: bool = False
    over_label: bool = False
    out_channels: int | None = None
    checkpointing: bool = False

    name: ClassVar[str] = "ddpm-unet"
    presets: ClassVar[dict[str, dict[str, object]]] = {
        "tiny": {"widths": (16, 32), "blocks": 1, "groups": 8},
        "ddpm-cifar10": {"dropout": 0.1},
        "ddpm-256": {"widths": (128, 128, 256, 256, 512, 512), "attention": (4,)},
    }

    def __post_init__(self) -> None:
        super().__init__()
        self._check()
        n, last = len(self.shape) - 1, len(self.widths) - 1
        self.stride = 2**last
        conv, width = CONV[n], self.widths[0]
        embedding = self._embedding()
        resampler = Resampler(n)
        up = self.attention if self.attention_up is None else self.attention_up

        def block(inside: int, outside: int, way: str | None = None, **kw: Any) -> ResBlock:
            return ResBlock(
                n,
                inside,
                outside,
                embedding,
                norm=self._norm,
                adaptive=self.adaptive,
                resample=way,
                resampler=resampler,
                dropout=self.dropout,
                act=self.act,
                **kw,
            )

        def attend(channels: int, norm: Any = self._norm, **kw: Any) -> Attention:
            return Attention(channels, channels // (self.head_dim or channels), norm=norm, **kw)

        self.stem = conv(self.shape[0], width, 3, padding=1)
        self.encoder: Any = nn.ModuleList()
        current, skips = width, [width]
        for i, outside in enumerate(self.widths):
            stages = []
            for _ in range(self.blocks):
                attention = attend(outside) if i in self.attention else None
                stages.append(Stage(block(current, outside), attention))
                current = outside
                skips.append(current)
            resample: nn.Module | None = None
            if i < last:
                if i in self.residual_down:
                    resample = block(current, current, "down")
                else:
                    resample = Downsample(n, current, current, self.padding)
                skips.append(current)
            self.encoder.append(Level(stages, resample))

        self.mid = nn.ModuleList()
        if self.middle != "none":
            scale: dict[str, Any] = {"skip_scale": 1 / self.middle_scale}
            attention = None
            if self.middle == "attention":
                attention = attend(current, self._middle_norm, **scale)
            self.mid.append(Stage(block(current, current, **scale), attention))
            self.mid.append(Stage(block(current, current, **scale), None))

        self.decoder: Any = nn.ModuleList()
        for i, outside in reversed(list(enumerate(self.widths))):
            stages = []
            for _ in range(self.blocks + 1):
                attention = attend(outside) if i in up else None
                stages.append(Stage(block(current + skips.pop(), outside), attention))
                current = outside
            resample = None
            if i and i in self.residual_up:
                resample = block(current, current, "up")
            elif i:
                resample = Upsample(n, current, current, resampler)
            self.decoder.append(Level(stages, resample))
        self.head_norm = self._norm(current)
        self.head = conv(current, self.out_channels or self.shape[0], 3, padding=1)
        self._initialise()
        weights_last(self, n)

    def forward(self, x: Tensor, c_noise: Tensor, y: Tensor | None = None) -> Tensor:
        """``x (B, C, *spatial)``, ``c_noise (B,)``, labels ``y`` to ``(B, out, *spatial)``.

        ``y`` holds indices ``(B,)`` or one-hot rows ``(B, num_classes)`` of a ``"table"``, numbers
        ``(B,)`` of a ``"label"``, or rows ``(B, embedding_width)`` of a ``"vector"``; without it,
        and for the index ``num_classes`` of a table, nothing is added.
        """
        embedding = self.embed(c_noise, y)
        spatial = x.shape[2:]
        x = padded(x, self.stride)
        h = self.stem(2 * x - 1 if self.center_input else x)
        skips = [h]
        for level in self.encoder:
            for stage in level.stages:
                h = self._run(stage, h, embedding)
                skips.append(h)
            if level.resample is not None:
                h = self._resample(level.resample, h, embedding)
                skips.append(h)
        for stage in self.mid:
            h = self._run(stage, h, embedding)
        for level in self.decoder:
            for stage in level.stages:
                h = self._run(stage, torch.cat([h, skips.pop()], 1), embedding)
            if level.resample is not None:
                h = self._resample(level.resample, h, embedding)
        # The activations before the head are SiLU whatever the blocks have, as in the embedding.
        out = cropped(self.head(activate(self.head_norm(h))), spatial)
        if self.over_label:
            out = out / c_noise.to(out.dtype).reshape(-1, *(1,) * (out.ndim - 1))
        return out

    def embed(self, c_noise: Tensor, y: Tensor | None) -> Tensor:
        """The activated embedding ``(B, embedding_width)`` of noise level and class."""
        dtype = self.embed1.weight.dtype
        e = self.embed2(functional.silu(self.embed1(self.features(c_noise).to(dtype))))
        if y is not None and self.class_table is not None:
            table = self.class_table.weight
            e = e + class_rows(y, len(table)).to(dtype) @ table
        elif y is not None and self.class_mlp is not None:
            e = e + self.class_mlp(self.features(y.to(c_noise.dtype)).to(dtype))
        elif y is not None and self.classes == "vector":
            e = e + y.to(dtype)
        return ACTIVATIONS[self.act](e, inplace=False)

    def _run(self, layer: nn.Module, *inputs: Any) -> Tensor:
        return run(layer, *inputs, again=self.checkpointing)

    def _resample(self, layer: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
        return self._run(layer, h, embedding) if isinstance(layer, ResBlock) else layer(h)

    def _norm(self, channels: int) -> nn.GroupNorm:
        return group_norm(channels, self.groups, self.eps)

    def _middle_norm(self, channels: int) -> nn.Module:
        groups = self.groups if self.middle_groups is None else self.middle_groups
        return group_norm(channels, groups, self.eps) if groups else nn.Identity()

    def _embedding(self) -> int:
        """The layers of :meth:`embed`, and the width of what they give."""
        inside, outside = self.widths[0], self.embedding_width or 4 * self.widths[0]
        if self.embedding.endswith("fourier"):
            inside *= 2
        if self.embedding == "positional":
            self.features: nn.Module = Positional(inside, self.freq_shift, self.cos_first)
        elif self.embedding == "learned":
            self.features = Steps(self.steps, inside)
        else:
            self.features = noise_features(self.embedding, inside)
        self.embed1, self.embed2 = nn.Linear(inside, outside), nn.Linear(outside, outside)
        table = self.num_classes if self.classes == "table" else None
        self.class_table = nn.Embedding(table, outside) if table else None
        self.class_mlp = None
        if self.classes == "label":
            layers = (nn.Linear(inside, outside), nn.SiLU(), nn.Linear(outside, outside))
            self.class_mlp = nn.Sequential(*layers)
        return outside

    def _initialise(self) -> None:
        """Uniform weights; each residual branch and the output start at zero, nearly."""
        ends: list[Any] = [self.head]
        for module in self.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
                uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, ResBlock):
                ends.append(module.conv2)
            elif isinstance(module, Attention):
                ends.append(module.out)
        for end in ends:
            uniform_(end.weight, 0.0)

    def _check(self) -> None:
        """Refuses fields that make no network, and makes tuples of lists."""
        tuples = ("shape", "widths", "attention", "residual_down", "residual_up", "padding")
        for name in tuples:
            setattr(self, name, tuple(getattr(self, name)))
        if self.attention_up is not None:
            self.attention_up = tuple(self.attention_up)
        if len(self.shape) - 1 not in CONV:
            raise ValueError(
                f"the ddpm-unet takes items of shape (C, *spatial) with 1 to 3 spatial axes, "
                f"not {self.shape}; use the mlp for vectors"
            )
        if not self.widths or min(self.widths) < 4 or self.blocks < 1 or self.groups < 1:
            raise ValueError("the ddpm-unet needs widths >= 4, blocks >= 1 and groups >= 1")
        positive("ddpm-unet", self, "num_classes", "out_channels", "head_dim", "steps")
        if not self.middle_scale or self.padding not in ((0, 1), (1, 1)):
            raise ValueError(
                "the ddpm-unet needs a middle_scale that is not 0 and padding (0, 1) or (1, 1)"
            )
        levels = range(len(self.widths))
        for name in ("attention", "attention_up", "residual_down", "residual_up"):
            if not set(getattr(self, name) or ()) <= set(levels):
                raise ValueError(f"{name} of ddpm-unet names levels 0 to {levels[-1]}")
        for name, accepted in (
            ("middle", MIDDLES),
            ("act", tuple(ACTIVATIONS)),
            ("embedding", EMBEDDINGS),
            ("classes", CLASSES),
        ):
            if getattr(self, name) not in accepted:
                raise unknown(f"{name} of ddpm-unet", getattr(self, name), accepted)
