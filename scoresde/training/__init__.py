"""Training: the objective, its weights and times, the loop, and what a run leaves behind."""

from .ema import EMA
from .job import DEFAULT, Job, LikelihoodConfig, SamplingConfig, TrainingConfig, prepare
from .objective import DSM
from .trainer import Budget, Trainer, TrainingError

__all__ = [
    "DEFAULT",
    "DSM",
    "EMA",
    "Budget",
    "Job",
    "LikelihoodConfig",
    "SamplingConfig",
    "Trainer",
    "TrainingConfig",
    "TrainingError",
    "prepare",
]
