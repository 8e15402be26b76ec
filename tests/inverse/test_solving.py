"""One entry for all methods: what it makes of names, options, draws and conditions."""

import pytest
import torch

import scoresde as sd
from scoresde import inverse
from scoresde.config import ConfigError
from scoresde.inverse import solving

METHODS = [
    "ddrm", "diffpir", "dps", "mmps", "pgdm", "repaint", "replacement", "smc", "tmpd",
]  # fmt: skip
MEANS = torch.tensor([[1.0, -1.0], [-1.0, 0.5]], dtype=torch.float64)
PRIOR = sd.GaussianMixture([1.0], MEANS[:1], [0.7])
OPERATOR = inverse.Linear(torch.tensor([[1.0, 0.5]], dtype=torch.float64))
Y = torch.tensor([[0.2], [2.0]], dtype=torch.float64)


def test_every_method_has_its_name():
    assert solving.accepted() == sorted([*METHODS, "trained"])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_samples_a_gaussian_posterior_for_each_measurement(method):
    # An isotropic prior and one row: what PGDM, TMPD, MMPS and SMC take for granted is true here.
    options = {"particles": 400} if method == "smc" else {}
    options |= {"sigma_data": 0.7} if method in ("pgdm", "smc") else {}
    out = inverse.solve(
        PRIOR.score(sd.VP()), OPERATOR, Y, noise_std=0.3, draws=400, steps=60,
        method={"name": method, **options}, seed=1,
    )  # fmt: skip
    assert out.x.shape == (800, 2)
    for i, x in enumerate(out.x.split(400)):
        posterior = PRIOR.posterior(OPERATOR, Y[i : i + 1], 0.3)
        mean, covariance = posterior.moments()
        # The measured direction; what is left of the other differs by method.
        along = OPERATOR.dense()[0] / OPERATOR.norm
        wanted, std = float(along @ mean), float((along @ covariance @ along).sqrt())
        assert float((x @ along).mean()) == pytest.approx(wanted, abs=0.5 * std + 0.05)
    assert out.nfe >= 60
    assert (out.cost.products > 0) == (method in ("dps", "pgdm", "tmpd", "mmps", "smc"))


def test_draws_of_a_measurement_stand_in_a_row_and_keep_their_noise():
    score = PRIOR.score(sd.VP())
    given = {"noise_std": 0.3, "method": "pgdm", "steps": 5, "draws": 3}
    both = inverse.solve(score, OPERATOR, Y, **given)
    second = inverse.solve(score, OPERATOR, Y[1:], start_index=3, **given)
    assert torch.equal(both.x[3:], second.x)
    assert not torch.equal(both.x[0], both.x[1])


def test_solvers_that_go_on_with_some_samples_have_their_measurements():
    out = inverse.solve(
        PRIOR.score(sd.VP()), OPERATOR, Y, noise_std=0.3, method="mmps", draws=2, seed=3,
        solver="runge-kutta",
    )  # fmt: skip
    alone = inverse.solve(
        PRIOR.score(sd.VP()), OPERATOR, Y[1:], noise_std=0.3, method="mmps", draws=2, seed=3,
        solver="runge-kutta", start_index=2,
    )  # fmt: skip
    torch.testing.assert_close(out.x[2:], alone.x, rtol=1e-6, atol=1e-6)
    assert out.nfe.shape == (4,)


def test_options_that_suit_the_steps_are_taken_unless_they_are_given():
    score = PRIOR.score(sd.VP())
    given = {"noise_std": 0.3, "steps": 40}
    usual = inverse.solve(score, OPERATOR, Y, method="dps", **given)
    same = inverse.solve(score, OPERATOR, Y, method={"name": "dps", "reach": 5.0}, **given)
    other = inverse.solve(score, OPERATOR, Y, method={"name": "dps", "reach": 2.0}, **given)
    assert torch.equal(usual.x, same.x)
    assert not torch.equal(usual.x, other.x)


@pytest.mark.parametrize("method", ["mmps", "replacement", "smc"])
def test_a_condition_of_a_measurement_is_that_of_all_its_draws(method):
    mixture = sd.LabelledMixture(sd.GaussianMixture([1, 1], MEANS, [0.05, 0.05]), [0, 1])
    blind = inverse.Linear(torch.tensor([[1e-3, 0.0]], dtype=torch.float64))  # says nothing
    out = inverse.solve(
        mixture.score(sd.VP()), blind, torch.zeros(2, 1, dtype=torch.float64), noise_std=1.0,
        method=method, draws=4, steps=30, y=torch.tensor([1, 0]),
    )  # fmt: skip
    expected = MEANS[[1, 0]].repeat_interleave(4, 0)
    assert float((out.x - expected).abs().max()) < 0.4


def test_a_model_that_was_given_measurements_is_asked_as_it_was_trained():
    net = sd.nets.MLP((2,), width=8, image_channels=4)
    model = sd.ScoreModel(net, sd.VP(), sd.V(), given=sd.given.Masked())
    mask = inverse.Mask(torch.tensor([1.0, 0.0]))
    y = torch.tensor([[0.5, 0.0], [0.1, 0.0]])
    out = inverse.solve(model, mask, y, steps=3, draws=2)
    image = torch.cat([y, mask(torch.ones(2, 2))], 1)
    direct = sd.sample(
        model, (4, 2), image=image.repeat_interleave(2, 0), steps=3,
        solver=inverse.Trained.default_solver,
    )  # fmt: skip
    assert torch.equal(out.x, direct.x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "mmpss"}, "unknown method 'mmpss'; did you mean 'mmps'"),
        ({"method": {"name": "mmps", "noise_std": 1.0}}, "accepted: iterations, sigma_data"),
        ({"method": {"name": "ddrm", "score": 1.0}}, "unknown key method.score of DDRM"),
        ({"method": {"name": "smc", "particle": 3}}, "did you mean 'particles'"),
        ({"method": "ddrm", "solver": "heun"}, "'ddrm' is a solver of its own"),
        ({"method": "smc", "solver": "heun"}, "'smc' is a solver of its own"),
        ({"method": "trained"}, "not trained to be given a measurement"),
        ({"method": {"name": "dps", "sigma_data": 0.4}}, "unknown key method.sigma_data"),
        ({"method": "smc", "draws": 4, "start_index": 6}, "6 is no multiple of draws=4"),
        ({"draws": 0}, "draws must be a whole number >= 1, got 0"),
        ({"draws": 1.5}, "draws must be a whole number >= 1, got 1.5"),
        ({"method": inverse.MMPS}, "method must be a name or a section, got <class"),
        ({"noise_std": torch.ones(2), "method": "ddrm"}, "one number, got tensor"),
        ({"noise_std": torch.ones(2), "method": "smc"}, "one number, got tensor"),
        ({"noise_std": -1.0}, "noise_std"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        inverse.solve(PRIOR.score(sd.VP()), OPERATOR, Y, **settings)
    with pytest.raises(ValueError, match="measurements of Linear"):
        inverse.solve(PRIOR.score(sd.VP()), OPERATOR, Y.T)
    with pytest.raises(ValueError, match=r"the shape \(B, 1\), got list"):
        inverse.solve(PRIOR.score(sd.VP()), OPERATOR, Y.tolist())


@pytest.mark.parametrize("method", [*METHODS, "trained"])
def test_an_operator_of_other_items_is_refused(method):
    other = inverse.Linear(torch.ones(1, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"items of shape \(3,\), the score has .* \(2,\)"):
        inverse.solve(PRIOR.score(sd.VP()), other, Y, method=method)
