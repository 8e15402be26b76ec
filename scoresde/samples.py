"""Samples, and how they were obtained; those of several batches as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .model import Cost


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples, and how they were obtained.

    Args:
        x: the samples, shape ``(B, *shape)``, in model range.
        nfe: evaluations of the score for each sample, the last denoising included; a number, or
            one a sample, shape ``(B,)``.
        seconds: wall-clock time, everything included.
        converged: whether the solver reached ``t_end`` with finite values.
        message: if not, what happened and what to do; a sample is named by its index in the
            series, from ``start_index`` on.
        solver: name and fields of the solver.
        grid: name and fields of the grid; None if the solver chose its steps.
        steps: number of steps; None if the solver chose them.
        seed: seed of all noise.
        brownian: whether the steps' noise followed one Brownian path a sample.
        t_start: time at which sampling started.
        t_end: time at which it stopped, and from which it denoised; the largest of any sample.
        weights: ``"ema"`` or ``"raw"`` for a network, None for other scores.
        denoised: whether ``x`` is ``E[x_0 | x]`` of the state reached, or that state.
        threshold: mode, quantile and bound of thresholding, None without.
        log_prob: log-densities in nats of the states ``x`` at ``t_end``, shape ``(B,)``, where
            they were asked for; nan where the solver did not arrive.
        log_prob_stderr: their standard errors over the probes, ``(B,)``; 0 if the divergence is
            exact, nan with one probe, which tells nothing of its own error.
        divergence: ``"exact"`` or ``"hutchinson"``, where densities were asked for.
        probes: probes a sample, 0 if exact.
        rounds: calls of the score that had to wait for each other, the last denoising included,
            where several evaluations of a sample were made at once; None elsewhere. Of several
            batches, the most of any.
        cost: what the evaluations asked of networks, for each sample; None where the steps
            differ between samples.
    """

    x: Tensor
    nfe: int | Tensor
    seconds: float
    converged: bool
    message: str
    solver: dict[str, Any]
    grid: dict[str, Any] | None
    steps: int | None
    seed: int
    t_start: float
    t_end: float
    weights: str | None
    denoised: bool = True
    threshold: dict[str, Any] | None = None
    log_prob: Tensor | None = None
    log_prob_stderr: Tensor | None = None
    divergence: str | None = None
    probes: int | None = None
    rounds: int | None = None
    brownian: bool = False
    cost: Cost | None = None

    @property
    def mean_nfe(self) -> float | int:
        """Evaluations a sample, on average."""
        return self.nfe if isinstance(self.nfe, int) else float(self.nfe.double().mean())


def join(parts: Sequence[Samples]) -> Samples:
    """The samples of several batches as one result; of the first failure, where there is one."""
    lost = [p for p in parts if not p.converged]
    worst = lost[0] if lost else parts[0]
    batches = f"; {len(lost) - 1} more of {len(parts)} batches" if len(lost) > 1 else ""
    shared = all(p.nfe == worst.nfe for p in parts if isinstance(p.nfe, int))
    counts = [torch.as_tensor(p.nfe, device=p.x.device).expand(len(p.x)) for p in parts]
    scores = [p.log_prob for p in parts if p.log_prob is not None]
    errors = [p.log_prob_stderr for p in parts if p.log_prob_stderr is not None]
    return replace(
        worst,
        x=torch.cat([p.x for p in parts]),
        nfe=worst.nfe if isinstance(worst.nfe, int) and shared else torch.cat(counts),
        seconds=sum(p.seconds for p in parts),
        message=worst.message + batches,
        t_end=max(p.t_end for p in parts),
        log_prob=torch.cat(scores) if scores else None,
        log_prob_stderr=torch.cat(errors) if errors else None,
        rounds=max((p.rounds for p in parts if p.rounds is not None), default=None),
    )


__all__ = ["Samples", "join"]
