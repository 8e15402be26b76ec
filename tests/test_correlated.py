"""Full covariances, against densities that are written out."""

import math

import pytest
import torch
from gaussians import (
    covariances,
    diagonal_mixture,
    f64,
    log_density,
    random_matrix,
    random_mixture,
)

import scoresde as sd
from scoresde.inverse.linear import Linear


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 2, 2)])
def test_density_and_score_at_all_times(sde, shape):
    mixture = random_mixture(shape)
    x = torch.randn(4, *shape, dtype=f64)
    assert torch.allclose(mixture.log_prob(x), log_density(mixture, x), rtol=1e-10)
    for t in (sde.t_min, 0.3 * sde.t_max, sde.t_max):
        alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
        at = (alpha * mixture.sample(4) + sigma * x).requires_grad_()
        expected = log_density(mixture, at, alpha, sigma)
        assert torch.allclose(mixture.log_prob(at, sde, t), expected, rtol=1e-9, atol=1e-9)
        (gradient,) = torch.autograd.grad(expected.sum(), at)
        score = mixture.score(sde)(at.detach(), t)
        assert torch.allclose(score, gradient, rtol=1e-6, atol=1e-7 / sigma)


def test_times_of_each_sample(sde):
    mixture = random_mixture()
    score, x = mixture.score(sde), torch.randn(3, 3, dtype=f64)
    t = torch.tensor([0.01, 0.4, 0.9], dtype=f64) * sde.t_max
    alone = [score(x[i : i + 1], float(t[i])) for i in range(3)]
    assert torch.allclose(score(x, t), torch.cat(alone), rtol=1e-10)
    assert torch.allclose(
        mixture.log_prob(x, sde, t)[1:2], mixture.log_prob(x[1:2], sde, float(t[1]))
    )


def test_a_diagonal_covariance_is_the_diagonal_mixture(sde):
    diagonal = diagonal_mixture((2, 2))
    full = sd.CorrelatedMixture(diagonal.weights, diagonal.means, covariances(diagonal))
    x, t = torch.randn(5, 2, 2, dtype=f64), 0.2 * sde.t_max
    assert torch.allclose(full.log_prob(x), diagonal.log_prob(x))
    one, two = full.score(sde), diagonal.score(sde)
    assert torch.allclose(one(x, t), two(x, t))
    assert torch.allclose(one.denoised_covariance(x, t), two.denoised_covariance(x, t))
    for a, b in zip(full.moments(), diagonal.moments(), strict=True):
        assert torch.allclose(a, b)


def test_sampling_has_the_moments():
    mixture = random_mixture((2, 2))
    x = mixture.sample(100_000, torch.Generator().manual_seed(0))
    assert x.shape == (100_000, 2, 2)
    mean, covariance = mixture.moments()
    error = (covariance.diag() / len(x)).sqrt()
    assert ((x.flatten(1).mean(0) - mean.flatten()).abs() < 4 * error).all()
    scale = covariance.diag().sqrt()
    assert ((x.flatten(1).T.cov() - covariance).abs() < 0.03 * scale[:, None] * scale).all()
    again = mixture.sample(5, torch.Generator().manual_seed(1))
    assert torch.equal(again, mixture.sample(5, torch.Generator().manual_seed(1)))


def test_sampled_components_have_their_own_covariances():
    """Components far apart, and of opposite correlation."""
    means = torch.tensor([[-50.0, 0.0], [50.0, 0.0]], dtype=f64)
    matrices = torch.tensor([[[1.0, 0.8], [0.8, 1.0]], [[2.0, -0.9], [-0.9, 0.5]]], dtype=f64)
    mixture = sd.CorrelatedMixture([1.0, 3.0], means, matrices)
    x = mixture.sample(40_000, torch.Generator().manual_seed(0))
    for part, matrix in zip((x[x[:, 0] < 0], x[x[:, 0] > 0]), matrices, strict=True):
        assert torch.allclose(part.T.cov(), matrix, atol=0.05)
    assert float((x[:, 0] < 0).double().mean()) == pytest.approx(0.25, abs=0.01)
    assert torch.allclose(mixture.covariances, matrices)


