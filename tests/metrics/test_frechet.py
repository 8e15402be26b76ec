"""The Frechet distance against closed forms of Gaussians."""

import pytest
import torch

from scoresde.metrics import frechet


def features(n, mean, root, seed=0):
    """``n`` rows whose mean and covariance ``root root^T`` are exact."""
    x = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed)).double()
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    return x @ root.T + mean


def test_gaussians_that_commute():
    m = torch.tensor([[0.0, 1.0, -2.0], [0.5, 1.0, 1.0]], dtype=torch.float64)
    s = torch.tensor([[1.0, 0.3, 2.0], [0.5, 0.9, 2.5]], dtype=torch.float64)
    found = frechet(features(50, m[0], s[0].diag()), features(80, m[1], s[1].diag(), seed=1))
    assert found == pytest.approx(float(((m[0] - m[1]) ** 2 + (s[0] - s[1]) ** 2).sum()))


def test_gaussians_that_do_not_commute():
    a = torch.tensor([[1.0, 0.0], [0.8, 0.4]], dtype=torch.float64)
    b = torch.tensor([[0.6, -0.5], [0.0, 1.3]], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    # The optimal map's coupling: tr (A^(1/2) B A^(1/2))^(1/2) is the nuclear norm of a^T b.
    shared = torch.linalg.matrix_norm(a.T @ b, "nuc")
    wanted = (a @ a.T + b @ b.T).trace() - 2 * shared
    found = frechet(features(40, zero, a), features(40, zero, b, seed=2))
    assert found == pytest.approx(float(wanted))
    assert frechet(features(40, zero, a), features(40, zero, a, seed=3)) == pytest.approx(0)


def test_sets_that_do_not_fit():
    x = torch.zeros(4, 3)
    for other in (torch.zeros(4, 2), torch.zeros(1, 3), torch.zeros(4)):
        with pytest.raises(ValueError, match="frechet needs features"):
            frechet(x, other)
