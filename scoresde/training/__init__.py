"""Training: the objective, its weights and times, the loop, and what a run leaves behind."""

from .ema import EMA
from .finite import TrainingError
from .interrupt import RESTART, Terminated
from .job import DEFAULT, Job, prepare
from .objective import DSM
from .pace import Budget
from .settings import LikelihoodConfig, SamplingConfig, TrainingConfig
from .trainer import Trainer

__all__ = [
    "DEFAULT",
    "DSM",
    "EMA",
    "RESTART",
    "Budget",
    "Job",
    "LikelihoodConfig",
    "SamplingConfig",
    "Terminated",
    "Trainer",
    "TrainingConfig",
    "TrainingError",
    "prepare",
]
