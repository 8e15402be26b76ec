import math

import pytest
import torch
from scipy import stats

import scoresde as sd
from scoresde.likelihood.classifier import classify
from scoresde.model import Score

f64 = torch.float64
FAST = {"method": "rk4", "steps": 16}


class Conditional(Score):
    """The exact score of one mixture a class, chosen by the label of each sample."""

    def __init__(self, mixtures, sde):
        self.mixtures, self.sde = mixtures, sde
        self.scores = [mixture.score(sde) for mixture in mixtures]
        self.weights = "exact"

    def __call__(self, x, t, *, y):
        each = torch.stack([score(x, t) for score in self.scores])
        return each[y, torch.arange(len(x))]

    def log_posterior(self, x, prior=None, t=None):
        """Bayes' closed form, of the data with the noise of ``t_min``."""
        t = self.sde.t_min_likelihood if t is None else t
        joint = torch.stack([m.log_prob(x, self.sde, t) for m in self.mixtures], 1)
        prior = torch.ones(len(self.mixtures)) if prior is None else prior
        return torch.log_softmax(joint + torch.as_tensor(prior, dtype=f64).log(), 1)


def conditional(sde=None, dims=2, classes=3, apart=1.0):
    """Mixtures of two components with unequal axes, of classes that differ more or less."""
    generator = torch.Generator().manual_seed(3)

    def draw():
        means = 0.8 * torch.randn(2, dims, generator=generator, dtype=f64)
        return means, 0.4 + 0.4 * torch.rand(2, dims, generator=generator, dtype=f64)

    mixtures, shared = [], draw()
    for _ in range(classes):
        means, stds = (a + apart * (b - a) for a, b in zip(shared, draw(), strict=True))
        mixtures.append(sd.GaussianMixture([1.0, 2.0], means, stds))
    return Conditional(mixtures, sde or sd.VP())


def data(score, n=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([m.sample(n, generator) for m in score.mixtures])


def repeats(score, n=200):
    """One item, as often as there are to be draws of its noise."""
    return data(score, 1)[1:2].repeat(n, 1)


# --- the number -------------------------------------------------------------------------------


def test_bayes_in_closed_form(sde):
    score = conditional(sde)
    x, prior = data(score, 3), [0.5, 0.3, 0.2]
    out = classify(score, x, 3, prior=[5, 3, 2], divergence="exact")
    truth = score.log_posterior(x, prior)
    # What is left is the prior's misfit at t_max, of each class another.
    assert (out.log_posterior.exp() - truth.exp()).abs().max() < 0.012
    assert (out.log_posterior - truth).abs().max() < 0.2
    assert torch.equal(out.prediction, truth.argmax(1))
    assert torch.allclose(out.log_posterior.exp().sum(1), torch.ones(9, dtype=f64))
    assert (out.stderr == 0).all()
    assert (out.confidence == 1).all()
    assert out.converged.all()
    assert out.log_posterior.shape == out.stderr.shape == out.log_likelihood.shape == (9, 3)
    assert out.prior.tolist() == pytest.approx(prior)


def test_the_bound_in_closed_form(sde):
    score = conditional(sde)
    x = data(score, 3)
    out = classify(score, x, 3, method="elbo", terms=200)
    error = out.log_posterior - score.log_posterior(x)
    assert (error.abs() < 4 * out.stderr + 0.05).all()
    assert out.stderr.median() < 0.3
    assert out.estimates == 200
    assert (out.method, out.settings["density"]) == ("elbo", "smoothed")


def test_it_is_what_log_prob_says():
    score = conditional(dims=4)
    x = data(score, 2)
    out = classify(score, x, 3, probes=2, seed=7, start_index=5, **FAST)
    for label in range(3):
        y = torch.full((len(x),), label)
        one = sd.log_prob(score, x, y=y, probes=2, seed=7, start_index=5, **FAST)
        assert torch.equal(out.log_likelihood[:, label], one.log_prob)
    expected = torch.log_softmax(out.log_likelihood, 1)
    torch.testing.assert_close(out.log_posterior, expected)
    assert out.nfe.tolist() == [3 * 64 + 2] * len(x)  # and two looks at whether y counts
    assert (out.seed, out.start_index, out.weights, out.estimates) == (7, 5, "exact", 2)
    assert (out.settings["steps"], out.settings["divergence"]) == (16, "hutchinson")


def test_labels_of_the_user():
    score = conditional(classes=4)
    x = data(score, 2)
    whole = classify(score, x, 4, divergence="exact", **FAST)
    some = classify(score, x, [3, 1], divergence="exact", **FAST)
    assert torch.equal(some.log_likelihood, whole.log_likelihood[:, [3, 1]])
    assert torch.equal(some.classes, torch.tensor([3, 1]))
    better = whole.log_likelihood[:, 3] > whole.log_likelihood[:, 1]
    assert torch.equal(some.prediction, torch.where(better, 3, 1))


# --- its error --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "factor"),
    [({"probes": 8, **FAST}, stats.t.ppf(0.975, 7)), ({"method": "elbo", "terms": 64}, 2.0)],
    ids=["ode", "elbo"],
)
def test_the_error_bar_covers(settings, factor):
    score = conditional(dims=8, apart=0.5)
    x = repeats(score)
    out = classify(score, x, 3, **settings)
    if settings["method"] == "elbo":
        truth = score.log_posterior(x[:1])
    else:
        truth = classify(score, x[:1], 3, divergence="exact", **FAST).log_posterior
    inside = ((out.log_posterior - truth).abs() < factor * out.stderr).double().mean(0)
    assert (inside > 0.89).all()
    assert (out.log_posterior.std(0) > 0.6 * out.stderr.square().mean(0).sqrt()).all()


