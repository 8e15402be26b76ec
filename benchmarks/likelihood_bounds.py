"""Variational bounds and densities by denoising, measured against what theory says of them.

    python benchmarks/likelihood_bounds.py [--items 256] [--terms 64] [--times logistic]

Mixtures of eight Gaussians in 2, 16 and 256 dimensions, of zero mean and unit variance, float64.
``exact`` is the score of the mixture, ``Gaussian`` that of the Gaussian of its moments: a wrong
one. Prints Markdown, all in nats an item and over the same items: the exact mean log-density at
``t_min``, and how far each estimate of ``-log p`` lies above its own exact value, with the
standard error of that mean; ``noise`` is the part of that error that the estimates tell of
themselves. Theory has an error of its own, of a Monte Carlo by other data and noise with the true
scores: in brackets where it shows.

    data, smoothed:  1/2 int g^2 E|s - grad log p_t|^2 dt + KL(p_T | prior) (+ decoder)
    denoising:       1/2 int g^2 E|s - grad log p_t|^2 dt
    vlb:             sum of the KL of each step: nothing is said, but that it lies above
"""

from __future__ import annotations

import argparse
import math
import time

import torch

import scoresde as sd
from scoresde.likelihood.continuous import elbo
from scoresde.likelihood.denoising import denoising_log_prob

PROCESSES = (sd.VP(), sd.VE(), sd.EDM(), sd.Linear())
TERMS = 64
"""Strata of the theory's integral."""


def mixture_of(dims: int) -> sd.GaussianMixture:
    generator = torch.Generator().manual_seed(dims)
    means = torch.randn(8, dims, generator=generator, dtype=torch.float64)
    means = means - means.mean(0)
    means = means / means.square().mean().sqrt()
    return sd.GaussianMixture([1.0] * 8, 0.75**0.5 * means, [0.5] * 8)


def moments_of(mixture: sd.GaussianMixture) -> sd.GaussianMixture:
    """The Gaussian of the mixture's moments, entry by entry."""
    mean, covariance = mixture.moments()
    return sd.GaussianMixture([1.0], mean[None], covariance.diagonal().sqrt()[None])


class Theory:
    """Mean gaps over data, ``(mean, standard error)``, by noise of its own."""

    def __init__(self, mixture: sd.GaussianMixture, sde: sd.GaussianSDE, items: int) -> None:
        self.mixture, self.sde, self.items = mixture, sde, items
        self.generator = torch.Generator().manual_seed(99)

    def state(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Data, noise, and the two at the time ``t``, ``()`` or ``(items, 1)``."""
        x = self.mixture.sample(self.items, self.generator)
        eps = torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
        return x, eps, self.sde.perturb(x, t, eps)

    def integral(self, score: sd.MixtureScore) -> torch.Tensor:
        """``int sigma^2 |s - grad log p_t|^2 d log_snr`` along the noise of each item."""
        sde, truth = self.sde, self.mixture.score(self.sde)
        start, end = (sde.log_snr(t) for t in (sde.t_min_likelihood, sde.t_max))
        total = torch.zeros(self.items, dtype=torch.float64)
        for k in range(TERMS):
            jitter = torch.rand(self.items, 1, generator=self.generator, dtype=torch.float64)
            t = sde.time(start + (k + jitter) / TERMS * (end - start)).clamp(sde.t_min, sde.t_max)
            _, _, x = self.state(t)
            total += (sde.sigma(t) * (score(x, t) - truth(x, t))).square().sum(1)
        return (start - end) / TERMS * total

    def prior(self) -> torch.Tensor:
        """``log p_T - log prior``, whose mean is their divergence."""
        t = self.sde.t_max
        x = self.state(torch.tensor(t, dtype=torch.float64))[2]
        return self.mixture.log_prob(x, self.sde, t) - self.sde.prior_log_prob(x)

    def decoder(self, score: sd.MixtureScore) -> torch.Tensor:
        """``log q(x | x_s) - log p(x | x_s)`` at ``s = t_min``.

        ``log q(x_s | x) - log p(x | x_s)`` is ``(|eps - eps_hat|^2 - |eps|^2)/2 - D log alpha``.
        """
        sde, t = self.sde, self.sde.t_min_likelihood
        x, eps, noisy = self.state(torch.tensor(t, dtype=torch.float64))
        residual = eps + sde.sigma(t) * score(noisy, t)
        squares = (residual.square() - eps.square()).sum(1) / 2
        shrunk = x.shape[1] * float(sde.log_alpha(t))
        return self.mixture.log_prob(x) - self.mixture.log_prob(noisy, sde, t) + squares - shrunk


def told(values: torch.Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def text(mean: float, error: float, exact: bool = False) -> str:
    if exact and error < 5e-5:
        return f"{mean + 0.0:.4f}".replace("-0.0000", "0.0000")
    return f"{mean:.4f} ({error:.4f})" if exact else f"{mean:+.4f} ± {error:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=256, help="items (default: 256)")
    parser.add_argument("--terms", type=int, default=64, help="evaluations (default: 64)")
    parser.add_argument("--times", default="logistic", help="of the terms (default: logistic)")
    parser.add_argument("--steps", type=int, default=200, help="of the chain (default: 200)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    print(f"torch {torch.__version__}, one thread, {options.items} items, {options.terms} terms\n")
    names = ("process", "D", "score", "log p", "estimate", "gap", "theory", "noise")
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    settings = {"terms": options.terms, "times": options.times}
    for sde in PROCESSES:
        for dims in (2, 16, 256):
            mixture = mixture_of(dims)
            generator = torch.Generator().manual_seed(1)
            x = mixture.sample(options.items, generator)
            t = sde.t_min_likelihood
            eps = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            noisy = float(sde.alpha(t)) * x + float(sde.sigma(t)) * eps
            exact, smooth = mixture.log_prob(x), mixture.log_prob(noisy, sde, t)
            theory = Theory(mixture, sde, 4 * options.items)
            for name, data in (("exact", mixture), ("Gaussian", moments_of(mixture))):
                score = data.score(sde)
                integral, prior = theory.integral(score), theory.prior()
                first = elbo(score, x, levels=None, **settings)
                second = elbo(score, noisy, levels=None, density="smoothed", **settings)
                third = denoising_log_prob(score, x, **settings)
                rows = [
                    ("data", first.total + exact, first.stderr,
                     integral + prior + theory.decoder(score)),
                    ("smoothed", second.total + smooth, second.stderr, integral + prior),
                    ("denoising", exact - third.log_prob, third.stderr, integral),
                ]  # fmt: skip
                if name == "exact" and sde.t_max / options.steps >= sde.t_min:
                    chain = sd.vlb(score, x, steps=options.steps, levels=None, variance="large")
                    rows.append(("vlb", chain.total + exact, chain.stderr, None))
                for estimate, gap, stderr, expected in rows:
                    own = told(gap)
                    says = "> 0" if expected is None else text(*told(expected), exact=True)
                    spread = float(stderr.square().mean()) ** 0.5 / math.sqrt(len(x))
                    print(
                        f"| {type(sde).__name__} | {dims} | {name} | {float(exact.mean()):.4f} | "
                        f"{estimate} | {text(*own)} | {says} | {spread:.4f} |",
                        flush=True,
                    )
    print(f"\n{time.perf_counter() - began:.0f} seconds")


if __name__ == "__main__":
    main()
