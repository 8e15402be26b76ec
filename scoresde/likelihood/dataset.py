"""Likelihood of a data set: every item by itself, and a mean that knows its own error."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .evaluation import COLUMNS, Evaluation, described
from .spot import SpotCheck, spot_check

if TYPE_CHECKING:
    from ..data import Dataset
    from ..model import ScoreModel


@dataclass(frozen=True)
class DatasetLikelihood:
    """Log-likelihood of the items of a data set, in units of the data, and what is known of it.

    Args:
        columns: one value an item, by the names of :data:`COLUMNS`.
        dims: entries of one item.
        levels: levels of discrete data, None of continuous.
        seconds: that it took.
        settings: how it was obtained.
        spot: the check of some items, if made.
    """

    columns: dict[str, Tensor]
    dims: int
    levels: int | None
    seconds: float
    settings: dict[str, Any]
    spot: SpotCheck | None = None

    @property
    def log_prob(self) -> Tensor:
        """Nats of each item: a bound for discrete data, a log-density for continuous."""
        return self.columns["nats"]

    @property
    def converged(self) -> bool:
        """Whether every solve arrived."""
        return bool(self.columns["converged"].all())

    @property
    def nfe(self) -> float:
        """Evaluations of an item on average, all draws together."""
        return float(self.columns["nfe"].double().mean())

    @property
    def nats(self) -> float:
        """Mean of an item, nats; with the shift of the spot check."""
        return float(self.log_prob.mean()) + (self.spot.shift if self.spot else 0.0)

    @property
    def nats_stderr(self) -> float:
        """Standard error of :attr:`nats` as that of all items there could be; nan for one."""
        return mean_error(self.log_prob)

    @property
    def errors(self) -> dict[str, float]:
        """Standard errors of :attr:`nats` as the mean of these very items, by their cause."""
        if self.spot is None:
            return {}
        parts = {
            "draws": self.spot.noise / math.sqrt(len(self.log_prob)),
            "steps": self.spot.steps_stderr(),
        }
        return {**parts, "computation": math.hypot(*parts.values())}

    @property
    def bits_per_dim(self) -> Tensor:
        """``-log_prob / (D ln 2)`` of each item of discrete data, ``(items,)``.

        Raises:
            ValueError: for continuous data, which has none.
        """
        if self.levels is None:
            raise ValueError("bits/dim need discrete data; continuous data has a density in nats")
        return self.columns["bits_per_dim"]

    @property
    def _bit(self) -> float:
        """Nats of an item to a bit a dimension."""
        return self.dims * math.log(2)

    def summary(self) -> dict[str, Any]:
        """The figures and how they were obtained, ready for JSON."""
        figures: dict[str, Any] = {
            "items": len(self.log_prob), "nats": self.nats, "nats_stderr": self.nats_stderr,
            **{f"nats_stderr_{name}": value for name, value in self.errors.items()},
        }  # fmt: skip
        if self.levels is not None:
            figures |= {
                "bits_per_dim": -self.nats / self._bit,
                "bits_per_dim_stderr": self.nats_stderr / self._bit,
                **{f"bits_per_dim_stderr_{k}": v / self._bit for k, v in self.errors.items()},
            }
        return {
            **figures, "dims": self.dims, "levels": self.levels, "nfe": self.nfe,
            "seconds": self.seconds, "converged": self.converged,
            "spot_check": asdict(self.spot) if self.spot else None, **self.settings,
        }  # fmt: skip

    def line(self) -> str:
        """The result in one line."""
        how = f"{len(self.log_prob)} items, {self.nfe:.0f} evaluations, {self.settings['method']}"
        if self.levels is None:
            return f"{self.nats:.4f} ± {self.nats_stderr:.4f} nats ({how})"
        named = self.settings["dequantizer"]["name"]
        return (
            f"{-self.nats / self._bit:.4f} ± {self.nats_stderr / self._bit:.4f} bits/dim, "
            f"{self.nats:.1f} nats ({how}, {named} dequantisation)"
        )

    def error_line(self) -> str:
        """What the spot check found, in one line; empty without one."""
        if self.spot is None:
            return ""
        unit, word = (self._bit, "bits/dim") if self.levels else (1.0, "nats")
        sign = -1 if self.levels else 1
        parts = {name: value / unit for name, value in self.errors.items()}
        if math.isnan(parts["steps"]):
            return (
                f"of these very items ± {parts['draws']:.4f} {word} by draws and probes; "
                "what the steps leave is not known, as no finer tolerance is resolved"
            )
        rough = ""
        if abs(self.spot.shift) / self.spot.rest > self.errors["computation"] / 2:
            rough = "; more steps would help"
        return (
            f"of these very items ± {parts['computation']:.4f} {word}: draws and probes "
            f"{parts['draws']:.4f}, steps {parts['steps']:.4f} "
            f"({sign * self.spot.shift / unit:+.4f} taken out, by {self.spot.items} items{rough})"
        )


def mean_error(values: Tensor) -> float:
    """Standard error of the mean of values ``(N,)``; nan for one."""
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def dataset_log_prob(
    model: ScoreModel,
    data: Dataset,
    *,
    items: int | None = None,
    batch: int = 64,
    seed: int = 0,
    spot: int = 0,
    progress: Callable[[int], object] | None = None,
    labels: bool = False,
    **settings: Any,
) -> DatasetLikelihood:
    """Log-likelihood of the first ``items`` items of ``data`` under ``model``.

    Args:
        model: a score model with a scaler.
        data: items in the units that the scaler was fitted to.
        items: how many; all by default.
        batch: items integrated at once; a keyed noise keeps each item's noise the same in any.
        seed: of dequantisation and probes.
        spot: items of the spot check, 0 for none.
        progress: called with the number of items done.
        labels: whether the model is conditional on the labels of the data.
        settings: passed to :func:`scoresde.data_log_prob`.

    Raises:
        ValueError: if the data do not fit the model.
    """
    if items is not None and items < len(data):
        data = data.subset(range(items))
    started = time.perf_counter()
    evaluation = Evaluation(model, data, {"seed": seed, **settings}, labels)
    checked = spot_check(evaluation, spot) if spot else None
    parts = []
    for start in range(0, len(data), batch):
        stop = min(start + batch, len(data))
        parts.append(evaluation(start, stop))
        if progress is not None:
            progress(stop - start)
    columns = {name: torch.cat([part[name] for part in parts]) for name in COLUMNS}
    found = summed(evaluation, columns, checked)
    return replace(found, seconds=time.perf_counter() - started)


def summed(
    evaluation: Evaluation, columns: dict[str, Tensor], spot: SpotCheck | None, seconds: float = 0
) -> DatasetLikelihood:
    """The result of evaluated items, with the settings written out."""
    return DatasetLikelihood(
        columns, evaluation.dims, evaluation.data.levels, seconds, described(evaluation), spot
    )
