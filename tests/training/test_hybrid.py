"""The hybrid objective against the equations of Nichol & Dhariwal (2021)."""

import math

import pytest
import torch
from torch import nn

import scoresde as sd
from scoresde import config
from scoresde.training import objectives
from scoresde.training.hybrid import Hybrid
from scoresde.training.step_noise import StepNoise

f64 = torch.float64


class Headed(nn.Module):
    """Twice the channels: a mean and a variance, each with weights of its own."""

    def __init__(self, channels=2):
        super().__init__()
        torch.manual_seed(0)
        self.mean = nn.Conv1d(channels, channels, 1).double()
        self.variance = nn.Conv1d(channels, channels, 1).double()

    def forward(self, x, c_noise):
        c = c_noise.reshape(-1, 1, 1)
        return torch.cat([torch.sin(self.mean(x) + c), torch.sin(3 * self.variance(x) - c)], 1)


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=f64, generator=torch.Generator().manual_seed(seed))


def levels_data(batch, levels):
    k = torch.randint(levels, (batch, 2, 3), generator=torch.Generator().manual_seed(5))
    k[0, 0] = torch.tensor([0, levels - 1, 1])
    return k, (k.double() + 0.5) * 2 / levels - 1


def paper(model, table, x0, eps, n, levels, lam, k=None, frozen=False):
    """L_simple + lambda L_vlb, term by term: Ho et al., (6), (7), (13); Nichol & Dhariwal, (15).

    The decoder is evaluated from the table of bin edges, the divergences by torch's own.
    """
    steps = len(table)
    beta = torch.cat([torch.zeros(1, dtype=f64), table])
    bar = torch.cumprod(1 - beta, 0)
    losses = []
    for i, step in enumerate(n.tolist()):
        x = bar[step].sqrt() * x0[i : i + 1] + (1 - bar[step]).sqrt() * eps[i : i + 1]
        guess, v = model.noise_and_variance(x, step / steps)
        simple = (eps[i : i + 1] - guess).square().sum()
        if frozen:
            guess = guess.detach()
        before = bar[step - 1]
        # beta-tilde of step 1 is 0: that of step 2 stands in for it, as in the paper's code.
        at = max(step, 2)
        tilde = (1 - bar[at - 1]) / (1 - bar[at]) * beta[at]
        # The chain's own step 1 has the large variance beta_1.
        large = beta[step]
        f = (v + 1) / 2
        std = torch.exp(f * large.log() + (1 - f) * tilde.log()).sqrt()
        alpha = 1 - beta[step]
        mean = (x - beta[step] / (1 - bar[step]).sqrt() * guess) / alpha.sqrt()
        if step > 1:
            true_mean = (
                before.sqrt() * beta[step] / (1 - bar[step]) * x0[i : i + 1]
                + alpha.sqrt() * (1 - before) / (1 - bar[step]) * x
            )
            p = torch.distributions.Normal(true_mean, tilde.sqrt().expand_as(true_mean))
            q = torch.distributions.Normal(mean, std)
            term = torch.distributions.kl_divergence(p, q).sum()
        elif levels is None:
            term = -torch.distributions.Normal(mean, std).log_prob(x0[i : i + 1]).sum()
        else:
            edges = torch.linspace(-1, 1, levels + 1, dtype=f64)
            below = torch.special.ndtr((edges - mean[..., None]) / std[..., None])
            below = torch.cat(
                [
                    torch.zeros_like(below[..., :1]),
                    below[..., 1:-1],
                    torch.ones_like(below[..., :1]),
                ],
                -1,
            )
            mass = below.diff().gather(-1, k[i : i + 1][..., None])[..., 0]
            term = -mass.log().sum()
        losses.append(simple + lam * steps * term / math.log(2))
    return torch.stack(losses)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("levels", [None, 8])
def test_it_is_the_papers(schedule, levels):
    sde = sd.DDPM(num_steps=12, beta_start=0.02, beta_end=0.3, schedule=schedule)
    model = sd.ScoreModel(Headed(), sde, sd.Eps(scale_input=False))
    k, x0 = levels_data(6, 8)
    n = torch.tensor([1, 2, 3, 7, 12, 1])
    eps = normal(6, 2, 3)
    objective = Hybrid(levels=levels)
    expected = paper(model, sde._betas, x0, eps, n, levels, 0.001, k)
    loss = objective(model, x0, t=n / 12, eps=eps)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-9)
    # The bound itself, apart from the large first part.
    only = Hybrid(levels=levels, vlb=1.0)(model, x0, t=n / 12, eps=eps) - loss
    large = paper(model, sde._betas, x0, eps, n, levels, 1.0, k) - expected
    torch.testing.assert_close(only, large, rtol=1e-7, atol=1e-8)


