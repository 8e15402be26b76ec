"""Full covariances, and posteriors of measurements, against densities that are written out."""

import math

import pytest
import torch

import scoresde as sd
from scoresde.inverse.linear import Linear
from scoresde.inverse.mask import Mask

f64 = torch.float64
Normal = torch.distributions.MultivariateNormal


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


EYE = torch.eye(3, dtype=f64)


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
