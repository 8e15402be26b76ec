r"""Likelihood of a data set: every item by itself, and a mean that knows its own error.

For a set of ``N`` items the mean of ``log p`` has three errors. Two come from a **spot check** of
a few items with noise of their own: what draws and probes leave, by a second evaluation; what the
steps leave, by a refined one, whose mean difference is also taken out of the mean. The third, what
another set of as many items would change, is the spread of the items:

    mean = (1/N) sum_i L_i + d,           d = mean of (L_refined - L) over m checked items
    draws^2 = var(L - L') / (2 N),        steps^2 = var(d_i)/m + (d / REST)^2

Steps too long add nearly the same to every item, so that few tell what all need: most of the set
is solved with a fraction of the evaluations of a converged solve.

Source: Multilevel Monte Carlo Path Simulation (Giles, 2008), https://doi.org/10.1287/opre.1070.0496.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import describe
from ..sde.base import as_time
from ..series import BLOCK
from .discrete import data_log_prob
from .result import LogProb
from .solve import Way

if TYPE_CHECKING:
    from ..data import Dataset
    from ..model import ScoreModel

COLUMNS: dict[str, type] = {
    "nats": float, "bits_per_dim": float, "stderr": float, "prior": float, "delta": float,
    "dequantization": float, "nfe": int, "converged": bool,
}  # fmt: skip
"""What is told of each item: log-likelihood in nats of the data, the bits/dim of discrete data
(nan of continuous), its standard error in nats where known, the parts that it is the sum of,
evaluations, and whether the solve arrived."""
REFINE = 4
"""Factor on the steps of the spot check (a hundredth of the tolerance of an adaptive method)."""
REST = 15.0
"""At least so much larger than what a refined solve still lacks is its difference, for a method
of order two; of order one it is three times as large."""
SPOT = 1 << 48
"""Index of the first sample of a spot check, whose noise is not that of any item."""


class Rows:
    """A score that is only ever evaluated on whole blocks of rows, the last filled up.

    Convolutions in float32 give a row the same bits in any batch of whole blocks, but not in
    others: with this, an item's result does not depend on its batch in the last digit.
    """

    def __init__(self, score: Any, block: int = BLOCK) -> None:
        self.score, self.sde, self.block = score, score.sde, block
        self.scaler, self.weights = getattr(score, "scaler", None), score.weights

    def __call__(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """The score of ``x (B, *shape)``."""
        missing, t = -len(x) % self.block, as_time(t, x)
        if not missing:
            return self.score(x, t, **cond)

        def filled(v: Any) -> Any:
            if not isinstance(v, Tensor) or not v.ndim or len(v) != len(x):
                return v
            return torch.cat([v, v[-1:].expand(missing, *v.shape[1:])])

        cond = {name: filled(v) for name, v in cond.items()}
        return self.score(filled(x), filled(t), **cond)[: len(x)]


@dataclass(frozen=True)
class Evaluation:
    """The likelihood of items of a data set, by their indices.

    Args:
        model: a score model with a scaler.
        data: items in the units that the scaler was fitted to.
        settings: of :func:`scoresde.data_log_prob`.
        labels: whether the model is conditional on the labels of the data.

    Raises:
        ValueError: if the data do not fit the model.
    """

    model: ScoreModel
    data: Dataset
    settings: dict[str, Any]
    labels: bool = False

    def __post_init__(self) -> None:
        scaler, shape = self.model.scaler, self.model.shape
        if scaler is None:
            raise ValueError("the likelihood of a data set needs a model with a scaler")
        if shape is not None and tuple(self.data.shape) != tuple(shape):
            raise ValueError(
                f"data of shape {tuple(self.data.shape)} do not fit a model of shape "
                f"{tuple(shape)}"
            )
        if self.data.levels != scaler.levels:
            raise ValueError(
                f"data with levels={self.data.levels} do not fit a model of data "
                f"with levels={scaler.levels}"
            )
        if not self.labels:
            return
        if self.data.y is None:
            raise ValueError(f"{self.data.name} has no labels, which the model is conditional on")
        last, classes = int(self.data.y.max()), getattr(self.model.net, "num_classes", None)
        if classes is not None and last >= classes:
            raise ValueError(
                f"labels of {self.data.name} go up to {last}, and the model has {classes} classes"
            )

    def __call__(self, start: int, stop: int) -> dict[str, Tensor]:
        """The columns of the items ``start .. stop - 1``, ``(stop - start,)`` each."""
        out = self.of(torch.arange(start, stop), start, Rows(self.model))
        added = torch.zeros_like(out.prior) if out.dequantization is None else out.dequantization
        bits = out.bits_per_dim if out.levels else torch.full_like(out.log_prob, math.nan)
        columns = {
            "nats": out.log_prob, "bits_per_dim": bits, "stderr": out.stderr,
            "prior": out.prior, "delta": out.delta,
            "dequantization": added if out.levels else added + out.log_det, "nfe": out.nfe,
            "converged": out.converged,
        }  # fmt: skip
        return {name: values.cpu().to(_KINDS[COLUMNS[name]]) for name, values in columns.items()}

    def of(self, index: Tensor, noise: int, score: Any = None, **more: Any) -> LogProb:
        """The likelihood of the items at the indices, with the noise from that index on."""
        device = next(self.model.parameters()).device
        cond = {}
        if self.labels and self.data.y is not None:
            cond["y"] = self.data.y[index].to(device)
        settings = {**self.settings, **more, **cond}
        x = self.data.x[index].to(device)
        return data_log_prob(score or self.model, x, start_index=noise, **settings)

    @property
    def dims(self) -> int:
        """Entries of one item."""
        return self.data.x[0].numel()


_KINDS = {float: torch.float64, int: torch.int64, bool: torch.bool}


@dataclass(frozen=True)
class SpotCheck:
    """What a few items tell of the error of all; per item, in nats.

    ``shift`` is what refined steps change on average and ``spread`` its standard deviation between
    items; ``noise`` the standard deviation that draws and probes give one evaluation.
    """

    items: int
    shift: float
    spread: float
    noise: float
    nfe: int
    rest: float = REST

    def steps_stderr(self) -> float:
        """Standard error of a mean from which the shift is taken out, nats; nan if not known."""
        return math.hypot(self.spread / math.sqrt(self.items), self.shift / self.rest)


def spot_check(
    evaluation: Evaluation, items: int, progress: Callable[[int], object] | None = None
) -> SpotCheck:
    """Evaluates ``items`` items, evenly spread, again and with refined steps.

    Raises:
        ValueError: for fewer than two items, which tell no spread.
    """
    total = len(evaluation.data)
    items = min(items, total)
    if items < 2:
        raise ValueError(f"a spot check needs at least 2 items, got {items}")
    index = torch.linspace(0, total - 1, items).round().long()
    found: list[Tensor] = []
    nfe = 0
    for part in range(0, items, BLOCK):
        here, noise = index[part : part + BLOCK], SPOT + part
        outs = (
            evaluation.of(here, noise),
            evaluation.of(here, noise + SPOT // 2),
            evaluation.of(here, noise, refine=REFINE),
        )
        for out in outs:
            if not bool(out.converged.all()):
                raise ValueError(
                    f"the spot check did not end: {out.message}; --spot 0 leaves it out"
                )
        found.append(torch.stack([out.log_prob.cpu().double() for out in outs]))
        nfe += sum(int(out.nfe.sum()) for out in outs)
        if progress is not None:
            progress(len(here))
    values, again, refined = torch.cat(found, 1)
    steps = refined - values
    return SpotCheck(
        items=items,
        shift=float(steps.mean()),
        # Not a digit of difference: the state resolves no finer tolerance.
        spread=float(steps.std()) if bool(steps.any()) else math.nan,
        noise=float(((values - again) ** 2 / 2).mean().sqrt()),
        nfe=nfe,
        rest=_rest(evaluation.settings),
    )


def _rest(settings: dict[str, Any]) -> float:
    """The difference of a refined solve in units of what it still lacks, by the method's order."""
    method, steps = settings.get("method", "dopri5"), settings.get("steps")
    chosen = Way(method, steps, settings.get("grid"), 1.0, 1.0, 10**9).chosen()
    first = method == "euler" if chosen is None else chosen[0].order < 2
    return REFINE - 1 if first else REST


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


