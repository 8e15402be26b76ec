"""Posteriors of linear measurements and their evidence, against Bayes' rule."""

import math

import pytest
import torch
from gaussians import (
    EYE,
    Normal,
    covariances,
    diagonal_mixture,
    f64,
    log_joint,
    random_matrix,
    random_mixture,
)

import scoresde as sd
from scoresde.inverse.linear import Linear
from scoresde.inverse.mask import Mask


@pytest.mark.parametrize("make", [random_mixture, diagonal_mixture])
@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_bayes_rule_holds_at_every_point(make, rows):
    """``log p(x | y) = log p(x) + log p(y | x) - log p(y)``, also for more rows than columns."""
    mixture, matrix = make((3,)), random_matrix(rows, 3)
    for noise_std in (0.03, 0.5, 20.0):
        operator = Linear(matrix)
        y = torch.randn(1, rows, dtype=f64)
        posterior = mixture.posterior(operator, y, noise_std)
        x = posterior.sample(6, torch.Generator().manual_seed(0))
        likelihood = torch.distributions.Normal(x @ matrix.T, noise_std).log_prob(y).sum(1)
        expected = mixture.log_prob(x) + likelihood - mixture.log_evidence(operator, y, noise_std)
        assert torch.allclose(posterior.log_prob(x), expected, rtol=1e-8, atol=1e-8)


def test_evidence_of_each_measurement_by_torchs_gaussians():
    mixture, matrix, noise_std = random_mixture((4,)), random_matrix(2, 4), 0.2
    y = torch.randn(5, 2, dtype=f64)
    parts = [
        w.log()
        + Normal(matrix @ m, matrix @ s @ matrix.T + noise_std**2 * EYE[:2, :2]).log_prob(y)
        for w, m, s in zip(mixture.weights, mixture.means, mixture.covariances, strict=True)
    ]
    found = mixture.log_evidence(Linear(matrix), y, noise_std)
    assert torch.allclose(found, torch.stack(parts).logsumexp(0), rtol=1e-10)
    alone = mixture.log_evidence(Linear(matrix), y[3:4], noise_std)
    assert torch.allclose(found[3:4], alone)


def test_posterior_of_two_numbers_by_quadrature():
    mixture, matrix, noise_std = diagonal_mixture((2,)), random_matrix(1, 2), 0.3
    y = torch.tensor([[0.4]], dtype=f64)
    grid = torch.linspace(-6, 6, 601, dtype=f64)
    x = torch.cartesian_prod(grid, grid)
    noise = torch.distributions.Normal(x @ matrix.T, noise_std).log_prob(y)[:, 0]
    density = (mixture.log_prob(x) + noise).exp() * 0.02**2
    evidence = density.sum()
    assert torch.allclose(evidence.log(), mixture.log_evidence(Linear(matrix), y, noise_std))
    density = density / evidence
    mean, covariance = mixture.posterior(Linear(matrix), y, noise_std).moments()
    expected = density @ x
    assert torch.allclose(mean, expected, atol=1e-8)
    spread = (density[:, None] * (x - expected)).T @ (x - expected)
    assert torch.allclose(covariance, spread, atol=1e-8)


def test_posterior_by_importance_sampling():
    """Prior draws weighted by the likelihood, within four standard errors."""
    mixture, matrix, noise_std = random_mixture((5,)), random_matrix(2, 5), 0.5
    x0 = mixture.sample(1, torch.Generator().manual_seed(5))
    y = x0 @ matrix.T
    x = mixture.sample(200_000, torch.Generator().manual_seed(6))
    likelihood = torch.distributions.Normal(x @ matrix.T, noise_std).log_prob(y).sum(1).exp()
    found, error = likelihood.mean(), likelihood.std() / len(x) ** 0.5
    exact = mixture.log_evidence(Linear(matrix), y, noise_std).exp()
    assert abs(float(found - exact)) < 4 * float(error) < 0.1 * float(exact)
    share = likelihood / likelihood.sum()
    mean, _ = mixture.posterior(Linear(matrix), y, noise_std).moments()
    error = ((share[:, None] * (x - share @ x)) ** 2).sum(0).sqrt()
    assert ((share @ x - mean).abs() < 4 * error).all()
    assert (error < 0.02).all()


@pytest.mark.parametrize("make", [random_mixture, diagonal_mixture])
def test_posterior_score_is_that_of_the_joint_density(sde, make):
    mixture, matrix, noise_std = make((3,)), random_matrix(2, 3), 0.1
    y = torch.randn(1, 2, dtype=f64)
    posterior = mixture.posterior(Linear(matrix), y, noise_std)
    for t in (sde.t_min_sampling, 0.3 * sde.t_max, sde.t_max):
        alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
        x = alpha * posterior.sample(4) + sigma * torch.randn(4, 3, dtype=f64)
        x.requires_grad_()
        joint = log_joint(mixture, matrix, x, y, noise_std, alpha, sigma)
        (gradient,) = torch.autograd.grad(joint.sum(), x)
        score = posterior.score(sde)(x.detach(), t)
        assert torch.allclose(score, gradient, rtol=1e-5, atol=1e-6 / sigma)
        evidence = mixture.log_evidence(Linear(matrix), y, noise_std)
        assert torch.allclose(posterior.log_prob(x, sde, t), joint - evidence, atol=1e-6)


