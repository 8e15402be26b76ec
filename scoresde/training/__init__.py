"""Training: the objective, its weights and times, the loop, and what a run leaves behind."""

from .ema import EMA
from .job import DEFAULT, Job, prepare
from .objective import DSM
from .settings import LikelihoodConfig, SamplingConfig, TrainingConfig
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
