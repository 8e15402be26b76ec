r"""How well a classifier of noisy items does: accuracy, log loss, calibration, by noise level.

The range of the log-SNR is cut into equal bins, and every item is looked at once in each of them,
at a random place and with noise of its own. A classifier is calibrated where of the items that it
is sure of to a share ``c``, a share ``c`` is right; the expected calibration error is

    ECE = sum_b (n_b/n) |accuracy_b - confidence_b|

over cells ``b`` of equal width of its largest probability. Of ``n`` items it is some ``1/sqrt(n)``
even where all is well.

Source: On Calibration of Modern Neural Networks (Guo et al., 2017),
https://arxiv.org/abs/1706.04599.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..model import evaluating
from ..noise import KeyedNoise, step_seed
from ..precision import widest
from .heldout import BINS

CELLS = 15
"""Cells of confidence."""


@dataclass(frozen=True)
class Level:
    """What a classifier does at one range of noise.

    Attributes:
        items: looked at.
        accuracy: share whose most probable class is theirs.
        stderr: standard error of that share.
        nats: mean of ``-log p(y | x_t)``.
        calibration: expected calibration error, a share.
        log_snr: range of log-SNR, from high to low; None for clean items.
    """

    items: int
    accuracy: float
    stderr: float
    nats: float
    calibration: float
    log_snr: tuple[float, float] | None = None


@dataclass(frozen=True)
class Examination:
    """What a classifier does on clean items, and at each range of noise, from little to much."""

    clean: Level
    noisy: tuple[Level, ...]

    def summary(self) -> dict[str, Any]:
        """The figures, as JSON takes them."""
        return asdict(self)


def examine(
    classifier: Any,
    x: Tensor,
    y: Tensor,
    *,
    bins: int = BINS,
    seed: int = 0,
    batch_size: int = 256,
    progress: Callable[[int], object] | None = None,
) -> Examination:
    """Accuracy, log loss and calibration on labelled items, clean and by noise level.

    Args:
        classifier: ``classifier(x, t)`` to log-probabilities ``(B, K)``, with its ``sde``.
        x: items in model range, ``(N, *shape)``.
        y: their classes, ``(N,)``.
        bins: equal bins of log-SNR between ``t_min`` and ``t_max``; 0 for clean items alone.
        seed: of places and noise.
        batch_size: items evaluated at once.
        progress: told of items done, each ``bins + 1`` times.
    """
    sde = classifier.sde
    start, end = (float(sde.log_snr(t)) for t in (sde.t_min, sde.t_max))
    edges = [start + (end - start) * k / bins for k in range(bins + 1)] if bins else []
    found: list[list[Tensor]] = [[] for _ in range(bins + 1)]
    with torch.no_grad(), evaluating(classifier):
        for part in torch.arange(len(x)).split(batch_size):
            x0 = x[part.to(x.device)]
            found[0].append(classifier(x0, 0.0).cpu())
            for k in range(bins):
                # The place of an item and its noise are its own, whatever the batch.
                source = KeyedNoise(step_seed(seed, k, stream=11), int(part[0]))
                u = source.uniform((len(part), 1), "cpu", torch.float64)[:, 0]
                t = sde.time(edges[k] + u * (edges[k + 1] - edges[k])).clamp(sde.t_min, sde.t_max)
                t = t.to(x0.device, widest(x0.device))
                eps = source.normal(tuple(x0.shape), x0.device, x0.dtype)
                found[k + 1].append(classifier(sde.perturb(x0, t, eps), t).cpu())
            if progress is not None:
                progress(len(part) * (bins + 1))
    y = y.cpu()
    levels = [level(torch.cat(rows), y) for rows in found]
    noisy = [
        Level(**{**asdict(each), "log_snr": (edges[k], edges[k + 1])})
        for k, each in enumerate(levels[1:])
    ]
    return Examination(levels[0], tuple(noisy))


def level(log_p: Tensor, y: Tensor) -> Level:
    """The figures of log-probabilities ``(N, K)`` of items of classes ``(N,)``."""
    log_p = log_p.double()
    confidence, chosen = log_p.max(1)
    confidence, right = confidence.exp(), (chosen == y).double()
    accuracy = float(right.mean())
    cell = (confidence * CELLS).long().clamp(0, CELLS - 1)
    gaps = torch.zeros(CELLS, dtype=torch.float64).index_add_(0, cell, right - confidence)
    return Level(
        items=len(y),
        accuracy=accuracy,
        stderr=math.sqrt(accuracy * (1 - accuracy) / len(y)),
        nats=-float(log_p.gather(1, y[:, None]).mean()),
        calibration=float(gaps.abs().sum()) / len(y),
    )


__all__ = ["Examination", "Level", "examine"]
