"""Guidance by an energy of the denoised data: gradients in closed form, and who is given what."""

import math

import pytest
import torch
from counted import Counted, f64, labelled, network, states, times
from torch import nn

import scoresde as sd
from scoresde.guidance import Classifier, Energy

MEAN, SIZE, TARGET, SPREAD = 0.4, 0.7, 1.5, 0.5


def gaussian(sde):
    """The score of data ``N(MEAN, SIZE^2)`` in two dimensions."""
    return sd.GaussianMixture([1.0], torch.full((1, 2), MEAN, dtype=f64), [SIZE]).score(sde)


def likeness(x0):
    return -((TARGET - x0) ** 2).sum(1) / (2 * SPREAD**2)


@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_gradient_in_closed_form(sde, through, scale):
    score = gaussian(sde)
    guided = Energy(score, likeness, scale, through)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=f64)
    for t in times(sde):
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        at = x * torch.hypot(alpha, sigma)
        jacobian = alpha * SIZE**2 / (alpha**2 * SIZE**2 + sigma**2)
        x0 = MEAN + jacobian * (at - alpha * MEAN)
        pull = (jacobian if through else 1 / alpha) * (TARGET - x0) / SPREAD**2
        wanted = score(at, t) + scale * pull
        torch.testing.assert_close(guided(at, t), wanted, rtol=1e-5, atol=1e-6)
        eps = guided.noise(at, t)
        torch.testing.assert_close(eps, -sigma * wanted, rtol=1e-5, atol=1e-6)
        moved = guided.denoise(at, t)
        torch.testing.assert_close(moved, (at + sigma**2 * wanted) / alpha, rtol=1e-4, atol=1e-4)


def test_little_noise_makes_it_a_classifier():
    """At little noise ``x0_hat`` is the item: as a classifier of clean items is then."""
    sde, mixture = sd.VP(), labelled()
    t = 1e-4
    x, y = states(mixture, sde, t)
    classifier = mixture.classifier(sde)
    by_classes = Classifier(mixture.score(sde), classifier)
    by_energy = Energy(mixture.score(sde), lambda x0, y: classifier(x0, 0.0, y))
    free = mixture.score(sde)(x, t)
    pulls = [guided(x, t, y=y) - free for guided in (by_classes, by_energy)]
    assert (pulls[0] - pulls[1]).abs().max() < 2e-3 * pulls[0].abs().max()
    assert pulls[0].abs().max() > 0.1


@pytest.mark.parametrize("through", [True, False])
def test_one_evaluation_and_the_way_back(through):
    sde, mixture = sd.VP(), labelled()
    score = Counted(mixture.score(sde))
    guided = Energy(score, likeness, 1.0, through, (0.1, 5.0))
    t = torch.tensor([0.02, 0.2, 0.5, 0.9], dtype=f64)  # q of 0.05, 0.58, 3.4 and 57
    x, _ = states(mixture, sde, t, 4)
    whole = guided(x, t)
    assert score.rows() == [4]
    assert guided.cost(t) == (1, int(through))
    plain = mixture.score(sde)(x, t)
    everywhere = Energy(mixture.score(sde), likeness, 1.0, through)(x, t)
    assert torch.equal(whole[[0, 3]], plain[[0, 3]])
    assert torch.equal(whole[[1, 2]], everywhere[[1, 2]])
    assert guided.cost(torch.tensor(0.9)) == (1, 0)
    twice = Energy(Classifier(score, lambda x, t: x.sum(1)), likeness)
    assert twice.cost(torch.tensor(0.3)) == (2, 1 + 2 + 2)


