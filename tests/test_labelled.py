"""Mixtures with classes: conditional scores and the classifier, against Bayes' rule."""

import pytest
import torch

import scoresde as sd
from scoresde.inverse.linear import Linear

f64 = torch.float64
LABELS = [0, 1, 1, 2, 0]


def random_mixture(shape=(2,), full=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k = len(LABELS)
    means = torch.randn(k, *shape, generator=generator, dtype=f64)
    weights = torch.rand(k, generator=generator, dtype=f64) + 0.2
    if full:
        roots = torch.randn(k, means[0].numel(), means[0].numel(), generator=generator, dtype=f64)
        return sd.CorrelatedMixture.of_factors(weights, means, 0.6 * roots)
    stds = torch.rand(k, *shape, generator=generator, dtype=f64) * 0.5 + 0.2
    return sd.GaussianMixture(weights, means, stds)


def of_class(mixture, c):
    """The components of one class, as a mixture of their own."""
    chosen = torch.tensor(LABELS) == c
    if isinstance(mixture, sd.GaussianMixture):
        parts = (mixture.weights[chosen], mixture.means[chosen], mixture.stds[chosen])
        return sd.GaussianMixture(*parts)
    return sd.CorrelatedMixture(
        mixture.weights[chosen], mixture.means[chosen], mixture.covariances[chosen]
    )


def times(sde):
    return sde.t_min, sde.t_min_sampling, 0.3 * sde.t_max, sde.t_max


@pytest.mark.parametrize("full", [False, True])
def test_conditional_score_is_that_of_the_class(sde, full):
    mixture = random_mixture(full=full)
    labelled = sd.LabelledMixture(mixture, LABELS)
    score = labelled.score(sde)
    y = torch.tensor([2, 0, 3, 1, 3, 0])
    for t in times(sde):
        x = sde.perturb(mixture.sample(6), t, torch.randn(6, 2, dtype=f64))
        found, density = score(x, t, y=y), labelled.log_prob(x, sde, t, y)
        for i, c in enumerate(y.tolist()):
            own = mixture if c == 3 else of_class(mixture, c)
            assert torch.allclose(found[i : i + 1], own.score(sde)(x[i : i + 1], t), rtol=1e-7)
            exact = own.log_prob(x[i : i + 1], sde, t)
            assert torch.allclose(density[i : i + 1], exact, rtol=1e-8, atol=1e-8)
        assert torch.equal(score(x, t), mixture.score(sde)(x, t))
        assert torch.allclose(score(x, t, y=torch.full((6,), 3)), score(x, t))
        assert torch.equal(score(x, t, y=1), score(x, t, y=torch.ones(6, dtype=torch.long)))


@pytest.mark.parametrize("shape", [(2,), (1, 2, 2)])
def test_classifier_is_bayes_rule(sde, shape):
    mixture = random_mixture(shape)
    labelled = sd.LabelledMixture(mixture, LABELS)
    classifier = labelled.classifier(sde)
    t = torch.tensor([0.05, 0.2, 0.7, 1.0], dtype=f64) * sde.t_max
    x = torch.randn(4, *shape, dtype=f64)
    each = classifier(x, t)
    assert each.shape == (4, 3)
    assert torch.allclose(each.logsumexp(1), torch.zeros(4, dtype=f64), atol=1e-12)
    prior = [
        sum(w for w, k in zip(mixture.weights, LABELS, strict=True) if k == c) for c in (0, 1, 2)
    ]
    assert torch.allclose(labelled.prior, torch.stack(prior))
    for c in range(3):
        own = of_class(mixture, c).log_prob(x, sde, t) + prior[c].log()
        assert torch.allclose(each[:, c], own - mixture.log_prob(x, sde, t), atol=1e-9)
    y = torch.tensor([1, 0, 2, 3])
    found = classifier(x, t, y)
    assert torch.allclose(found[:3], each[torch.arange(3), y[:3]])
    assert found[3].abs() < 1e-12  # no class is certain to be


def test_classifier_by_quadrature():
    """``p(y | x_t) = int p(y | x_0) p(x_0 | x_t) dx_0`` in one dimension."""
    sde, t = sd.VP(), 0.35
    mixture = random_mixture((1,))
    x0 = torch.linspace(-9, 9, 20_001, dtype=f64)
    x = torch.tensor([[-1.5], [0.1], [1.2]], dtype=f64)
    kernel = torch.distributions.Normal(sde.alpha(t) * x0, sde.sigma(t)).log_prob(x).exp()
    parts = []
    for c in range(3):
        density = torch.zeros_like(x0)
        for w, m, s, k in zip(mixture.weights, mixture.means, mixture.stds, LABELS, strict=True):
            if k == c:
                density += w * torch.distributions.Normal(m, s).log_prob(x0).exp()
        parts.append(torch.trapezoid(kernel * density, x0))
    exact = torch.stack(parts, 1)
    found = sd.LabelledMixture(mixture, LABELS).classifier(sde)(x, t)
    assert torch.allclose(found.exp(), exact / exact.sum(1, keepdim=True), rtol=1e-8)


@pytest.mark.parametrize("full", [False, True])
def test_gradient_of_the_classifier_is_the_difference_of_scores(sde, full):
    mixture = random_mixture(full=full)
    labelled = sd.LabelledMixture(mixture, LABELS)
    classifier, score = labelled.classifier(sde), labelled.score(sde)
    y = torch.tensor([0, 1, 2, 0])
    for t in times(sde):
        x = sde.perturb(mixture.sample(4), t, torch.randn(4, 2, dtype=f64)).requires_grad_()
        (gradient,) = torch.autograd.grad(classifier(x, t, y).sum(), x)
        x = x.detach()
        expected = score(x, t, y=y) - score(x, t)
        scale = score(x, t, y=y).abs().max()
        assert torch.allclose(gradient, expected, rtol=1e-6, atol=float(1e-12 * scale))


def test_draws_carry_their_class():
    means = torch.tensor([[-30.0], [-10.0], [10.0], [30.0], [50.0]], dtype=f64)
    weights = torch.tensor([1.0, 2.0, 1.0, 2.0, 4.0], dtype=f64)
    labelled = sd.LabelledMixture(sd.GaussianMixture(weights, means, [1.0] * 5), LABELS)
    x, y = labelled.sample(20_000, torch.Generator().manual_seed(0))
    nearest = (x - means.T).abs().argmin(1)
    assert torch.equal(y, torch.tensor(LABELS)[nearest])
    shares = [float((y == c).double().mean()) for c in range(3)]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.015)
    assert torch.equal(x, labelled.mixture.sample(20_000, torch.Generator().manual_seed(0)))


