"""Residual perceptron for vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .embed import ClassEmbedding, NoiseEmbedding
from .layout import image_for


class MLPBlock(nn.Module):
    """``h + W2 silu(norm(W1 h) (1 + scale) + shift)``, modulated by the embedding."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, width)
        self.modulation = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(width, width)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """``(B, width)`` to ``(B, width)``."""
        scale, shift = self.modulation(embedding).chunk(2, 1)
        inner = self.first(self.norm(h)) * (1 + scale) + shift
        return h + self.second(self.dropout(nn.functional.silu(inner)))


@dataclass(eq=False, repr=False)
class MLP(nn.Module):
    """Residual perceptron ``F(x, c_noise, y)`` for items of shape ``(D,)``.

    Args:
        shape: shape of one item, ``(D,)``.
        width: width of the hidden layers.
        blocks: number of residual blocks.
        dropout: rate of dropout within the blocks.
        num_classes: number of classes of ``y``, None for an unconditional network.
        image_channels: channels of the condition ``image``, joined to the input; 0 for none.
    """

    shape: tuple[int, ...]
    width: int = 128
    blocks: int = 3
    dropout: float = 0.0
    num_classes: int | None = None
    image_channels: int = 0

    presets: ClassVar[dict[str, dict[str, object]]] = {
        "tiny": {"width": 128, "blocks": 3},
        "small": {"width": 256, "blocks": 4},
        "base": {"width": 512, "blocks": 6},
    }

    def __post_init__(self) -> None:
        super().__init__()
        if len(self.shape) != 1:
            raise ValueError(
                f"the mlp takes vectors of shape (D,), not {tuple(self.shape)}; use the unet"
            )
        self.shape = tuple(self.shape)
        dims = self.shape[0]
        self.embed = NoiseEmbedding(self.width)
        self.classes = ClassEmbedding(self.num_classes, self.width) if self.num_classes else None
        self.stem = nn.Linear(dims + self.image_channels, self.width)
        self.body = nn.ModuleList(MLPBlock(self.width, self.dropout) for _ in range(self.blocks))
        self.head = nn.Sequential(nn.LayerNorm(self.width), nn.Linear(self.width, dims))

    def forward(
        self, x: Tensor, c_noise: Tensor, y: Tensor | None = None, image: Tensor | None = None
    ) -> Tensor:
        """``x (B, D)``, ``c_noise (B,)``, ``y``, ``image (B, image_channels)``, to ``(B, D)``."""
        embedding = self.embed(c_noise)
        if self.classes is not None:
            embedding = embedding + self.classes(y, len(x))
        embedding = torch.nn.functional.silu(embedding)
        h = self.stem(torch.cat([x, image_for(x, image, self.image_channels)], 1))
        for block in self.body:
            h = block(h, embedding)
        return self.head(h)
