r"""Outliers by their likelihood: how well a score tells items of other data from a model's own.

The area under the receiver operating characteristic is the probability that an item from outside
scores above one from inside, ties counting half (Mann and Whitney, 1947):

    A = mean over pairs of psi(x_i, y_j),    psi = 1 if y_j > x_i, 1/2 if equal, else 0

With the placements ``V_i = mean_j psi(x_i, y_j)`` and ``W_j = mean_i psi(x_i, y_j)``,

    var A = var(V) / m + var(W) / n

Two scores of an item, each larger where it fits less: its negative log-likelihood, and how far
its log-likelihood lies from the mean of the model's own data, since the items of a distribution
in many dimensions have about its entropy, and simple images of other kinds have a higher density.

Sources: Comparing the Areas under Two or More Correlated Receiver Operating Characteristic Curves
(DeLong et al., 1988), https://doi.org/10.2307/2531595; Detecting Out-of-Distribution Inputs to
Deep Generative Models Using Typicality (Nalisnick et al., 2019), https://arxiv.org/abs/1906.02994.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import unknown
from ..precision import widest

SCORES = ("likelihood", "typicality")


class AUROC(NamedTuple):
    """An area under the curve in [0, 1], 1/2 for no difference, and its standard error."""

    value: float
    stderr: float


def auroc(inside: Tensor, outside: Tensor) -> AUROC:
    """How often an item from outside scores above one from inside.

        A = P(outside > inside) + P(outside = inside) / 2

    Args:
        inside: a score of items of the model's own data, ``(m,)``, m >= 2.
        outside: the same score of items of other data, ``(n,)``, n >= 2.

    Returns:
        ``A`` and DeLong's standard error, over items. It is zero of sets that do not overlap,
        where it says nothing; then it is ``1 / min(m, n)``, about the share of one set that would
        overlap unseen once in ``e`` times.

    Raises:
        ValueError: too few items, or values that are not finite.
    """
    x, y = _checked("inside", inside), _checked("outside", outside)
    v = 1 - _placements(x, y)
    w = _placements(y, x)
    area = float(w.mean())
    variance = float(v.var()) / len(v) + float(w.var()) / len(w)
    return AUROC(area, math.sqrt(variance) if variance > 0 else 1 / min(len(v), len(w)))


def outlier_score(name: str, log_prob: Tensor, reference: Tensor) -> Tensor:
    """A score of items that is larger where they fit less, ``(N,)``.

        likelihood: -log p            typicality: |log p - mean of reference|

    Args:
        name: ``"likelihood"`` or ``"typicality"``.
        log_prob: of the items, ``(N,)``, in any unit (minus bits/dim for items of one shape).
        reference: log-likelihoods of the model's own data in that unit, ``(M,)``: of the training
            set rather than of the items to be scored. Its mean counts as known.

    Raises:
        ConfigError: for another name.
    """
    if name == "likelihood":
        return -log_prob
    if name == "typicality":
        return (log_prob - _checked("reference", reference).mean().to(log_prob)).abs()
    raise unknown("outlier score", name, SCORES)


def separation(
    inside: Tensor, outside: Tensor, reference: Tensor | None = None
) -> dict[str, AUROC]:
    """The area under the curve of each score, from log-likelihoods.

    Args:
        inside: log-likelihoods of held-out items of the model's own data, ``(m,)``.
        outside: of items of other data, ``(n,)``, in the same unit.
        reference: of the model's training data, for typicality; ``inside`` by default.

    Raises:
        ValueError: as :func:`auroc`.
    """
    own = inside if reference is None else reference
    return {
        name: auroc(outlier_score(name, inside, own), outlier_score(name, outside, own))
        for name in SCORES
    }


def _placements(values: Tensor, others: Tensor) -> Tensor:
    """For each value, the share of the others below it, ties counting half."""
    others = others.sort().values
    below = torch.searchsorted(others, values)
    upto = torch.searchsorted(others, values, right=True)
    return (below + upto).to(values.dtype) / (2 * len(others))


def _checked(name: str, values: Tensor) -> Tensor:
    """The values in the widest precision of their device, refused where they have no order."""
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"{name} must have shape (N,) with N >= 2, got {tuple(values.shape)}")
    values = values.to(widest(values.device))
    bad = ~values.isfinite()
    if bool(bad.any()):
        raise ValueError(
            f"{int(bad.sum())} of {len(values)} values of {name} are not finite, "
            f"the first of item {int(bad.nonzero()[0])}: leave them out"
        )
    return values