def test_who_is_given_which_condition():
    sde, mixture = sd.VP(), labelled()
    x, y = states(mixture, sde, 0.3)
    score, given = Counted(mixture.score(sde)), {}

    def told(x0, t, target, *, strength=1.0):
        given.update(t=t, target=target, strength=strength)
        return -strength * ((target - x0) ** 2).sum(1)

    target = torch.ones(6, 2, dtype=f64)
    Energy(score, told)(x, 0.3, y=y, target=target)
    assert set(score.calls.pop()[1]) == {"y"}
    assert given["target"] is target
    assert float(given["t"]) == 0.3
    Energy(score, told)(x, 0.3, target=target, strength=2.0)
    assert set(score.calls.pop()[1]) == set()
    assert given["strength"] == 2.0

    def labels(x0, y):
        given["y"] = y
        return x0.sum(1) * y

    Energy(score, labels)(x, 0.3, y=y)
    assert set(score.calls.pop()[1]) == set()
    Energy(score, labels, conditional=True)(x, 0.3, y=y)
    assert set(score.calls.pop()[1]) == {"y"}
    assert given["y"] is y

    def anything(x0, **given):
        return x0.sum(1) * given["y"]

    Energy(score, anything, takes=("y",))(x, 0.3, y=y)
    assert set(score.calls.pop()[1]) == set()


class Judge(nn.Module):
    """A classifier of clean items, with dropout."""

    def __init__(self):
        super().__init__()
        self.one, self.drop, self.modes = nn.Linear(3, 2), nn.Dropout(0.5), set()

    def forward(self, x0, t, wanted):
        self.modes.add(self.training)
        return self.one(self.drop(x0)).log_softmax(1).gather(1, wanted[:, None])[:, 0]


@pytest.mark.parametrize("solver", ["ancestral", "dpmpp-3m", "runge-kutta"])
@pytest.mark.parametrize("through", [True, False])
def test_samples(solver, through):
    model, judge = network(), Judge()
    guided = Energy(model, judge, 3.0, through, (0.1, 6.0))
    y, wanted = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 0, 1])
    model.train()
    steps = None if solver == "runge-kutta" else 9
    settings = {"solver": solver, "steps": steps, "threshold": "static", "seed": 2}
    with torch.inference_mode():
        out = sd.sample(guided, (4, 3), y=y.clone(), wanted=wanted.clone(), **settings)
    assert out.converged
    assert not out.x.requires_grad
    assert judge.modes == model.net.modes == {False}
    assert model.training
    assert judge.training
    again = sd.sample(guided, (4, 3), y=y, wanted=wanted, **settings)
    assert torch.equal(again.x, out.x)
    if steps:
        assert out.cost.forwards == out.nfe == 10
        assert (0 < out.cost.products < 10) if through else out.cost.products == 0
    judge.eval()
    model.eval()
    with torch.inference_mode():
        t = torch.full((4,), 0.3)
        inside = guided(torch.zeros(4, 3), t, y=y.clone(), wanted=wanted.clone())
    with torch.no_grad():
        assert torch.equal(inside, guided(torch.zeros(4, 3), t, y=y, wanted=wanted))


@pytest.mark.parametrize("through", [True, False])
def test_a_density_is_that_of_the_guided_flow(through):
    sde = sd.VP()
    mixture = sd.GaussianMixture([1.0, 2.0], torch.tensor([[0.8], [-0.7]], dtype=f64), [0.3, 0.4])
    grid = torch.linspace(-6, 6, 241, dtype=f64)[:, None]
    guided = Energy(
        mixture.score(sde), lambda x0: 2 * torch.sin(x0[:, 0]), 1.0, through, (0.0, 2.0)
    )
    out = sd.log_prob(guided, grid, divergence="exact", rtol=1e-7, atol=1e-7)
    assert float(out.log_prob.exp().sum() * 0.05) == pytest.approx(1.0, abs=2e-3)


def test_refusals():
    score, x = gaussian(sd.VP()), torch.zeros(2, 2, dtype=f64)
    with pytest.raises(ValueError, match=r"the energy gave shape \(\) for 2 samples"):
        Energy(score, lambda x0: x0.sum())(x, 0.3)
    with pytest.raises(ValueError, match="the energy is not differentiable"):
        Energy(score, lambda x0: x0.detach().sum(1))(x, 0.3)
    with pytest.raises(sd.ConfigError, match="Energy needs an interval"):
        Energy(score, likeness, interval=(math.nan, 1.0))

    class Cut(sd.Score):
        sde = sd.VP()

        def __call__(self, x, t):
            return -x.detach()

    with pytest.raises(ValueError, match="take through=False"):
        Energy(Cut(), likeness)(x, 0.3)
    free = Energy(Cut(), likeness, through=False)(x, 0.3)
    assert free.isfinite().all()