def described(evaluation: Evaluation) -> dict[str, Any]:
    """Every setting that an evaluation depends on, as plain values."""
    import inspect

    from ..config import build
    from . import dequantize
    from .flow import log_prob
    from .solve import divergence_of

    plain = {
        name: parameter.default
        for function in (data_log_prob, log_prob)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    chosen = {**plain, **evaluation.settings}
    way = Way(*(chosen.pop(n) for n in ("method", "steps", "grid", "rtol", "atol", "max_nfe")))
    sde = evaluation.model.sde
    for name in ("progress", "start_index", "differentiable", "solver_error", "refine"):
        chosen.pop(name)
    kind = build(chosen.pop("dequantization"), dequantize, "dequantization")
    terminal = chosen.pop("terminal")
    start = chosen["t_min"]
    if evaluation.data.levels and isinstance(kind, dequantize.TruncatedNormal):
        assert evaluation.model.scaler is not None
        start = kind.time(evaluation.model.scaler, sde)
    if evaluation.data.levels and isinstance(kind, dequantize.Decoder):
        start = kind.t
    return {
        **way.described(),
        **chosen,
        "max_nfe": way.max_nfe,
        "terminal": "prior" if terminal is None else "moments",
        "dequantizer": describe(kind) if evaluation.data.levels else None,
        "divergence": divergence_of(chosen["divergence"], evaluation.data.x),
        "t_min": sde.t_min_likelihood if start is None else start,
        "t_max": sde.t_max if chosen["t_max"] is None else chosen["t_max"],
        "weights": evaluation.model.weights,
    }