@pytest.mark.parametrize(
    ("settings", "factor"),
    [({"probes": 2, **FAST}, 8), ({"method": "elbo", "terms": 16}, 8)],
    ids=["ode", "elbo"],
)
def test_common_noise_makes_differences_precise(settings, factor):
    score = conditional(dims=4, apart=0.1)
    x = repeats(score)
    one, two = (classify(score, x, 3, seed=seed, **settings).log_likelihood for seed in (0, 1))
    common = (one[:, 0] - one[:, 1]).var()
    independent = (one[:, 0] - two[:, 1]).var()
    assert independent > factor * common


def test_confidence_is_students():
    score = conditional(dims=4, classes=2)
    x = data(score, 4)
    out = classify(score, x, 2, probes=5, **FAST)
    parts = [
        sd.log_prob(score, x, y=torch.full((8,), label), probes=5, **FAST).estimates
        for label in (0, 1)
    ]
    difference = parts[0] - parts[1]
    t = difference.mean(1).abs() / (difference.std(1) / math.sqrt(5))
    torch.testing.assert_close(out.confidence, torch.as_tensor(stats.t.cdf(t, 4)))
    p = out.log_posterior.exp()
    expected = p[:, [1]] * (difference.std(1) / math.sqrt(5))[:, None]
    torch.testing.assert_close(out.stderr[:, :1], expected)


def test_confidence_counts_the_other_classes():
    """With errors that decide nothing it says so, and it does not overstate what it knows."""
    score = conditional(dims=4)
    x = repeats(score)
    out = classify(score, x, 3, method="elbo", terms=6)
    right = out.prediction == score.log_posterior(x[:1]).argmax(1)
    assert ((out.confidence >= 0) & (out.confidence <= 1)).all()
    assert out.confidence.mean() < 0.97
    assert right.double().mean() > out.confidence.mean() - 0.1


def test_one_probe_tells_nothing_of_its_error():
    score = conditional()
    for settings in ({"probes": 1, **FAST}, {"method": "elbo", "terms": 1}):
        out = classify(score, data(score, 1), 3, **settings)
        assert out.stderr.isnan().all()
        assert out.confidence.isnan().all()
        assert out.log_posterior.isfinite().all()


@pytest.mark.parametrize(
    "settings", [{"probes": 2, **FAST}, {"method": "elbo", "terms": 4}], ids=["ode", "elbo"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_item_does_not_depend_on_its_batch(settings, dtype):
    score = conditional(dims=3)
    x = data(score, 2).to(dtype)
    whole = classify(score, x, 3, **settings)
    parts = [classify(score, x[i : i + 3], 3, start_index=i, **settings) for i in (0, 3)]
    for name in ("log_posterior", "stderr", "prediction", "confidence"):
        both = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(both, getattr(whole, name), rtol=1e-4, atol=1e-4)
    assert whole.log_posterior.dtype == whole.confidence.dtype == dtype


# --- what does not fit --------------------------------------------------------------------------


def test_progress_is_that_of_all_classes():
    score, told = conditional(), []
    classify(score, data(score, 1), 3, progress=lambda *what: told.append(what[0]), **FAST)
    assert told == sorted(told)
    assert told[0] < 0.1
    assert told[-1] == pytest.approx(1, abs=0.05)
    assert any(1 / 3 < f < 2 / 3 for f in told)


def test_a_solve_that_is_given_up_is_said():
    score = conditional()
    out = classify(score, data(score, 1), 3, divergence="exact", max_nfe=30)
    assert not out.converged.any()
    assert out.log_posterior.isnan().all()
    assert "class 0" in out.message


def test_further_conditions_reach_the_score():
    plain = conditional()

    def score(x, t, *, y, scale):
        return plain(x, t, y=y) * scale[:, None]

    score.sde = plain.sde
    x = data(plain, 1)
    scale = torch.full((3,), 0.9, dtype=f64)
    for settings in ({"divergence": "exact", **FAST}, {"method": "elbo", "terms": 4}):
        out = classify(score, x, 3, scale=scale, **settings)
        other = classify(plain, x, 3, **settings)
        assert (out.log_posterior - other.log_posterior).abs().max() > 1e-3
        same = classify(score, x, 3, scale=torch.ones(3, dtype=f64), **settings)
        torch.testing.assert_close(same.log_posterior, other.log_posterior)


def ignores(x, t, *, y):
    return -x


ignores.sde = sd.VP()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"score": ignores}, "does not depend on y"),
        ({"score": sd.GaussianMixture([1.0], [[0.0, 0.0]], [1.0]).score(sd.VP())}, "takes y"),
        ({"classes": 1}, "two classes or more, got 1"),
        ({"classes": [0, 0]}, "different whole labels"),
        ({"classes": [0.5, 1.0]}, "different whole labels"),
        ({"prior": [0.5, 0.5]}, "for each of 3 classes"),
        ({"prior": [0.5, 0.5, 0.0]}, "a probability > 0"),
        ({"terms": 8}, "terms are those of method='elbo'"),
        ({"method": "elbo", "rtol": 1e-3}, "by elbo takes no 'rtol'"),
        ({"times": "uniform"}, "by the ODE takes no 'times'"),
        ({"y": 1}, "takes no 'y'"),
        ({"target_stderr": 0.1}, "takes no 'target_stderr'"),
        ({"method": "elbo", "levels": 256}, "takes no 'levels'"),
        ({"method": "elbow"}, "unknown method 'elbow'"),
    ],
)
def test_what_does_not_fit_is_refused(change, match):
    score = conditional()
    arguments = {"score": score, "x": data(score, 1), "classes": 3, **change}
    with pytest.raises(ValueError, match=match):
        classify(**arguments)
