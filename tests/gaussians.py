"""Mixtures that tests of exact densities share, and densities that are written out."""

import math

import torch

import scoresde as sd

f64 = torch.float64
Normal = torch.distributions.MultivariateNormal
EYE = torch.eye(3, dtype=f64)


def random_mixture(shape=(3,), k=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dims = math.prod(shape)
    means = torch.randn(k, *shape, generator=generator, dtype=f64)
    roots = torch.randn(k, dims, dims, generator=generator, dtype=f64) / dims**0.5
    weights = torch.rand(k, generator=generator, dtype=f64) + 0.1
    return sd.CorrelatedMixture(weights, means, roots @ roots.mT + 0.02 * torch.eye(dims))


def diagonal_mixture(shape=(3,), k=3):
    generator = torch.Generator().manual_seed(7)
    means = torch.randn(k, *shape, generator=generator, dtype=f64)
    stds = torch.rand(k, *shape, generator=generator, dtype=f64) * 0.5 + 0.2
    return sd.GaussianMixture([1.0, 2.0, 0.5][:k], means, stds)


def random_matrix(rows, columns, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=f64)


def log_density(mixture, x, alpha=1.0, sigma=0.0):
    """By torch's own Gaussians, of covariances that are put together here."""
    parts = []
    for w, m, s in zip(mixture.weights, mixture.means, covariances(mixture), strict=True):
        spread = alpha**2 * s + sigma**2 * torch.eye(len(s), dtype=f64)
        parts.append(w.log() + Normal(alpha * m.flatten(), spread).log_prob(x.flatten(1)))
    return torch.stack(parts).logsumexp(0)


def covariances(mixture):
    if isinstance(mixture, sd.CorrelatedMixture):
        return mixture.covariances
    return torch.diag_embed(mixture.stds.flatten(1) ** 2)


def log_joint(mixture, matrix, x, y, noise_std, alpha, sigma):
    """``log p(x_t, y)``: a component's ``(x_t, y)`` is one Gaussian vector."""
    parts = []
    for w, m, s in zip(mixture.weights, mixture.means, covariances(mixture), strict=True):
        m = m.flatten()
        both = torch.cat([alpha * torch.eye(len(m), dtype=f64), matrix])
        noise = torch.cat([sigma * torch.ones(len(m)), noise_std * torch.ones(len(matrix))])
        joint = Normal(both @ m, both @ s @ both.T + torch.diag(noise.to(f64) ** 2))
        parts.append(w.log() + joint.log_prob(torch.cat([x, y.expand(len(x), -1)], 1)))
    return torch.stack(parts).logsumexp(0)
