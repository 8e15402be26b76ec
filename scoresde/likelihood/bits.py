"""Bits per dimension of discrete data, from the log-density of the dequantised data.

    bits/dim = -log p / (D ln 2) + log2(levels / width)

``p`` is the density in model range, in which all levels together span ``width``, so that a level
spans ``width / levels``; dequantised by uniform noise, its mean bounds the discrete code length
from above. A density uniform over the range has ``log2(levels)`` bits exactly.

Source: A note on the evaluation of generative models (Theis et al., 2016),
https://arxiv.org/abs/1511.01844.
"""

from __future__ import annotations

import math

from torch import Tensor


def bits_per_dim(
    log_prob: Tensor, dims: int, levels: int | None = 256, width: float = 2.0
) -> Tensor:
    """Bits per dimension, of the shape of ``log_prob``.

    Args:
        log_prob: log-density in model range in nats, any shape.
        dims: entries of one item, ``D``.
        levels: number of discrete levels, >= 2.
        width: what all levels span in model range, 2 for [-1, 1].

    Raises:
        ValueError: for continuous data (``levels=None``), or sizes that are not positive.
    """
    if levels is None:
        raise ValueError(
            "bits per dimension is for discrete data: give levels (256 for bytes), "
            "or report nats for continuous data"
        )
    if levels < 2 or dims < 1 or not width > 0:
        raise ValueError(
            f"bits_per_dim needs levels >= 2, dims >= 1 and width > 0, "
            f"got levels={levels}, dims={dims}, width={width}"
        )
    return -log_prob / (dims * math.log(2)) + math.log2(levels / width)
