"""The likelihood as it is usually computed: a plain loop with torch, SciPy and a network.

The way of score_sde_pytorch, written down from its description: the probability-flow ODE in
``(x, t)`` from ``t = 1e-5`` to 1 by SciPy's RK45, the batch flattened into one state of NumPy
float64 with one step size for all, one round trip to the host an evaluation, and two forward
passes and one backward pass of the network an evaluation (one pair for the divergence by one
Rademacher probe an item, one forward for the drift). ``likelihood_on_network.py`` compares it.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import numpy as np
import torch
from scipy import integrate

import scoresde as sd


class Solved(NamedTuple):
    """Log-likelihoods in nats in model range ``(B,)``, evaluations of the batch, seconds."""

    log_prob: torch.Tensor
    nfe: int
    seconds: float


def rk45_log_prob(
    model: sd.ScoreModel, x: torch.Tensor, probes: torch.Tensor, tolerance: float = 1e-5
) -> Solved:
    """Likelihood of ``x (B, *shape)`` under a VP model with ``probes`` of the same shape."""
    began = time.perf_counter()
    beta_min, beta_max = model.sde.beta_min, model.sde.beta_max
    shape, dims = x.shape, x[0].numel()

    def drift(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        beta = beta_min + t * (beta_max - beta_min)
        beta = beta.view(-1, *(1,) * (x.ndim - 1))
        return -0.5 * beta * x - 0.5 * beta * model(x, t)

    def divergence(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            product = torch.sum(drift(x, t) * probes)
            (gradient,) = torch.autograd.grad(product, x)
        return (gradient * probes).flatten(1).sum(1)

    def rhs(t: float, state: np.ndarray) -> np.ndarray:
        sample = torch.from_numpy(state[: -len(x)].reshape(shape)).to(x)
        times = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
        with torch.no_grad():
            moved = drift(sample, times)
        grown = divergence(sample, times)
        return np.concatenate([moved.cpu().numpy().ravel(), grown.cpu().numpy().ravel()])

    start = np.concatenate([x.cpu().numpy().ravel(), np.zeros(len(x))])
    found = integrate.solve_ivp(
        rhs, (1e-5, 1.0), start, rtol=tolerance, atol=tolerance, method="RK45"
    )
    end = torch.from_numpy(found.y[:, -1])
    latent, delta = end[: -len(x)].reshape(len(x), dims), end[-len(x) :]
    prior = -(latent**2).sum(1) / 2 - dims / 2 * math.log(2 * math.pi)
    return Solved(prior + delta, found.nfev, time.perf_counter() - began)
