"""What particles are told: conditions, measurements and likelihoods that fit, or are refused."""

import math

import pytest
import torch
from particle_problem import MEANS, MIXTURE, NOISE, SCORE, VP, A, Y, f64
from torch import Tensor, nn

import scoresde as sd
from scoresde.config import ConfigError
from scoresde.inverse.linear import Linear
from scoresde.inverse.smc import smc


def classes(x0: Tensor, y: Tensor) -> Tensor:
    """``log p(y | x_0)`` of the component that an item is from."""
    logits = MIXTURE._log_components(x0, *MIXTURE._marginal(x0, None, None))[0]
    return logits.log_softmax(1).gather(1, y[:, None])[:, 0]


@pytest.mark.parametrize("twist", ["none", "smoothed"])
def test_a_function_is_given_one_measurement_a_particle(twist):
    # gather() of one index would give that of the first particle for all of them.
    options = {"particles": 200, "steps": 20, "twist": twist, "draws": 2}
    one = smc(SCORE, classes, torch.tensor([2]), **options)
    each = smc(SCORE, classes, torch.tensor([2, 2]), **options)
    assert torch.equal(one.log_weights, each.log_weights)
    assert torch.equal(one.x, each.x)
    mean = (one.log_weights.exp()[..., None] * one.x).sum(1).mean(0)
    torch.testing.assert_close(mean, MEANS[2], rtol=0, atol=0.15)


@pytest.mark.parametrize("batch", [None, 3])
def test_a_condition_may_be_one_a_run_or_one_for_all(batch):
    labelled = sd.LabelledMixture(MIXTURE, [0, 1, 2]).score(VP)
    says_nothing = Linear(torch.tensor([[1e-3, 0.0]], dtype=f64))
    options = {"particles": 4, "steps": 12, "draws": 2, "batch": batch}
    y = torch.zeros(1, 1, dtype=f64)
    one = smc(labelled, says_nothing, y, 1.0, y=torch.tensor([2]), **options)
    each = smc(labelled, says_nothing, y, 1.0, y=torch.tensor([2, 2]), **options)
    assert torch.equal(one.x, each.x)
    assert float((one.x - MEANS[2]).abs().max()) < 1.5
    other = smc(labelled, says_nothing, y, 1.0, y=torch.tensor([2, 0]), **options)
    assert torch.equal(other.x[0], one.x[0])
    assert float((other.x[1] - MEANS[0]).abs().max()) < 1.5


def test_a_condition_that_a_network_does_not_take_is_refused():
    model = sd.ScoreModel(sd.nets.MLP((2,), width=8), sd.VP(), sd.V())
    with pytest.raises(ValueError, match="'y'"):
        smc(model, A, Y, NOISE, particles=2, steps=3, y=torch.tensor([1]))


def test_the_spread_of_the_data_is_that_of_the_model():
    model = sd.ScoreModel(nn.Identity(), sd.VP(), sd.Karras(sigma_data=0.7))

    class Told(sd.Score):
        """The exact score, with what a model knows."""

        sde, parameterization = VP, model.parameterization

        def __call__(self, x, t):
            return SCORE(x, t)

    options = {"particles": 8, "steps": 6, "twist": "pgdm"}
    found = smc(Told(), A, Y, NOISE, dtype=f64, **options)
    told = smc(SCORE, A, Y, NOISE, sigma_data=0.7, **options)
    torch.testing.assert_close(found.x, told.x)
    assert not torch.allclose(found.x, smc(SCORE, A, Y, NOISE, **options).x)


@pytest.mark.parametrize(
    "twist",
    [
        lambda x0, t: 1e8 * x0.square().sum(1),
        lambda x0, t: -1e6 * (x0 - 40).square().sum(1),
        lambda x0, t: torch.where(x0[:, 0] > 0, x0[:, 0] * math.nan, x0[:, 0]),
        lambda x0, t: x0.sum(1) / (x0.sum(1) * 0),
    ],
)
def test_a_wrong_twist_gives_numbers(twist):
    found = smc(SCORE, A, Y, NOISE, particles=32, draws=3, steps=20, twist=twist)
    assert bool(found.x.isfinite().all())
    torch.testing.assert_close(found.log_weights.exp().sum(1), torch.ones(3, dtype=f64))
    assert not bool(found.log_evidence.isnan().any())
    assert not bool(found.ess.isnan().any())


def test_runs_without_weight_are_named():
    def nowhere(x0: Tensor, y: Tensor) -> Tensor:
        return torch.where(y > 0, x0.sum(1), -math.inf)

    found = smc(
        SCORE, nowhere, torch.tensor([1.0, 0.0, 1.0]), particles=8, draws=3, steps=8,
        twist="none", start_index=4,
    )  # fmt: skip
    assert not found.converged
    assert found.message.startswith("1 of 3 runs lost all weight (5)")
    assert found.log_evidence.isinf().tolist() == [False, True, False]
    assert smc(SCORE, A, Y, NOISE, steps=8).converged


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"twist": "tds"}, ConfigError, "unknown twist 'tds'"),
        ({"resample": "branching"}, ConfigError, "unknown resampling 'branching'"),
        ({"particles": 0}, ValueError, "particles >= 1, got 0"),
        ({"steps": 1}, ValueError, "steps >= 2, got 1"),
        ({"threshold": 1.5}, ValueError, r"threshold in \[0, 1\], got 1.5"),
        ({"order": 3}, ValueError, "order=3"),
        ({"dtype": torch.float16}, ValueError, "float32 or float64, got dtype=torch.float16"),
        ({"noise_std": -1.0}, ValueError, "noise_std >= 0, one number, got -1.0"),
        ({"sigma_data": 0.0}, ValueError, "sigma_data > 0, got 0.0"),
        ({"y": torch.zeros(2, 1)}, ValueError, "y has 2 values for draws=3: one a run"),
        ({"y": torch.zeros(1, 2)}, ValueError, r"measurements of Linear have the shape \(B, 1\)"),
        ({"y": None}, ValueError, "needs a measurement y"),
        (
            {"likelihood": Linear(torch.ones(1, 3))},
            ValueError,
            r"items of shape \(3,\), the score has items of shape \(2,\)",
        ),
        (
            {"likelihood": lambda x, y: x[:1, 0], "twist": "none"},
            ValueError,
            r"of 6 items has shape \(6,\), got \(1,\)",
        ),
        ({"likelihood": 3}, ValueError, "an operator or a function"),
        ({"likelihood": torch.sum, "twist": "pgdm"}, ConfigError, "'pgdm' is about an operator"),
        ({"likelihood": lambda x, y: x, "twist": None}, ValueError, "of 6 items has shape"),
    ],
)
def test_mistakes_are_named(options, error, message):
    given = {
        "likelihood": A, "y": Y, "noise_std": NOISE, "particles": 2, "draws": 3, "steps": 4,
        **options,
    }  # fmt: skip
    likelihood, y = given.pop("likelihood"), given.pop("y")
    with pytest.raises(error, match=message):
        smc(SCORE, likelihood, y, **given)
