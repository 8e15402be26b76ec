"""The objectives by name: ``dsm``, ``hybrid`` and ``second-order``."""

from .hybrid import Hybrid
from .objective import DSM
from .second_order import SecondOrder

__all__ = ["DSM", "Hybrid", "SecondOrder"]
