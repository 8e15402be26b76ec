"""The distributions of training times by name, those of fixed form and those made of cells."""

from .schedule import Learned, VelocityImportance
from .times import Importance, LogitNormal, LogNormal, LowDiscrepancy, Steps, Uniform

__all__ = [
    "Importance",
    "Learned",
    "LogNormal",
    "LogitNormal",
    "LowDiscrepancy",
    "Steps",
    "Uniform",
    "VelocityImportance",
]
