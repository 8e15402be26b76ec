"""Guidance by a classifier: Bayes' rule in closed form, and what a classifier is given."""

import pytest
import torch
from counted import Counted, f64, labelled, network, states, times
from torch import nn

import scoresde as sd
from scoresde.guidance import Classifier, ClassifierFree


def test_an_exact_classifier_gives_the_conditional_score(sde):
    mixture = labelled()
    score = mixture.score(sde)
    guided = Classifier(score, mixture.classifier(sde))
    for t in times(sde):
        x, y = states(mixture, sde, t)
        truth = score(x, t, y=y)
        assert (guided(x, t, y=y) - truth).abs().max() <= 1e-6 * truth.abs().max()
        torch.testing.assert_close(guided(x, t, y=y), truth, rtol=1e-9, atol=1e-9)
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        eps, x0 = -sigma * truth, (x + sigma**2 * truth) / alpha
        torch.testing.assert_close(guided.noise(x, t, y=y), eps, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(guided.denoise(x, t, y=y), x0, rtol=1e-6, atol=1e-6)


def test_in_float32_to_its_rounding():
    sde, mixture, single = sd.VP(), labelled(), labelled(dtype=torch.float32)
    guided = Classifier(single.score(sde), single.classifier(sde))
    for t in (1e-3, 0.1, 0.5, 1.0):
        x, y = states(mixture, sde, t)
        x = x.float()
        truth = mixture.score(sde)(x.double(), t, y=y)
        assert (guided(x, t, y=y) - truth).abs().max() / truth.abs().max() < 1e-5


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("conditional", [False, True])
def test_scales_are_powers_of_the_classifier(scale, conditional):
    sde, mixture = sd.Linear(), labelled()
    guided = Classifier(mixture.score(sde), mixture.classifier(sde), scale, None, conditional)
    x, y = states(mixture, sde, 0.4)
    found, x = guided(x, 0.4, y=y), x.requires_grad_()
    log = mixture.log_prob(x, sde, 0.4, y if conditional else None)
    log = log + scale * (mixture.log_prob(x, sde, 0.4, y) - mixture.log_prob(x, sde, 0.4))
    torch.testing.assert_close(found, torch.autograd.grad(log.sum(), x)[0])


def test_the_likelihood_is_the_conditional_one():
    sde, mixture = sd.VP(), labelled()
    x, y = mixture.sample(4, torch.Generator().manual_seed(1))
    guided = Classifier(mixture.score(sde), mixture.classifier(sde))
    settings = {"divergence": "exact", "rtol": 1e-8, "atol": 1e-8, "y": y}
    out = sd.log_prob(guided, x, **settings)
    plain = sd.log_prob(mixture.score(sde), x, **settings)
    torch.testing.assert_close(out.log_prob, plain.log_prob, rtol=1e-6, atol=1e-6)
    t = sde.t_min_likelihood
    # What is left to the closed form is the prior's misfit at t_max.
    assert (out.log_prob - mixture.log_prob(x, sde, t, y)).abs().max() < 0.05


def test_times_and_the_interval():
    sde, mixture = sd.VP(), labelled()
    score, classifier = Counted(mixture.score(sde)), mixture.classifier(sde)
    seen = []

    def watched(x, t, y):
        seen.append(len(x))
        return classifier(x, t, y)

    guided = Classifier(score, watched, 2.0, (0.1, 5.0))
    t = torch.tensor([0.02, 0.2, 0.5, 0.9], dtype=f64)  # q of 0.05, 0.58, 3.4 and 57
    x, y = states(mixture, sde, t, 4)
    whole = guided(x, t, y=y)
    plain = mixture.score(sde)(x, t)
    assert torch.equal(whole[[0, 3]], plain[[0, 3]])
    everywhere = Classifier(mixture.score(sde), classifier, 2.0)(x, t, y=y)
    assert torch.equal(whole[[1, 2]], everywhere[[1, 2]])
    assert guided.cost(t) == guided.cost(torch.tensor(0.3)) == (2, 1)
    for place, calls, cost in ((0.02, [], (1, 0)), (0.3, [4], (2, 1))):
        seen.clear()
        guided(x, place, y=y)
        assert seen == calls
        assert guided.cost(torch.tensor(place)) == cost
    assert Classifier(score, watched, 0.0).cost(torch.tensor(0.3)) == (1, 0)


def test_where_the_label_goes():
    sde, mixture = sd.VP(), labelled()
    x, y = states(mixture, sde, 0.3)
    score = Counted(mixture.score(sde))
    for conditional, names in ((False, set()), (True, {"y"})):
        Classifier(score, mixture.classifier(sde), 1.0, None, conditional)(x, 0.3, y=y)
        assert set(score.calls.pop()[1]) == names

    def about_one_thing(x, t):
        return -((x - 1) ** 2).sum(1) / (1 + t)

    found = Classifier(score, about_one_thing, 2.0)(x, 0.3)
    torch.testing.assert_close(found, mixture.score(sde)(x, 0.3) - 4 * (x - 1) / 1.3)


class Logits(nn.Module):
    num_classes = 4

    def __init__(self):
        super().__init__()
        self.one, self.drop, self.modes = nn.Linear(3, 4), nn.Dropout(0.5), set()

    def forward(self, x, c_noise):
        self.modes.add(self.training)
        return self.one(self.drop(torch.tanh(x)))


@pytest.mark.parametrize("solver", ["ancestral", "dpmpp-3m", "runge-kutta"])
@pytest.mark.parametrize("threshold", [None, "dynamic"])
def test_samples_by_a_trained_kind_of_classifier(solver, threshold):
    torch.manual_seed(0)  # some that may be drawn hardly tell the classes apart
    model = network()
    classifier = sd.NoisyClassifier(Logits(), model.sde, shape=(3,)).train()
    guided, y = Classifier(model, classifier, 3.0, (0.2, 6.0)), torch.tensor([0, 1, 2, 3])
    model.train()
    steps = None if solver == "runge-kutta" else 9
    settings = {"solver": solver, "steps": steps, "threshold": threshold, "seed": 2}
    with torch.inference_mode():
        out = sd.sample(guided, (4, 3), y=torch.tensor([0, 1, 2, 3]), **settings)
    assert out.converged
    assert not out.x.requires_grad
    assert classifier.net.modes == model.net.modes == {False}
    assert classifier.training
    assert model.training
    assert torch.equal(sd.sample(guided, (4, 3), y=y, **settings).x, out.x)
    if steps:
        passes = [float(sigma) for sigma in (out.cost.forwards, out.cost.products)]
        assert passes[0] == out.nfe + passes[1]
        assert 0 < passes[1] < out.nfe
    classifier.eval()
    model.eval()
    free = sd.sample(model, (4, 3), **settings)
    assert (classifier(out.x, 1e-3, y) > classifier(free.x, 1e-3, y)).all()
    with torch.inference_mode():
        inside = guided(torch.zeros(4, 3), torch.full((4,), 0.4), y=torch.tensor([0, 1, 2, 3]))
    assert torch.equal(inside, guided(torch.zeros(4, 3), torch.full((4,), 0.4), y=y))


def test_gradients_reach_the_classifier_and_the_network():
    model = network().double()
    classifier = sd.NoisyClassifier(Logits(), model.sde, shape=(3,)).double().eval()
    x = torch.randn(2, 3, dtype=f64)
    Classifier(model, classifier, 2.0)(x, 0.5, y=torch.tensor([0, 1])).sum().backward()
    assert classifier.net.one.weight.grad.abs().max() > 0
    assert model.net.outer.weight.grad.abs().max() > 0


def test_with_classifier_free_guidance_inside():
    sde, mixture = sd.VP(), labelled()
    x, y = states(mixture, sde, 0.4)
    inner = ClassifierFree(mixture.score(sde), 1.5)
    guided = Classifier(inner, mixture.classifier(sde), 0.5, conditional=True)
    wanted = ClassifierFree(mixture.score(sde), 2.0)
    torch.testing.assert_close(guided(x, 0.4, y=y), wanted(x, 0.4, y=y))
    assert guided.cost(torch.tensor(0.4)) == (3, 1)


def test_refusals():
    sde, mixture = sd.VP(), labelled()
    score, classifier = mixture.score(sde), mixture.classifier(sde)
    x = torch.zeros(2, 2, dtype=f64)
    with pytest.raises(
        ValueError, match=r"without a condition y, gave shape \(2, 3\) for 2 .*one log-probability"
    ):
        Classifier(score, classifier)(x, 0.3)
    with pytest.raises(ValueError, match="classifier is not differentiable in its first"):
        Classifier(score, lambda x, t: x.detach().sum(1))(x, 0.3)
    with pytest.raises(sd.ConfigError, match="classifier is of the process VE"):
        Classifier(score, mixture.classifier(sd.VE()))
    with pytest.raises(sd.ConfigError, match="Classifier needs a finite scale"):
        Classifier(score, classifier, float("inf"))


def test_classifiers_with_attention_are_differentiated_twice():
    """As the methods of inverse problems, and likelihoods, differentiate a guided score."""
    torch.manual_seed(0)
    net = sd.nets.ADMClassifier(
        (1, 8, 8), num_classes=3, width=32, multipliers=(1, 2), blocks=1, attention=(0, 1)
    )
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    classifier = sd.NoisyClassifier(net, sd.VP(), shape=(1, 8, 8), num_classes=3)
    law = sd.GaussianMixture([1.0], torch.zeros(1, 1, 8, 8), [0.5])
    led = Classifier(law.score(sd.VP()), classifier, 2.0)
    x, y = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    operator = sd.inverse.AveragePool((1, 8, 8), 4)
    method = sd.inverse.PGDM(led, operator, torch.zeros(1, 1, 2, 2), 0.1)
    with torch.no_grad():
        assert bool(method(x, 0.3, y=y).isfinite().all())
    with torch.enable_grad():
        x.requires_grad_()
        (second,) = torch.autograd.grad(led(x, 0.3, y=y).sum(), x)
    assert bool(second.isfinite().all())
