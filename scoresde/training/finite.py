"""Steps that were not finite: what was the first bad thing, and how many came in a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .learner import Figures


class TrainingError(RuntimeError):
    """A run that cannot go on, with the step and the reason."""


@dataclass
class Skips:
    """Counts the steps that were skipped.

    Args:
        patience: skipped steps in a row at which a run stops.
    """

    patience: int
    total: int = 0
    row: int = 0

    def look(self, finite: Sequence[bool]) -> bool:
        """Takes the outcome of consecutive steps in; whether the run has to stop."""
        for each in finite:
            self.row = 0 if each else self.row + 1
            self.total += not each
            if self.row >= self.patience:
                return True
        return False


class Bad(NamedTuple):
    """Something that is not finite; the least of several is where it began."""

    order: int
    text: str


def first_bad(figures: Figures, parameters: Sequence[str]) -> Bad:
    """The first thing of a step that is not finite: an item, its loss, or a gradient.

    Args:
        figures: of a step, read back from the device.
        parameters: names of those that have gradients.
    """
    if not bool(figures.sound.all()):
        item = figures.where[int((~figures.sound).int().argmax())]
        return Bad(0, f"{item} of the data holds values that are not finite")
    bad = ~figures.loss.isfinite()
    if bool(bad.any()):
        k = int(bad.int().argmax())
        loss, log_snr = float(figures.loss[k]), float(figures.log_snr[k])
        return Bad(1, f"the loss of {figures.where[k]} is {loss} at log-SNR {log_snr:.3g}")
    name, norm = parameters[int(figures.bad)], float(figures.norm)
    return Bad(2, f"the gradient of {name} is not finite (the norm of all is {norm})")


def read(pending: Sequence[Figures]) -> list[Figures]:
    """Figures of many steps on the CPU: the one place that waits for the device."""
    scalars = torch.stack([torch.stack([f.norm, f.bad.to(f.norm.dtype)]) for f in pending]).cpu()
    losses = torch.stack([f.loss for f in pending]).cpu()
    sound = torch.stack([f.sound for f in pending]).cpu()
    log_snr = torch.stack([f.log_snr for f in pending]).cpu()
    return [
        Figures(losses[i], log_snr[i], sound[i], scalars[i, 0], scalars[i, 1], f.where)
        for i, f in enumerate(pending)
    ]