@pytest.mark.parametrize("make", [random_mixture, diagonal_mixture])
def test_denoised_covariance_is_that_of_tweedie(sde, make):
    """``(sigma^2/alpha) d E[x_0 | x_t] / d x_t``, the derivative by autograd."""
    mixture = make((3,))
    score = mixture.score(sde)
    for t in (torch.tensor([0.05, 0.6], dtype=f64) * sde.t_max, 0.3 * sde.t_max):
        x = torch.randn(2, 3, dtype=f64)
        jacobian = torch.autograd.functional.jacobian(lambda v, t=t: score.denoise(v, t), x)
        own = torch.stack([jacobian[i, :, i] for i in range(2)])
        factor = torch.as_tensor(sde.sigma(t) ** 2 / sde.alpha(t)).reshape(-1, 1, 1)
        found = score.denoised_covariance(x, t)
        assert torch.allclose(found, factor * own, rtol=1e-6, atol=1e-9)


def test_a_singular_covariance_has_a_score(sde):
    """All mass on a line, in three dimensions."""
    direction = torch.tensor([1.0, 2.0, -1.0], dtype=f64)
    mean = torch.tensor([[0.3, 0.0, 1.0]], dtype=f64)
    line = sd.CorrelatedMixture.of_factors([1.0], mean, direction[None, :, None])
    x = line.sample(7, torch.Generator().manual_seed(0)) - mean
    along = x @ direction / direction.square().sum()
    assert torch.allclose(x, along[:, None] * direction, atol=1e-14)
    assert along.std() > 0.2
    for t in (sde.t_min, sde.t_min_sampling, 0.5 * sde.t_max):
        alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
        x = alpha * (mean + direction) + sigma * torch.randn(5, 3, dtype=f64)
        r, unit = x - alpha * mean, direction / direction.norm()
        along, across = r @ unit, r - (r @ unit)[:, None] * unit
        spread = alpha**2 * direction.square().sum() + sigma**2
        square = along**2 / spread + across.square().sum(1) / sigma**2
        log_norm = 3 * math.log(2 * math.pi) + spread.log() + 4 * math.log(sigma)
        assert torch.allclose(line.log_prob(x, sde, t), -(square + log_norm) / 2, rtol=1e-9)
        pull = along[:, None] / spread * unit + across / sigma**2
        assert torch.allclose(line.score(sde)(x, t), -pull, rtol=1e-7, atol=1e-8 / sigma)
    with pytest.raises(ValueError, match="no density"):
        line.log_prob(x)
    whole = sd.CorrelatedMixture([1.0], mean, torch.outer(direction, direction)[None])
    with pytest.raises(ValueError, match="no density"):
        whole.log_prob(x)
    assert torch.allclose(whole.score(sde)(x, 0.1), line.score(sde)(x, 0.1))


def test_rounding_is_no_variance():
    """Rank two in six dimensions: four variances are zero, not what rounding leaves."""
    roots = random_matrix(4 * 6, 2).reshape(4, 6, 2)
    for mixture in (
        sd.CorrelatedMixture(torch.ones(4), torch.zeros(4, 6), roots @ roots.mT),
        sd.CorrelatedMixture.of_factors(torch.ones(4), torch.zeros(4, 6), roots @ roots.mT / 3),
    ):
        assert torch.equal((mixture.values > 0).sum(1), torch.full((4,), 2))
        assert (mixture.values >= 0).all()


def test_covariances_in_float32_are_diagonalised_in_float64():
    axes = torch.linalg.qr(random_matrix(3, 3)).Q
    matrix = (axes * torch.tensor([1.0, 1e-3, 1e-5], dtype=f64) @ axes.T).float()
    values = sd.CorrelatedMixture([1.0], torch.zeros(1, 3), ((matrix + matrix.T) / 2)[None]).values
    exact = torch.linalg.eigvalsh((matrix.double() + matrix.double().T) / 2)
    assert torch.allclose(values[0].double().sort().values, exact, rtol=1e-4)


