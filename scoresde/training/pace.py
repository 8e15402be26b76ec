"""How far a run has come: its bounds, and the instants at which something is due."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .finite import TrainingError
from .settings import TrainingConfig


@dataclass(frozen=True)
class Budget:
    """When a run ends: whichever of its bounds comes first."""

    steps: float = math.inf
    seconds: float = math.inf

    @classmethod
    def of(cls, training: TrainingConfig, items: int | None) -> Budget:
        """The bounds of a configuration for a data set of so many items, None if unknown."""
        steps = training.steps or math.inf
        if training.epochs is not None:
            if items is None:
                raise TrainingError("a stream has no epochs: bound the run by steps or minutes")
            steps = min(steps, math.ceil(training.epochs * items / training.batch_size))
        return cls(steps, (training.minutes or math.inf) * 60)

    def progress(self, step: int, seconds: float) -> float:
        """Share of the run that is done, in [0, 1]."""
        return min(1.0, max(step / self.steps, seconds / self.seconds))


class Marks:
    """Instants spread evenly over a run.

    Args:
        count: how many there are; the last is the end.
        progress: share of the run that is done already.
    """

    def __init__(self, count: int, progress: float) -> None:
        self.count = count
        self.done = math.floor(progress * count)

    def passed(self, progress: float) -> bool:
        """Whether one lies between the last look and ``progress``."""
        before, self.done = self.done, math.floor(progress * self.count)
        return self.done > before