@pytest.mark.parametrize("make", [random_mixture, diagonal_mixture])
def test_exact_measurements_of_entries(make):
    """Without noise: the conditional Gaussian by the Schur complement."""
    mixture = make((2, 2))
    mask = torch.tensor([[1, 0], [0, 1]])
    y = torch.tensor([[[0.4, 0.0], [0.0, -0.3]]], dtype=f64)
    known = mask.flatten().bool()
    posterior = mixture.posterior(Mask(mask), y, 0.0)
    with pytest.raises(ValueError, match="no density"):
        posterior.log_prob(y)
    x = posterior.sample(9)
    assert torch.allclose(x * mask, y.expand(9, 2, 2), atol=1e-12)
    means, found = mixture.means.flatten(1), covariances(mixture)
    logs = []
    for k, (m, s) in enumerate(zip(means, found, strict=True)):
        gain = torch.linalg.solve(s[known][:, known], s[known][:, ~known]).T
        r = y.flatten()[known] - m[known]
        assert torch.allclose(posterior.means[k].flatten()[~known], m[~known] + gain @ r)
        left = s[~known][:, ~known] - gain @ s[known][:, ~known]
        assert torch.allclose(posterior.covariances[k][~known][:, ~known], left, atol=1e-12)
        assert posterior.covariances[k][known].abs().max() < 1e-14
        logs.append(
            mixture.weights[k].log() + Normal(m[known], s[known][:, known]).log_prob(r + m[known])
        )
    logs = torch.stack(logs)
    assert torch.allclose(posterior.weights, logs.softmax(0))
    assert torch.allclose(mixture.log_evidence(Mask(mask), y, 0.0), logs.logsumexp(0))


def test_exact_measurements_are_the_limit_of_small_noise():
    mixture, operator = random_mixture((4,)), Linear(random_matrix(2, 4))
    y = torch.tensor([[0.5, -0.2]], dtype=f64)
    exact, near = (mixture.posterior(operator, y, s) for s in (0.0, 1e-6))
    assert torch.allclose(exact.means, near.means, atol=1e-9)
    assert torch.allclose(exact.weights, near.weights, atol=1e-9)
    assert torch.allclose(exact.covariances, near.covariances, atol=1e-9)
    evidence = [mixture.log_evidence(operator, y, s) for s in (0.0, 1e-6)]
    assert torch.allclose(*evidence, atol=1e-9)
    # Noise far below what a covariance could hold beside a variance of one.
    tiny = mixture.posterior(operator, y, 1e-9)
    ruled = (tiny.means - exact.means).abs().max()
    assert ruled < 1e-12
    spread = operator(tiny.sample(4000, torch.Generator().manual_seed(0))) - y
    assert torch.allclose(spread.std(0), torch.full((2,), 1e-9, dtype=f64), rtol=0.05)


def test_rows_that_say_the_same_twice():
    """The same number twice is one of half the variance; exact ones are one exact number."""
    mixture, row = random_mixture((3,)), random_matrix(1, 3)
    twice, y = Linear(row.repeat(2, 1)), torch.tensor([[0.3, 0.3]], dtype=f64)
    for noise_std in (0.4, 0.0):
        one = mixture.posterior(Linear(row), y[:, :1], noise_std / 2**0.5)
        two = mixture.posterior(twice, y, noise_std)
        assert torch.allclose(one.means, two.means)
        assert torch.allclose(one.weights, two.weights)
        assert torch.allclose(one.covariances, two.covariances, atol=1e-12)


def test_what_a_mask_hides_is_no_measurement():
    mixture = diagonal_mixture((4,))
    mask = torch.tensor([1, 0, 0, 1])
    y = torch.tensor([[0.2, 0.0, 0.0, -0.4]], dtype=f64)
    rows = Linear(torch.eye(4, dtype=f64)[mask.bool()])
    one, two = mixture.posterior(Mask(mask), y, 0.1), mixture.posterior(rows, y[:, mask > 0], 0.1)
    assert torch.allclose(one.means, two.means)
    assert torch.allclose(one.weights, two.weights)
    evidence = mixture.log_evidence(Mask(mask), y, 0.1)
    assert torch.allclose(evidence, mixture.log_evidence(rows, y[:, mask > 0], 0.1))
    likelihood = Mask(mask).log_likelihood(y, y, 0.1)
    assert torch.allclose(likelihood, torch.tensor(-math.log(2 * math.pi * 0.01), dtype=f64))


def test_measured_twice_is_measured_once_by_both():
    """A posterior is a prior for the next measurement, also where nothing is left to know."""
    mixture, matrix = diagonal_mixture((3,)), random_matrix(2, 3)
    y = torch.tensor([[0.3, -0.6]], dtype=f64)
    for noise_std in (0.2, 0.0):
        together = mixture.posterior(Linear(matrix), y, noise_std)
        first = mixture.posterior(Linear(matrix[:1]), y[:, :1], noise_std)
        then = first.posterior(Linear(matrix[1:]), y[:, 1:], noise_std)
        assert torch.allclose(together.means, then.means, atol=1e-10)
        assert torch.allclose(together.weights, then.weights)
        assert torch.allclose(together.covariances, then.covariances, atol=1e-10)


def test_a_component_that_cannot_be_is_no_part_of_the_posterior(sde):
    far = sd.GaussianMixture([1.0, 1.0], torch.tensor([[0.0, 0.0], [500.0, 0.0]]), [1.0, 0.1])
    posterior = far.posterior(Linear(torch.eye(2)[:1]), torch.zeros(1, 1), 0.1)
    assert posterior.weights.tolist() == [1.0, 0.0]
    x = posterior.sample(50)
    assert x.dtype == torch.float32
    assert x.abs().max() < 6
    assert posterior.score(sde)(x, sde.t_min).isfinite().all()
    assert posterior.log_prob(x, sde, sde.t_min).isfinite().all()