def test_gradients_are_those_with_the_mean_held():
    sde = sd.DDPM(num_steps=12, beta_start=0.02, beta_end=0.3)
    model = sd.ScoreModel(Headed(), sde, sd.Eps(scale_input=False))
    k, x0 = levels_data(6, 8)
    n, eps = torch.tensor([1, 2, 3, 7, 12, 1]), normal(6, 2, 3)
    net = model.net
    parameters = [*net.mean.parameters(), *net.variance.parameters()]
    loss = Hybrid(levels=8, vlb=0.3)(model, x0, t=n / 12, eps=eps)
    held = paper(model, sde._betas, x0, eps, n, 8, 0.3, k, frozen=True)
    got = torch.autograd.grad(loss.sum(), parameters)
    expected = torch.autograd.grad(held.sum(), parameters)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    # Nothing of the bound reaches the mean, nothing of the simple loss the variance.
    simple = torch.autograd.grad(
        sd.DSM()(model, x0, t=n / 12, eps=eps).sum(), parameters, allow_unused=True,
        materialize_grads=True,
    )  # fmt: skip
    for a, b in zip(got[:2], simple[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert all(float(g.abs().max()) == 0 for g in simple[2:])
    assert all(float(g.abs().max()) > 1e-3 for g in got[2:])


@pytest.mark.parametrize("predicts", [sd.V(), sd.X0()], ids=["v", "x0"])
@pytest.mark.parametrize("levels", [None, 8])
def test_its_mean_is_the_bound(levels, predicts):
    """Averaged over the steps, the second part is scoresde.vlb's own, on a grid of VP."""
    sde, steps = sd.VP(beta_max=8.0), 6
    model = sd.ScoreModel(Headed(), sde, predicts)
    _, x0 = levels_data(3, 8)
    bound = sd.vlb(model, x0, steps=steps, levels=levels, variance="learned")
    objective = Hybrid(times={"name": "steps", "steps": steps}, levels=levels, vlb=1.0)
    parts = torch.zeros(3, dtype=f64)
    draws = 40
    for i in range(1, steps + 1):
        for seed in range(draws):
            how = {"t": i / steps, "eps": normal(3, 2, 3, seed=100 * i + seed)}
            both = objective(model, x0, **how)
            parts += (both - sd.DSM()(model, x0, **how)).detach() / steps / draws
    unit = 6 if levels else 1 / math.log(2)
    expected = (bound.total - bound.prior) * unit
    repeats = torch.stack(
        [
            (b.total - b.prior) * unit
            for b in (
                sd.vlb(model, x0, steps=steps, levels=levels, variance="learned", seed=s)
                for s in range(40)
            )
        ]
    )
    error = repeats.std(0) / math.sqrt(40)
    assert ((parts - repeats.mean(0)).abs() < 4 * error * math.sqrt(2)).all()
    assert expected.isfinite().all()


def test_times_between_levels_take_their_bin():
    """A dequantised item is scored by the bin in which it lies."""
    sde = sd.DDPM(num_steps=12, beta_start=0.02, beta_end=0.3)
    model = sd.ScoreModel(Headed(), sde, sd.Eps(scale_input=False))
    k, x0 = levels_data(4, 8)
    x0 = x0 + (torch.rand(x0.shape, generator=torch.Generator().manual_seed(2)) - 0.5) * 0.99 / 4
    n, eps = torch.ones(4, dtype=torch.long), normal(4, 2, 3)
    expected = paper(model, sde._betas, x0, eps, n, 8, 1.0, k)
    loss = Hybrid(levels=8, vlb=1.0)(model, x0, t=n / 12, eps=eps)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-9)


def test_far_bins_and_large_heads_stay_finite():
    sde = sd.DDPM()
    model = sd.ScoreModel(Headed(), sde, sd.Eps())
    with torch.no_grad():
        model.net.mean.weight.mul_(100)
        model.net.variance.weight.mul_(100)
    model.float()
    _, x0 = levels_data(6, 256)
    t = torch.tensor([1, 1, 2, 500, 999, 1000]) / 1000
    loss = Hybrid()(model, x0.float(), t=t, eps=normal(6, 2, 3).float())
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_it_draws_the_steps_of_the_table():
    sde = sd.DDPM(num_steps=12, beta_start=0.02, beta_end=0.3)
    model = sd.ScoreModel(Headed(), sde, sd.Eps())
    objective = config.build("hybrid", objectives, "objective")
    _, x0 = levels_data(24, 8)
    t, correction = objective.times(sde, 24, StepNoise(0, 0, 0, 24))
    assert (t * 12).round().long().bincount(minlength=13).tolist() == [0] + [2] * 12
    assert correction.tolist() == [1.0] * 24
    assert objective(model, x0, generator=StepNoise(0, 0, 0, 24)).shape == (24,)


def test_what_it_refuses():
    class Plain(Headed):
        def forward(self, x, c_noise):
            return super().forward(x, c_noise)[:, :2]

    model = sd.ScoreModel(Plain(), sd.DDPM(), sd.Eps())
    with pytest.raises(sd.ConfigError, match="it needs a network of twice the channels"):
        Hybrid()(model, normal(2, 2, 3))
    with pytest.raises(sd.ConfigError, match="must be 'steps', got Uniform"):
        Hybrid(times="uniform")
