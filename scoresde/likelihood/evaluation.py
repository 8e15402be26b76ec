"""Likelihoods of the items of a data set, by their indices: the same bits in any batch."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import build, describe
from ..sde.base import as_time
from ..series import BLOCK
from . import dequantize
from .discrete import data_log_prob
from .flow import log_prob
from .result import LogProb
from .solve import Way, divergence_of

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
_KINDS = {float: torch.float64, int: torch.int64, bool: torch.bool}


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


def described(evaluation: Evaluation) -> dict[str, Any]:
    """Every setting that an evaluation depends on, as plain values."""
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
