"""Residual perceptron that tells the classes of noisy vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from .embed import NoiseEmbedding
from .mlp import MLPBlock


@dataclass(eq=False, repr=False)
class MLPClassifier(nn.Module):
    """Logits ``F(x, c_noise)`` of the classes of noisy vectors ``(D,)``.

    Args:
        shape: shape of one item, ``(D,)``.
        num_classes: number of classes.
        width: width of the hidden layers.
        blocks: number of residual blocks.
        dropout: rate of dropout within the blocks.
    """

    shape: tuple[int, ...]
    num_classes: int = 2
    width: int = 128
    blocks: int = 3
    dropout: float = 0.0

    presets: ClassVar[dict[str, dict[str, object]]] = {
        "tiny": {"width": 128, "blocks": 3},
        "small": {"width": 256, "blocks": 4},
    }

    def __post_init__(self) -> None:
        super().__init__()
        self.shape = tuple(self.shape)
        if len(self.shape) != 1:
            raise ValueError(
                f"the mlp-classifier takes vectors of shape (D,), not {self.shape}; use the "
                "adm-classifier"
            )
        if self.num_classes < 1:
            raise ValueError(f"the mlp-classifier needs classes, num_classes={self.num_classes}")
        self.embed = NoiseEmbedding(self.width)
        self.stem = nn.Linear(self.shape[0], self.width)
        self.body = nn.ModuleList(MLPBlock(self.width, self.dropout) for _ in range(self.blocks))
        self.norm = nn.LayerNorm(self.width)
        self.out = nn.Linear(self.width, self.num_classes)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """``x (B, D)``, ``c_noise (B,)`` to logits ``(B, num_classes)``.

        Raises:
            ValueError: for items of another shape.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"x of shape {tuple(x.shape)} does not fit a classifier of (B, *{self.shape})"
            )
        embedding = functional.silu(self.embed(c_noise))
        h = self.stem(x)
        for block in self.body:
            h = block(h, embedding)
        return self.out(self.norm(h))