def test_float32_keeps_small_variances_beside_large_ones(sde):
    """Standard deviations 1, 1e-2 and 1e-4; a point near the data, down to ``t_min``."""
    axes = torch.linalg.qr(random_matrix(3, 3)).Q
    stds = torch.tensor([1.0, 1e-2, 1e-4], dtype=f64)
    wide = sd.CorrelatedMixture.of_factors(
        [1.0, 1.0], 0.5 * random_matrix(2, 3), (axes * stds).expand(2, 3, 3)
    )
    single = wide.to(dtype=torch.float32)
    for t in (sde.t_min, sde.t_min_sampling):
        x0 = wide.sample(20, torch.Generator().manual_seed(0))
        eps = torch.randn(20, 3, dtype=f64, generator=torch.Generator().manual_seed(1))
        x = sde.perturb(x0, t, eps).float().double()
        expected, found = wide.score(sde).noise(x, t), single.score(sde).noise(x.float(), t)
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() < 2e-3
        # The density of a point that float32 moves by its rounding, on the scale of the noise.
        assert torch.allclose(
            single.log_prob(x.float(), sde, t).double(), wide.log_prob(x, sde, t), atol=0.02
        )


def test_far_from_the_data_nothing_overflows():
    for dtype, far in ((f64, 1e12), (torch.float32, 1e8)):
        mixture = random_mixture((2,)).to(dtype=dtype)
        x = torch.full((1, 2), far, dtype=dtype)
        for t in (1e-5, 1.0):
            assert mixture.log_prob(x, sd.VP(), t).isfinite().all()
            assert mixture.score(sd.VP())(x, t).isfinite().all()


def test_dtype():
    mixture = random_mixture((2,))
    single = mixture.to(dtype=torch.float32)
    assert single.means.dtype == single.axes.dtype == torch.float32
    x = torch.randn(3, 2, dtype=f64)
    assert torch.allclose(single.log_prob(x).double(), mixture.log_prob(x), rtol=1e-4, atol=1e-4)
    posterior = single.posterior(Linear(torch.eye(2)), torch.zeros(1, 2), 0.5)
    assert posterior.means.dtype == torch.float32
    assert single.log_evidence(Linear(torch.eye(2)), torch.zeros(1, 2), 0.5).dtype == torch.float32


def test_what_does_not_fit_is_refused():
    means, eye = torch.zeros(2, 2), torch.eye(2).expand(2, 2, 2)
    with pytest.raises(ValueError, match=r"covariances .* \(2, 2, 2\)"):
        sd.CorrelatedMixture([1.0, 1.0], means, torch.eye(2))
    with pytest.raises(ValueError, match=r"factors of shape \(1, 2, 2\)"):
        sd.CorrelatedMixture.of_factors([1.0, 1.0], means, torch.eye(2)[None])
    with pytest.raises(ValueError, match="one weight a component"):
        sd.CorrelatedMixture([1.0], means, eye)
    with pytest.raises(ValueError, match="must not be negative"):
        sd.CorrelatedMixture([1.0, -1.0], means, eye)
    with pytest.raises(ValueError, match="symmetric"):
        sd.CorrelatedMixture([1.0, 1.0], means, torch.ones(2, 2, 2).triu())
    with pytest.raises(ValueError, match="semidefinite"):
        sd.CorrelatedMixture([1.0, 1.0], means, -eye)
    mixture = sd.CorrelatedMixture([1.0, 1.0], means, eye)
    one = Linear(torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"noise_std must be finite and >= 0"):
        mixture.posterior(one, torch.zeros(1, 1), -0.1)
    with pytest.raises(ValueError, match=r"y of shape \(1, 2\) .* \(B, \*\(1,\)\)"):
        mixture.posterior(one, torch.zeros(1, 2), 0.1)
    with pytest.raises(ValueError, match="one measurement"):
        mixture.posterior(one, torch.zeros(2, 1), 0.1)
    with pytest.raises(ValueError, match="items of shape"):
        mixture.posterior(Linear(torch.ones(1, 3)), torch.zeros(1, 1), 0.1)
    flat = sd.CorrelatedMixture([1.0], means[:1], torch.diag(torch.tensor([1.0, 0.0]))[None])
    with pytest.raises(ValueError, match="give a noise_std > 0"):
        flat.posterior(Linear(torch.eye(2)), torch.zeros(1, 2), 0.0)
