r"""Diffusion transformer: attention over patches, for signals, images and volumes.

An item becomes one token a patch, to which fixed waves of its position are added. A block is

    h <- h + gate_1 attention(norm(h) (1 + scale_1) + shift_1)
    h <- h + gate_2 mlp(norm(h) (1 + scale_2) + shift_2)

whose six vectors are a linear map of the embedding of noise level and class. That map starts at
zero (adaLN-Zero), so that every block starts as the identity, and the network at zero.

Sources: Scalable Diffusion Models with Transformers (Peebles & Xie, 2023),
https://arxiv.org/abs/2212.09748; patches as tokens: An Image is Worth 16x16 Words (Dosovitskiy et
al., 2021), https://arxiv.org/abs/2010.11929; waves: Attention Is All You Need (Vaswani et al.,
2017), https://arxiv.org/abs/1706.03762.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from .embed import ClassEmbedding, NoiseEmbedding
from .layers import run


def modulated(h: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """``norm(h) (1 + scale) + shift`` of tokens ``(B, N, W)``, by vectors ``(B, 1, W)``."""
    return torch.addcmul(shift, functional.layer_norm(h, h.shape[-1:], eps=eps), 1 + scale)


def patchify(x: Tensor, patch: int) -> Tensor:
    """``(B, C, *spatial)`` to tokens ``(B, N, patch^n C)``, channels innermost."""
    n = x.ndim - 2
    cut = x.reshape(*x.shape[:2], *(s for size in x.shape[2:] for s in (size // patch, patch)))
    places, inside = range(2, 2 + 2 * n, 2), range(3, 3 + 2 * n, 2)
    return cut.permute(0, *places, *inside, 1).flatten(1 + n).flatten(1, n)


def unpatchify(tokens: Tensor, grid: Sequence[int], patch: int) -> Tensor:
    """The inverse of :func:`patchify` for a grid of patches, channels last in memory."""
    n = len(grid)
    cut = tokens.reshape(len(tokens), *grid, *[patch] * n, -1)
    cut = cut.permute(0, *(a for i in range(n) for a in (1 + i, 1 + n + i)), 1 + 2 * n)
    return cut.reshape(len(tokens), *(g * patch for g in grid), -1).movedim(-1, 1)


def grid_waves(grid: Sequence[int], base: Sequence[int], width: int) -> Tensor:
    r"""Sines and cosines of the position of every patch, float64, ``(N, width)``.

        [sin(w_k i), cos(w_k i)] an axis, the last axis first,   w_k = 10000^{-k/K}

    with ``K = width // 2n`` waves an axis and zeros for what is left of the width. The index ``i``
    is stretched by base/grid, so that another size covers the range that was trained on.

    Args:
        grid: patches along each of the n axes.
        base: patches along each axis of the shape that the network was made for.
        width: channels.
    """
    n = len(grid)
    waves = width // (2 * n)
    rates = 10000 ** -(torch.arange(waves, dtype=torch.float64) / waves)
    parts = []
    for axis in reversed(range(n)):
        index = torch.arange(grid[axis], dtype=torch.float64) * (base[axis] / grid[axis])
        angle = index[:, None] * rates
        part = torch.cat([angle.sin(), angle.cos()], 1)
        shape = [1] * axis + [grid[axis]] + [1] * (n - 1 - axis)
        parts.append(part.reshape(*shape, -1).expand(*grid, -1))
    flat = torch.cat(parts, -1).flatten(0, n - 1)
    return functional.pad(flat, (0, width - flat.shape[1]))


def start(module: nn.Module, *zero: nn.Linear) -> None:
    """The paper's initial weights: Xavier's, no bias; layers in ``zero`` without weights too."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            if layer in zero:
                nn.init.zeros_(layer.weight)
            else:
                nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class Positions(nn.Module):
    """The waves of :func:`grid_waves` for a network made for a grid of ``base`` patches."""

    waves: Tensor

    def __init__(self, base: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.base, self.width = base, width
        waves = grid_waves(base, base, width).to(torch.get_default_dtype())
        self.register_buffer("waves", waves, persistent=False)

    def forward(self, grid: tuple[int, ...]) -> Tensor:
        """``(N, width)`` for the N patches of a grid."""
        if grid == self.base:
            return self.waves
        return grid_waves(grid, self.base, self.width).to(self.waves)


class StepEmbedding(nn.Module):
    r"""Sines and cosines of the step of a discrete process, followed by a two-layer perceptron.

        [cos(w_k step), sin(w_k step)],   w_k = 10000^{-k/(K - shift)},   K = 128

    The waves suit labels of 0 to 999. For ``c_noise``, which spans 4 units, all but a few of them
    are constant: use :class:`~scoresde.nets.embed.NoiseEmbedding` there.

    Args:
        dim: length of the embedding.
        shift: 0 puts the slowest wave just above 1/10000, 1 upon it.
    """

    waves: ClassVar[int] = 128

    def __init__(self, dim: int, shift: float) -> None:
        super().__init__()
        self.shift = shift
        first, second = nn.Linear(2 * self.waves, dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)
        nn.init.normal_(first.weight, std=0.02)
        nn.init.normal_(second.weight, std=0.02)

    def forward(self, step: Tensor) -> Tensor:
        """``(B,)`` to ``(B, dim)``; the waves are computed in float32 or better."""
        # No buffer: one of half precision would turn step 999 by whole radians. And in float32,
        # as where foreign weights were trained: its rounding turns step 999 by 1e-5 radians.
        k = torch.arange(self.waves, dtype=torch.float32, device=step.device)
        rates = torch.exp(-math.log(10000) * k / (self.waves - self.shift))
        angle = step[:, None] * rates.to(torch.promote_types(step.dtype, torch.float32))
        features = torch.cat([angle.cos(), angle.sin()], 1)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class Condition(nn.Module):
    """The embedding of noise level and class, ``silu(embed(c_noise) + classes(y))``."""

    def __init__(self, embed: nn.Module, classes: ClassEmbedding | None) -> None:
        super().__init__()
        self.embed = embed
        self.classes = classes
        if classes is not None:
            nn.init.normal_(classes.weight, std=0.02)

    def forward(self, c_noise: Tensor, y: Tensor | None) -> Tensor:
        """Noise labels ``(B,)`` and classes to ``(B, W)``."""
        embedding = self.embed(c_noise)
        if self.classes is not None:
            embedding = embedding + self.classes(y, len(c_noise))
        return functional.silu(embedding)


class Block(nn.Module):
    """Attention and perceptron, both residual, modulated and gated by the condition."""

    def __init__(self, net: DiT) -> None:
        super().__init__()
        width, hidden = net.width, round(net.width * net.mlp_ratio)
        self.heads, self.mlp_eps = net.heads, net.mlp_eps
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width, bias=net.qkv_bias)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(net.dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU("tanh"),
            nn.Dropout(net.dropout),
            nn.Linear(hidden, width),
        )
        start(self, self.modulation)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """Tokens ``(B, N, W)`` and condition ``(B, W)`` to tokens."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.modulation(condition).unsqueeze(1).chunk(6, 2)
        )
        qkv = self.qkv(modulated(h, shift1, scale1)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = torch.addcmul(h, gate1, self.dropout(self.out(mixed)))
        return torch.addcmul(h, gate2, self.mlp(modulated(h, shift2, scale2, self.mlp_eps)))


class Head(nn.Module):
    """``linear(norm(h) (1 + scale) + shift)``, modulated by the condition."""

    def __init__(self, width: int, outside: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, outside)
        start(self, self.modulation, self.linear)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """Tokens ``(B, N, W)`` and condition ``(B, W)`` to ``(B, N, outside)``."""
        shift, scale = self.modulation(condition).unsqueeze(1).chunk(2, 2)
        return self.linear(modulated(h, shift, scale))


@dataclass(eq=False, repr=False)
class DiT(nn.Module):
    """Transformer ``F(x, c_noise, y)`` for items of shape ``(C, *spatial)``, 1 to 3 spatial axes.

    Args:
        shape: shape of one item, ``(C, *spatial)``; any size that ``patch`` divides works later.
        patch: side of a patch, which divides every spatial size.
        width: channels of a token, a multiple of ``heads``.
        depth: number of blocks.
        heads: number of attention heads.
        mlp_ratio: hidden channels of the perceptrons, in units of ``width``.
        dropout: rate of dropout after attention and within the perceptrons.
        num_classes: number of classes of ``y``, None for an unconditional network.
        out_channels: channels of the output, None for those of ``x``; twice those where the
            caller splits a variance off.
        embedding: of the noise label: ``"waves"`` for ``c_noise = log(sigma/alpha)/4``,
            ``"positional"`` for steps 0 to 999.
        freq_shift: of the positional embedding, 0 in the paper, 1 in diffusers.
        shared_embedding: one embedding of noise level and class for all blocks, as in the paper;
            False gives each block its own, as diffusers does (the head takes the first block's).
        qkv_bias: whether queries, keys and values have a bias.
        mlp_eps: epsilon of the norm before the perceptrons; that of the other norms is 1e-6.
        checkpointing: recompute each block in the backward pass, which keeps the memory of one.

    Raises:
        ValueError: for a shape of other axes or sizes, or a field out of its range.
    """

    shape: tuple[int, ...]
    patch: int = 2
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    num_classes: int | None = None
    out_channels: int | None = None
    embedding: Literal["waves", "positional"] = "waves"
    freq_shift: float = 0.0
    shared_embedding: bool = True
    qkv_bias: bool = True
    mlp_eps: float = 1e-6
    checkpointing: bool = False

    name: ClassVar[str] = "dit"
    presets: ClassVar[dict[str, dict[str, object]]] = {
        "tiny": {"width": 128, "depth": 4, "heads": 4},
        "small": {"width": 384, "depth": 12, "heads": 6},
        "base": {"width": 768, "depth": 12, "heads": 12},
        "large": {"width": 1024, "depth": 24, "heads": 16},
        "xlarge": {"width": 1152, "depth": 28, "heads": 16},
    }

    def __post_init__(self) -> None:
        super().__init__()
        self.shape = tuple(self.shape)
        self._check()
        cells = self.patch ** (len(self.shape) - 1)
        outside = self.shape[0] if self.out_channels is None else self.out_channels
        self.positions = Positions(self._grid(self.shape[1:]), self.width)
        self.conditions = nn.ModuleList(
            self._condition() for _ in range(1 if self.shared_embedding else self.depth)
        )
        self.stem = nn.Linear(cells * self.shape[0], self.width)
        start(self.stem)
        self.body = nn.ModuleList(Block(self) for _ in range(self.depth))
        self.head = Head(self.width, cells * outside)

    def _check(self) -> None:
        """Refuses fields out of their range."""
        n = len(self.shape) - 1
        if n not in (1, 2, 3):
            raise ValueError(
                f"the dit takes items of shape (C, *spatial) with 1 to 3 spatial axes, "
                f"not {self.shape}; use the mlp for vectors"
            )
        for key in ("patch", "width", "depth", "heads", "num_classes", "out_channels"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"the dit needs {key} of at least 1, got {value}")
        if min(self.shape) < 1 or round(self.width * self.mlp_ratio) < 1:
            raise ValueError(
                f"the dit needs sizes and hidden channels of at least 1, "
                f"got shape {self.shape}, mlp_ratio {self.mlp_ratio}"
            )
        if self.width % self.heads or self.width < 2 * n:
            raise ValueError(
                f"the dit needs a width of at least {2 * n} that is a multiple of its heads, "
                f"got width {self.width}, heads {self.heads}"
            )
        if self.embedding not in ("waves", "positional"):
            raise ValueError(
                f"embedding of the dit is 'waves' or 'positional', not {self.embedding!r}"
            )

    def _condition(self) -> Condition:
        """An embedding of noise level and class."""
        embed = (
            NoiseEmbedding(self.width)
            if self.embedding == "waves"
            else StepEmbedding(self.width, self.freq_shift)
        )
        classes = ClassEmbedding(self.num_classes, self.width) if self.num_classes else None
        return Condition(embed, classes)

    def _grid(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Patches along each axis."""
        if any(size % self.patch for size in spatial):
            raise ValueError(
                f"spatial sizes of the dit are multiples of its patch, {self.patch}, "
                f"not {tuple(spatial)}"
            )
        return tuple(size // self.patch for size in spatial)

    def forward(self, x: Tensor, c_noise: Tensor, y: Tensor | None = None) -> Tensor:
        """The output, ``(B, out_channels, *spatial)``.

        Args:
            x: items, ``(B, C, *spatial)`` of any spatial size that the patch divides.
            c_noise: noise labels, ``(B,)``, as ``embedding`` has them.
            y: classes ``(B,)`` below ``num_classes``, or ``num_classes`` for none; or one-hot
                rows ``(B, num_classes)``; or None, for no class.

        Raises:
            ValueError: if ``x`` or ``y`` does not fit the network.
        """
        if x.ndim != len(self.shape) + 1 or x.shape[1] != self.shape[0]:
            raise ValueError(
                f"x of shape {tuple(x.shape)} does not fit a dit of "
                f"(B, {self.shape[0]}{', size' * (len(self.shape) - 1)})"
            )
        if y is not None and self.num_classes is None:
            raise ValueError("y is given to a dit without classes; set num_classes, or give none")
        grid = self._grid(x.shape[2:])
        conditions = [condition(c_noise, y) for condition in self.conditions]

        h = self.stem(patchify(x, self.patch)) + self.positions(grid)
        for i, block in enumerate(self.body):
            condition = conditions[0 if self.shared_embedding else i]
            h = run(block, h, condition, again=self.checkpointing)
        return unpatchify(self.head(h, conditions[0]), grid, self.patch)