def test_tails_and_small_times_in_both_dtypes(sde):
    """Far from all data, and at ``t_min``: no nan, and the same answer in float32."""
    mixture = random_mixture((2,))
    wide = sd.LabelledMixture(mixture, LABELS)
    single = wide.to(dtype=torch.float32)
    for far in (1.0, 30.0, 1e4):
        x = (mixture.sample(8, torch.Generator().manual_seed(0)) * far).float()
        y = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
        for t in (sde.t_min, sde.t_max):
            results = []
            for labelled, dtype in ((wide, f64), (single, torch.float32)):
                at = x.to(dtype).requires_grad_()
                log = labelled.classifier(sde)(at, t, y)
                (gradient,) = torch.autograd.grad(log.sum(), at)
                values = (log.detach(), gradient, labelled.score(sde)(at.detach(), t, y=y))
                assert all(v.isfinite().all() and v.dtype == dtype for v in values)
                results.append(values)
            # In the tails the log-densities are large, and float32 keeps seven of their digits.
            size = mixture.log_prob(x, sde, t).abs().max()
            assert (results[0][0] - results[1][0]).abs().max() < 2e-6 * size + 1e-4
            scale = results[0][2].abs().max()
            assert (results[0][2] - results[1][2]).abs().max() < 2e-3 * scale


def test_posterior_keeps_the_classes():
    mixture = random_mixture((2,))
    labelled = sd.LabelledMixture(mixture, LABELS)
    operator, y = Linear(torch.tensor([[1.0, -0.5]])), torch.tensor([[0.7]], dtype=f64)
    posterior = labelled.posterior(operator, y, 0.2)
    logs = []
    for c in range(3):
        evidence = of_class(mixture, c).log_evidence(operator, y, 0.2)
        logs.append(labelled.prior[c].log() + evidence[0])
    assert torch.allclose(posterior.prior, torch.stack(logs).softmax(0))
    assert torch.allclose(labelled.log_evidence(operator, y, 0.2), torch.stack(logs).logsumexp(0))


def test_one_class_is_certain():
    sde = sd.VP()
    labelled = sd.LabelledMixture(sd.GaussianMixture([1.0], torch.zeros(1, 2), [1.0]), [0])
    x = torch.randn(3, 2)
    assert torch.equal(labelled.classifier(sde)(x, 0.5), torch.zeros(3, 1))
    assert labelled.num_classes == 1
    assert labelled.score(sde).num_classes == 1
    assert labelled.shape == (2,)


def test_what_does_not_fit_is_refused():
    mixture = random_mixture()
    with pytest.raises(ValueError, match="one whole number a component"):
        sd.LabelledMixture(mixture, [0, 1])
    with pytest.raises(ValueError, match="one whole number a component"):
        sd.LabelledMixture(mixture, torch.zeros(5))
    with pytest.raises(ValueError, match=r"without a gap, got \[0, 2\]"):
        sd.LabelledMixture(mixture, [0, 2, 2, 0, 0])
    score = sd.LabelledMixture(mixture, LABELS).score(sd.VP())
    x = torch.zeros(4, 2)
    with pytest.raises(ValueError, match="one class a sample"):
        score(x, 0.5, y=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="one class a sample"):
        score(x, 0.5, y=torch.zeros(4))
    labelled = score.labelled
    for y in (torch.tensor([0, 1, 4, 0]), torch.tensor([0, -1, 2, 0])):  # 3 stands for none
        for ask in (
            lambda y: score(x, 0.5, y=y),
            lambda y: labelled.log_prob(x, y=y),
            lambda y: labelled.classifier(sd.VP())(x, 0.5, y),
        ):
            with pytest.raises(ValueError, match=r"classes from 0 to 3 .*, got (0 to 4|-1 to 2)"):
                ask(y)
