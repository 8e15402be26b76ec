r"""Likelihoods in units of the data: through the scaler, and for discrete data dequantised.

Continuous data has the density ``log p(model) + log|d model / d data|``. Of discrete data ``k``
every draw ``x ~ q(x | k)`` gives ``v = log p(x) - log q(x | k)``, and

    log P(k) >= E[mean of v]    or, with the draws weighted by importance,    E[log mean exp(v)]

(:mod:`~scoresde.likelihood.dequantize`). Each draw has probes of its own, so that what they
differ by is their error and that of the probes together.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..config import build, describe
from ..noise import KeyedNoise
from . import dequantize
from .budget import MOST_PROBES as MOST_DRAWS
from .dequantize import Dequantization, importance_weighted, mean_bound
from .flow import log_prob
from .result import LogProb, total_stderr

DEQUANTISATION = 1 << 40
"""Keeps its noise apart from that of the probes of the same seed."""
SERIES = 1 << 32
"""Indices that a draw's samples lie behind those of the draw before."""
PILOT = 4
"""Draws that a target begins with."""


def data_log_prob(
    model: Any,
    data: Tensor,
    *,
    dequantization: str | dict[str, Any] | Dequantization = "uniform",
    draws: int = 1,
    importance: bool = False,
    seed: int = 0,
    start_index: int = 0,
    target_stderr: float | None = None,
    t_min: float | None = None,
    **settings: Any,
) -> LogProb:
    r"""Log-likelihood of data as they are, in nats: ``log P(k)`` of levels, ``log p`` of numbers.

        log P(k) >= E[log p(x) - log q(x | k)]

    Args:
        model: a score that carries its ``sde`` and ``scaler``.
        data: whole levels if the scaler has levels, else floating point, ``(B, *shape)``.
        dequantization: of discrete data, ``"uniform"``, ``"truncated-normal"``, ``"decoder"``,
            their section, or an object such as a fitted
            :class:`~scoresde.likelihood.Variational`.
        draws: of the dequantisation, each with probes of its own; two or more give its error.
        importance: whether to weigh the draws by importance, which gives a higher bound than
            their mean, and biased downwards alike.
        seed: key of dequantisation and probes.
        start_index: index of the first item: its noise does not depend on its batch.
        target_stderr: standard error in nats to reach for each item, by draws, probes and steps;
            of discrete data by draws with the given probes, and steps of which half are enough.
        t_min: start of the integral; a dequantisation may set its own.
        settings: of :func:`scoresde.log_prob`, and conditions of the score.

    Returns:
        A :class:`LogProb`: of discrete data with ``levels``, ``bits_per_dim``, and ``estimates``
        by draws.

    Raises:
        ValueError: without a scaler, or for data that do not fit it.
    """
    scaler = getattr(model, "scaler", None)
    if scaler is None:
        raise ValueError("data_log_prob needs a model with a scaler; log_prob takes model range")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    if scaler.levels is None:
        if draws > 1 or importance or dequantization != "uniform":
            raise ValueError("the data are continuous: there is nothing to dequantise")
        if data.dtype != torch.float64:
            data = data.float()
        out = log_prob(
            model, scaler.encode(data), seed=seed, start_index=start_index, t_min=t_min,
            target_stderr=target_stderr, **settings,
        )  # fmt: skip
        return replace(
            out, log_prob=out.log_prob + out.log_det, estimates=out.estimates + out.log_det
        )
    kind = build(dequantization, dequantize, "dequantization")
    name = describe(kind)["name"]
    started = time.perf_counter()

    def draw(first: int, last: int, **more: Any) -> list[tuple[LogProb, Tensor]]:
        found = []
        for number in range(first, last):
            index = start_index + number * SERIES
            x, log_q, own = kind.draw(
                data, scaler, model.sde, KeyedNoise(seed ^ DEQUANTISATION, index)
            )
            if own is not None and t_min is not None:
                raise ValueError(f"dequantization {name!r} sets t_min itself: leave it out")
            out = log_prob(
                model, x, seed=seed, start_index=index, t_min=t_min if own is None else own,
                **{**settings, **more},
            )  # fmt: skip
            found.append((out, log_q))
        return found

    if target_stderr is None:
        found = draw(0, draws)
    else:
        # The solver's error is alike in all draws: the first tells it.
        found = draw(0, 1, solver_error=True) + draw(1, max(draws, PILOT))
        needed = _draws_for(found, target_stderr)
        found += draw(len(found), needed)
    out = _joined(found, importance, scaler.levels, describe(kind))
    if target_stderr is not None:
        missed = int((~(out.stderr <= target_stderr)).sum())
        if missed:
            out = replace(
                out,
                message=out.message
                or f"the standard error of {target_stderr:g} nats was not reached for {missed} of "
                f"{len(data)} items: give more steps, or be content with {MOST_DRAWS} draws",
            )
    return replace(out, seconds=time.perf_counter() - started, start_index=start_index)


def _values(found: list[tuple[LogProb, Tensor]]) -> Tensor:
    """``log p(x) - log q(x | k)`` of each draw, float64, ``(draws, B)``."""
    return torch.stack([out.log_prob.to(log_q) - log_q for out, log_q in found])


def _draws_for(found: list[tuple[LogProb, Tensor]], target: float) -> int:
    """Draws that bring every item's error to the target, by the pilot's variances."""
    values = _values(found)
    solver = found[0][0].stderr_solver.to(values).nan_to_num(0.0)
    left = (target**2 - solver**2).clamp_min(0.05 * target**2)
    # Draws are lost on an item whose steps alone leave more than the target.
    wanted = torch.where(solver < target, values.var(0) / left, torch.zeros_like(left))
    needed = wanted.nan_to_num(0.0).max().ceil()
    return int(min(max(int(needed), len(found)), MOST_DRAWS))


def _joined(
    found: list[tuple[LogProb, Tensor]],
    importance: bool,
    levels: int,
    dequantizer: dict[str, Any],
) -> LogProb:
    """One result of all draws."""
    outs = [out for out, _ in found]
    values = _values(found)
    count, first = len(outs), outs[0]
    bound, stderr = importance_weighted(values) if importance else mean_bound(values)

    def mean(tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors).mean(0)

    prior, delta = mean([o.prior for o in outs]), mean([o.delta for o in outs])
    solver = first.stderr_solver.to(bound)
    probes = torch.zeros_like(bound) if count > 1 else first.stderr_probes.to(bound)
    failed = [o.message for o in outs if o.message]
    return replace(
        first,
        log_prob=bound,
        prior=prior,
        delta=delta,
        dequantization=mean([-log_q for _, log_q in found]),
        stderr=total_stderr(probes, stderr, solver),
        stderr_probes=probes,
        stderr_dequantization=stderr,
        stderr_solver=solver,
        freedom=torch.full_like(bound, count - 1 if count > 1 else math.nan),
        estimates=values.T,
        nfe=torch.stack([o.nfe for o in outs]).sum(0),
        converged=torch.stack([o.converged for o in outs]).all(0),
        message=failed[0] if failed else "",
        levels=levels,
        dequantizer=dequantizer,
        draws=count,
        importance=importance,
    )
