"""Ancestral sampling against diffusers, number by number."""

from itertools import pairwise

import pytest
import torch

import scoresde as sd
from scoresde import grids, solvers

diffusers = pytest.importorskip("diffusers")


def scheduler(betas, variance):
    """diffusers' scheduler on a table of ours, its arithmetic raised to float64."""
    found = diffusers.DDPMScheduler(
        num_train_timesteps=len(betas),
        trained_betas=betas.tolist(),
        clip_sample=False,
        variance_type=f"fixed_{variance}",
    )
    found.betas, found.alphas = betas, 1 - betas
    found.alphas_cumprod = found.alphas.cumprod(0)
    found.one = torch.tensor(1.0, dtype=torch.float64)
    return found


def table(sde, steps):
    """``v^2`` of the transitions of a uniform grid, in DDPM's order, and its times from 0."""
    times = torch.linspace(0, sde.t_max, steps + 1, dtype=torch.float64)
    return torch.stack([sde.transition(t, s)[1] ** 2 for s, t in pairwise(times)]), times


def draw(seed, shape=(3, 2, 4)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_table_is_ddpms():
    own = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    betas, times = table(sd.DDPM(), 1000)
    torch.testing.assert_close(betas.float(), own.betas, rtol=1e-5, atol=0)
    power = sd.DDPM().alpha(times[1:]) ** 2
    torch.testing.assert_close(power.float(), own.alphas_cumprod, rtol=1e-4, atol=0)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize(
    ("sde", "steps"),
    [(sd.DDPM(), 1000), (sd.VP(), 1000), (sd.VP(), 20), (sd.Cosine(), 50)],
    ids=repr,
)
def test_steps_are_those_of_diffusers(sde, steps, variance):
    """Any variance-preserving process on its own N points, N = 20 included."""
    betas, times = table(sde, steps)
    theirs, ours = scheduler(betas, variance), solvers.Ancestral(variance)
    x, eps = draw(0), draw(1)
    reverse = sde.reverse(lambda x, t: -eps / sde.sigma(t))
    for i in sorted({1, 2, steps // 2, steps - 2, steps - 1}):
        generators = (torch.Generator().manual_seed(i) for _ in range(2))
        expected = theirs.step(eps, i, x, generator=next(generators)).prev_sample
        found, _ = ours.step(reverse, x, times[i + 1], times[i], next(generators), None)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_a_whole_chain_with_the_last_denoising(mixture, variance):
    """N - 1 steps and Tweedie's formula are DDPM's N steps, the last without noise."""
    sde = sd.DDPM(num_steps=12, beta_start=0.01, beta_end=0.5, t_min_sampling=1 / 12)
    score, solver = mixture.score(sde), solvers.Ancestral(variance)
    betas, table_times = table(sde, 12)
    theirs = scheduler(betas, variance)
    generator = torch.Generator().manual_seed(5)
    expected = x = draw(0, (4, 2))
    for i in reversed(range(12)):
        eps = score.noise(expected, table_times[i + 1])
        expected = theirs.step(eps, i, expected, generator=generator).prev_sample
    reverse = solver.reverse(score)
    times = grids.Uniform()(sde, 11, 1.0, sde.t_min_sampling)
    out = solver.integrate(reverse, x, times, torch.Generator().manual_seed(5))
    found = reverse.denoise(out.x, times[-1])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_perturb_is_add_noise():
    sde = sd.DDPM()
    betas, times = table(sde, 1000)
    x, eps = draw(0), draw(1)
    for i in (0, 499, 999):
        expected = scheduler(betas, "small").add_noise(x, eps, torch.tensor([i] * len(x)))
        torch.testing.assert_close(
            sde.perturb(x, times[i + 1], eps), expected, rtol=1e-8, atol=1e-8
        )
