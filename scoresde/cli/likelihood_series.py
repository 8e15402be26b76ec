"""A series of likelihoods: how a worker evaluates it, and what its values depend on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint import load
from ..config import describe
from ..likelihood.evaluation import Evaluation, described


@dataclass(frozen=True)
class Maker:
    """Makes the evaluation in a worker, where the model is loaded again."""

    run: str
    weights: str
    device: str
    evaluation: Evaluation

    def __getstate__(self) -> dict[str, Any]:
        rest = self.evaluation
        return {
            "run": self.run, "weights": self.weights, "device": self.device,
            "parts": (rest.data, rest.settings, rest.labels),
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        data, settings, labels = state.pop("parts")
        model = load(state["run"], weights=state["weights"], device=torch.device(state["device"]))
        object.__setattr__(self, "evaluation", Evaluation(model, data, settings, labels))
        for name, value in state.items():
            object.__setattr__(self, name, value)

    def __call__(self) -> Evaluation:
        """The evaluation."""
        return self.evaluation


def fingerprint(evaluation: Evaluation, device: torch.device) -> dict[str, Any]:
    """What the values of a series depend on, as plain values."""
    from .. import __version__
    from ..config import build
    from ..likelihood import dequantize

    weights = hashlib.sha256()
    kind = build(
        evaluation.settings.get("dequantization", "uniform"), dequantize, "dequantization"
    )
    for module in (evaluation.model, getattr(kind, "flow", None)):
        for name, value in sorted(module.state_dict().items()) if module is not None else ():
            weights.update(name.encode())
            weights.update(value.detach().cpu().contiguous().numpy().tobytes())
    for moment in evaluation.settings.get("terminal") or ():
        weights.update(moment.cpu().contiguous().numpy().tobytes())
    data = hashlib.sha256(evaluation.data.x.contiguous().numpy().tobytes())
    if evaluation.labels and evaluation.data.y is not None:
        data.update(evaluation.data.y.contiguous().numpy().tobytes())
    return {
        "scoresde": __version__,
        "torch": torch.__version__,
        "device": device.type,
        "weights": weights.hexdigest()[:16],
        "model": [describe(evaluation.model.sde), describe(evaluation.model.parameterization)],
        "data": data.hexdigest()[:16],
        "settings": described(evaluation),
    }
