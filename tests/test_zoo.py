"""The models that ship with the package work before any training."""

import pytest
import torch

import scoresde as sd
from scoresde.checkpoint import ZOO
from scoresde.config import construct, read_yaml
from scoresde.data import DataConfig, load_splits
from scoresde.likelihood.dataset import dataset_log_prob

NAMES = sorted(p.parent.name for p in ZOO.glob("*/config.yaml"))


def heldout(name):
    stored = read_yaml(ZOO / name / "config.yaml")["data"]
    return load_splits(construct(DataConfig, stored, "data"))[1]


def test_there_are_models():
    assert {"mnist", "digits"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_fits_in_five_megabytes(name):
    assert sum(f.stat().st_size for f in (ZOO / name).iterdir()) < 5e6


@pytest.mark.parametrize("name", NAMES)
def test_a_model_has_learned(name):
    """Held-out items are denoised far better than by shrinking every pixel to its mean."""
    model, data = sd.load(f"zoo:{name}"), heldout(name)
    x0 = model.scaler.encode(data.x[:64], dequantize=False)
    t = float(model.sde.time(0.0))  # noise as strong as the signal
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model.denoise(model.sde.perturb(x0, t, eps), t)
    variance = x0.var(0)
    shrinking = (variance / (1 + variance)).mean()  # the best linear estimate, pixel by pixel
    assert (found - x0).square().mean() < 0.7 * shrinking


def test_likelihood_of_held_out_digits():
    model, data = sd.load("zoo:digits"), heldout("digits")
    done: list[int] = []
    found = dataset_log_prob(
        model, data, items=16, batch=10, rtol=1e-3, atol=1e-3, progress=done.append
    )
    assert found.converged
    assert sum(done) == 16
    assert done == [10, 6]
    assert 1.5 < float(found.bits_per_dim.mean()) < 2.4  # log2(17) = 4.09 knows nothing


def test_samples_look_like_data():
    model, data = sd.load("zoo:digits"), heldout("digits")
    drawn = model.scaler.decode(sd.sample(model, (64, 1, 8, 8), steps=12).x).float()
    real = data.x.float()
    assert (drawn.mean(0) - real.mean(0)).abs().max() < 4  # of 16 grey levels
    assert drawn.std() == pytest.approx(float(real.std()), rel=0.15)


def test_conditions_help_the_model_that_has_them():
    """With much noise, the class and a part of the picture say what the state does not."""
    model, data = sd.load("zoo:mnist-given"), heldout("mnist-given")
    x0 = model.scaler.encode(data.x[:64], dequantize=False)
    t = float(model.sde.time(-2.0))
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    x = model.sde.perturb(x0, t, eps)
    operator = sd.inverse.operators.MiddleBox((1, 28, 28))
    image = model.given.image(operator, operator(x0))

    def error(**cond):
        with torch.no_grad():
            return float((model.denoise(x, t, **cond) - x0).square().mean())

    alone = error()
    assert error(y=data.y[:64]) < 0.9 * alone
    assert error(y=(data.y[:64] + 1) % 10) > alone
    assert error(image=image) < 0.4 * alone
