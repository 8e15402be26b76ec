"""``sd.sample`` with the solver ``edm`` against EDM's algorithm 2, transcribed here."""

import math

import pytest
import torch

import scoresde as sd
from scoresde import solvers
from scoresde.noise import KeyedNoise

f64 = torch.float64
LEVELS = 18


def algorithm_2(denoiser, x, levels, churn, s_min, s_max, s_noise, draw):
    """Algorithm 2 of Karras et al. (2022), from ``t_0 = sigma_max`` to ``t_N = 0``.

    Its draw where ``gamma = 0`` is multiplied by zero, and is left out.
    """
    count = len(levels)
    t = [*levels, 0.0]
    for i in range(count):
        inside = s_min <= t[i] <= s_max
        gamma = min(churn / count, math.sqrt(2) - 1) if inside else 0.0
        t_hat = t[i] + gamma * t[i]
        x_hat = x
        if gamma > 0:
            x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * s_noise * draw()
        d = (x_hat - denoiser(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            slope = (x - denoiser(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d / 2 + slope / 2)
    return x


def table_1(count=LEVELS, low=0.002, high=80.0, rho=7.0):
    """The paper's noise levels, equation 5."""
    return [
        (high ** (1 / rho) + i / (count - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        for i in range(count)
    ]


def denoiser_of(mixture):
    """``E[x_0 | x_0 + sigma n = x]`` by Bayes' rule over the components."""

    def denoise(x, sigma):
        variance = mixture.stds**2 + sigma**2
        residual = x[:, None] - mixture.means
        log_share = mixture.weights.log() - (residual**2 / variance + variance.log()).sum(2) / 2
        inside = mixture.means + mixture.stds**2 / variance * residual
        return (log_share.softmax(1)[..., None] * inside).sum(1)

    return denoise


@pytest.mark.parametrize(
    ("churn", "s_min", "s_max", "s_noise"),
    [
        (0.0, 0.0, math.inf, 1.0),
        (40.0, 0.05, 50.0, 1.003),
        (30.0, 0.01, 1.0, 1.007),
        (5.0, 0.05, 50.0, 1.003),
    ],
    ids=["deterministic", "imagenet", "cifar", "below the cap"],
)
def test_the_end_is_the_papers(mixture, churn, s_min, s_max, s_noise):
    """17 steps and the denoising are the paper's 18, the last of them to ``sigma = 0``."""
    x_T = 80 * torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=f64)
    noise = KeyedNoise(5)
    noise.draw = 1  # the first is the prior's
    expected = algorithm_2(
        denoiser_of(mixture), x_T, table_1(), churn, s_min, s_max, s_noise,
        lambda: noise.normal((64, 2), dtype=f64),
    )  # fmt: skip
    solver = solvers.EDM(churn, s_min, s_max, s_noise)
    score = mixture.score(sd.EDM())
    out = sd.sample(score, x_T=x_T, solver=solver, steps=LEVELS - 1, grid="karras", seed=5)
    assert ((out.x - expected).abs().max() / expected.abs().max()) < 1e-9
    assert out.nfe == 2 * LEVELS - 1
    assert (noise.draw > 1) == (churn > 0)


def test_the_last_step_of_the_paper_is_the_denoiser(mixture):
    """Without it the state keeps the noise of the smallest level."""
    x_T = 80 * torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=f64)
    score = mixture.score(sd.EDM())
    kept = sd.sample(score, x_T=x_T, solver="edm", steps=LEVELS - 1, denoise=False)
    expected = algorithm_2(denoiser_of(mixture), x_T, table_1(), 0.0, 0.0, 1.0, 1.0, None)
    again = denoiser_of(mixture)(kept.x, 0.002)
    assert torch.allclose(again, expected, rtol=1e-9, atol=1e-9)
    assert (kept.x - expected).abs().max() > 1e-6
