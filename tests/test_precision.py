"""What happens on a device without float64, played on the CPU."""

import pytest
import torch
from torch import nn

import scoresde as sd
from scoresde import config, precision, solvers
from scoresde.likelihood import vlb

NAMES = list(config.names(solvers))


@pytest.fixture
def no_float64(monkeypatch):
    """The CPU declared to have no float64, as MPS has none."""
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", ("cpu",))


class Strict(sd.Score):
    """A score that refuses any float64 but a scalar, which a real device would never see."""

    def __init__(self, sde):
        means = torch.tensor([[1.0, 0.6], [-1.0, 0.4]])
        self.exact = sd.GaussianMixture([1.0, 1.0], means, [0.4, 0.5]).score(sde)
        self.sde, self.dtype, self.calls = sde, torch.float64, 0

    def __call__(self, x, t):
        assert x.dtype == torch.float32
        assert t.ndim == 0 or t.dtype == torch.float32
        self.calls += 1
        return self.exact(x, t)


def test_the_widest_type():
    assert precision.widest(torch.device("cpu")) == torch.float64
    assert precision.widest(torch.device("mps")) == torch.float32
    assert precision.supported(torch.float64, "cuda:1") == torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_every_solver_falls_back_and_says_so(no_float64, sde, name):
    steps = 5 if config.names(solvers)[name].default_steps else None
    with pytest.warns(UserWarning, match="cpu has no float64: .* tolerances down to 1e-06"):
        out = sd.sample(Strict(sde), (3, 2), solver=name, steps=steps, dtype=torch.float64)
    assert out.x.dtype == torch.float32
    assert out.converged, out.message


@pytest.mark.parametrize("method", ["dopri5", "torchdiffeq-dopri5", "scipy-rk45", "rk4"])
def test_the_likelihood_falls_back_and_is_as_good_as_the_floor(no_float64, method, sde):
    score, x = Strict(sde), torch.tensor([[1.1, 0.2], [-0.9, 0.5]], dtype=torch.float64)
    steps = 30 if method == "rk4" else None
    with pytest.warns(UserWarning, match="cpu has no float64"):
        out = sd.log_prob(score, x, divergence="exact", method=method, steps=steps)
    assert out.log_prob.dtype == torch.float32
    mixture = score.exact.mixture.to(dtype=torch.float64)
    found = mixture.log_prob(out.latent.double(), sde, sde.t_max) + out.delta
    assert (found - mixture.log_prob(x, sde, sde.t_min_likelihood)).abs().max() < 5e-3


@pytest.mark.parametrize("terms", [None, 7])
def test_the_bound_falls_back(no_float64, terms):
    x = torch.tensor([[1.1, 0.2], [-0.9, 0.5]], dtype=torch.float64)
    with pytest.warns(UserWarning, match="cpu has no float64"):
        out = vlb(Strict(sd.VP()), x, steps=40, levels=None, terms=terms)
    assert out.total.dtype == torch.float32
    assert out.total.isfinite().all()


def test_training_falls_back(no_float64):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x, c_noise):
            assert x.dtype == c_noise.dtype == torch.float32
            return self.layer(x)

    model = sd.ScoreModel(Net(), sd.VP(), sd.Eps())
    loss = sd.DSM()(model, torch.randn(4, 2))
    loss.sum().backward()
    assert loss.dtype == torch.float32
    score = Strict(sd.VP())
    assert sd.DSM()(score, torch.randn(4, 2)).dtype == torch.float32
    assert score.calls == 1
