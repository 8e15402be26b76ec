r"""Likelihood of a data set: dequantise, integrate, average, with an error bar.

Discrete data ``k`` is dequantised, ``y = encode(k + u)`` with ``u ~ U[0, 1)``, ``draws`` times;
the mean of ``log p(y) + log|d model / d data|`` over the draws is a lower bound on ``log P(k)``,
whose negative over ``D ln 2`` is the bits/dim. Continuous data has a density in nats alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..noise import KeyedNoise

if TYPE_CHECKING:
    from ..data import Dataset
    from ..model import ScoreModel

_DEQUANTISATION = 1 << 40  # keeps its noise apart from that of the probes of the same seed


@dataclass(frozen=True)
class DatasetLikelihood:
    """Log-likelihood of the items of a data set, in units of the data.

    ``log_prob`` is in nats, ``(items,)``: a bound on the log-probability for discrete data, a
    log-density for continuous data. Standard errors are over items, draws and probes included.
    """

    log_prob: Tensor
    dims: int
    levels: int | None
    draws: int
    nfe: float
    seconds: float
    converged: bool
    settings: dict[str, Any]

    @property
    def nats(self) -> float:
        """Mean log-likelihood of an item, nats."""
        return float(self.log_prob.mean())

    @property
    def nats_stderr(self) -> float:
        """Standard error of :attr:`nats`; nan for a single item."""
        return float(self.log_prob.std()) / math.sqrt(len(self.log_prob))

    @property
    def bits_per_dim(self) -> Tensor:
        """``-log_prob / (D ln 2)`` of each item of discrete data, ``(items,)``.

        Raises:
            ValueError: for continuous data, which has none.
        """
        if self.levels is None:
            raise ValueError("bits/dim need discrete data; continuous data has a density in nats")
        return -self.log_prob / (self.dims * math.log(2))

    def summary(self) -> dict[str, Any]:
        """The figures and how they were obtained, ready for JSON."""
        figures: dict[str, Any] = {
            "items": len(self.log_prob),
            "nats": self.nats,
            "nats_stderr": self.nats_stderr,
        }
        if self.levels is not None:
            bits = self.bits_per_dim
            figures["bits_per_dim"] = float(bits.mean())
            figures["bits_per_dim_stderr"] = float(bits.std()) / math.sqrt(len(bits))
        rest = {k: v for k, v in asdict(self).items() if k not in ("log_prob", "settings")}
        return {**figures, **rest, **self.settings}

    def line(self) -> str:
        """The result in one line."""
        how = f"{len(self.log_prob)} items, {self.nfe:.0f} evaluations, {self.settings['method']}"
        if self.levels is None:
            return f"{self.nats:.4f} ± {self.nats_stderr:.4f} nats ({how})"
        bits = self.summary()
        return (
            f"{bits['bits_per_dim']:.4f} ± {bits['bits_per_dim_stderr']:.4f} bits/dim, "
            f"{self.nats:.1f} nats ({how}, uniform dequantisation)"
        )


def dataset_log_prob(
    model: ScoreModel,
    data: Dataset,
    *,
    items: int | None = None,
    draws: int = 1,
    batch: int = 64,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
    labels: bool = False,
    **settings: Any,
) -> DatasetLikelihood:
    """Log-likelihood of the first ``items`` items of ``data`` under ``model``.

    Args:
        model: a score model with a scaler.
        data: items in the units that the scaler was fitted to.
        items: how many; all by default.
        draws: dequantisation draws an item, for discrete data.
        batch: items integrated at once; a keyed noise keeps each item's noise the same in any.
        seed: of dequantisation and probes.
        progress: called with the number of items done.
        labels: whether the model is conditional on the labels of the data.
        settings: passed to :func:`scoresde.log_prob`.

    Raises:
        ValueError: if the data do not fit the model.
    """
    from .flow import log_prob

    scaler = model.scaler
    if scaler is None:
        raise ValueError("the likelihood of a data set needs a model with a scaler")
    if model.shape is not None and tuple(data.shape) != tuple(model.shape):
        raise ValueError(
            f"data of shape {tuple(data.shape)} do not fit a model of shape {tuple(model.shape)}"
        )
    if data.levels != scaler.levels:
        raise ValueError(
            f"data with levels={data.levels} do not fit a model of data "
            f"with levels={scaler.levels}"
        )
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    draws = draws if scaler.levels is not None else 1
    device = next(model.parameters()).device
    n = min(items or len(data), len(data))
    started = time.perf_counter()
    totals, last = torch.zeros(n, dtype=torch.float64), None
    evaluations, converged = torch.zeros(n), True
    for draw, start, stop in _parts(n, draws, batch):
        x = data.x[start:stop].to(device)
        noise = None
        if scaler.levels is not None:
            source = KeyedNoise(seed ^ _DEQUANTISATION, start + draw * len(data))
            noise = source.uniform(tuple(x.shape), device, torch.float32)
        cond: dict[str, Any] = {}
        if labels and data.y is not None:
            cond["y"] = data.y[start:stop].to(device)
        report = _Counter(progress, stop - start)
        last = log_prob(
            model,
            scaler.encode(x, noise=noise).float(),
            seed=seed,
            start_index=start + draw * len(data),
            progress=report,
            **settings,
            **cond,
        )
        report(1.0)
        totals[start:stop] += last.log_prob.cpu().double() / draws
        evaluations[start:stop] += last.nfe.cpu() / draws
        converged &= bool(last.converged.all())
    assert last is not None
    return DatasetLikelihood(
        log_prob=totals + scaler.log_det(tuple(data.shape)),
        dims=data.x[0].numel(),
        levels=scaler.levels,
        draws=draws,
        nfe=float(evaluations.mean()),
        seconds=time.perf_counter() - started,
        converged=converged,
        settings={
            "divergence": last.divergence,
            "probes": last.probes,
            "method": last.method,
            "steps": last.steps,
            "solver": last.solver,
            "grid": last.grid,
            "rtol": last.rtol,
            "atol": last.atol,
            "t_min": last.t_min,
            "t_max": last.t_max,
            "seed": seed,
            "weights": last.weights,
        },
    )


class _Counter:
    """Turns the fraction of the way that a batch has gone into items done."""

    def __init__(self, progress: Callable[[int], object] | None, items: int) -> None:
        self.progress, self.items, self.told = progress, items, 0

    def __call__(self, fraction: float, *_: float) -> None:
        done = int(fraction * self.items)
        if self.progress is not None and done > self.told:
            self.progress(done - self.told)
            self.told = done


def _parts(n: int, draws: int, batch: int) -> Iterator[tuple[int, int, int]]:
    for draw in range(draws):
        for start in range(0, n, batch):
            yield draw, start, min(start + batch, n)
