"""Guidance where everything is known: a mixture with classes, its exact classifier and scores.

    python benchmarks/guidance_exact.py

For each process and precision, the largest relative error, over times and states of the process,
of classifier guidance at scale 1 against the conditional score, and of classifier-free guidance at
scale 2.5 against ``grad log p_t(x)^(1 - 2.5) p_t(x | y)^2.5`` by automatic differentiation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import scoresde as sd
from scoresde import guidance

SCALE = 2.5
PROCESSES = [sd.VP(), sd.SubVP(), sd.VE(), sd.Cosine(), sd.EDM(), sd.Linear()]


def mixture() -> sd.LabelledMixture:
    """Twelve modes in four dimensions, three classes."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    stds = 0.1 + 0.3 * torch.rand(12, 4, generator=generator, dtype=torch.float64)
    return sd.LabelledMixture(
        sd.GaussianMixture(torch.ones(12), means, stds), torch.arange(12) % 3
    )


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest error of a state, relative to the length of its score."""
    gap = (found - wanted).detach().norm(dim=1)
    return float((gap / wanted.detach().norm(dim=1)).max())


def tilted(law: sd.LabelledMixture, sde: Any, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """``grad (1 - w) log p_t(x) + w log p_t(x | y)``."""
    x = x.detach().requires_grad_()
    total = (1 - SCALE) * law.log_prob(x, sde, t) + SCALE * law.log_prob(x, sde, t, y=y)
    return torch.autograd.grad(total.sum(), x)[0]


def main() -> None:
    """Prints the table."""
    print("| process | classifier, scale 1 | in float32 | classifier-free, scale 2.5 |")
    print("|---|---|---|---|")
    for sde in PROCESSES:
        cells = []
        for dtype in (torch.float64, torch.float32):
            law = mixture().to(dtype=dtype)
            score, classifier = law.score(sde), law.classifier(sde)
            x0, y = law.sample(200, torch.Generator().manual_seed(1))
            worst = [0.0, 0.0]
            for u in (0.0, 0.25, 0.5, 0.75, 1.0):
                ends = [float(sde.log_snr(t)) for t in (sde.t_min_sampling, sde.t_max * 0.999)]
                t = sde.time(ends[0] + u * (ends[1] - ends[0]))
                eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
                x = sde.perturb(x0, t, eps.to(dtype))
                led = guidance.Classifier(score, classifier)(x, t, y=y)
                worst[0] = max(worst[0], error(led, score(x, t, y=y)))
                free = guidance.ClassifierFree(score, SCALE)(x, t, y=y)
                worst[1] = max(worst[1], error(free, tilted(law, sde, x, t, y)))
            cells.append(worst)
        name = type(sde).__name__
        print(f"| {name} | {cells[0][0]:.1e} | {cells[1][0]:.1e} | {cells[0][1]:.1e} |")


if __name__ == "__main__":
    main()
