r"""The Frechet distance: Wasserstein-2 between two Gaussians, fitted to two sets of features.

    d^2 = |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

With the features of an Inception network it is called FID; with others it is not to be compared
with that. It has a bias that falls with the number of items: compare sets of one size.

Source: GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium (Heusel
et al., 2017), equation 6, https://arxiv.org/abs/1706.08500.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frechet(a: Tensor, b: Tensor) -> float:
    """``d^2`` of two sets of features ``(n, F)`` and ``(m, F)``, in float64.

    Raises:
        ValueError: for sets of other shapes, or of fewer than two items.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            "frechet needs features (n, F) and (m, F) of two items or more, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    a, b = a.double(), b.double()
    gap = (a.mean(0) - b.mean(0)).square().sum()
    first, second = (x.T.cov().reshape(x.shape[1], -1) for x in (a, b))
    # The product of two covariances has real eigenvalues >= 0, whatever rounding makes of them.
    shared = torch.linalg.eigvals(first @ second).real.clamp_min(0).sqrt().sum()
    return float(gap + first.trace() + second.trace() - 2 * shared)


__all__ = ["frechet"]
