"""Forward processes: one file each, all subclasses of :class:`SDE`."""

from .base import SDE, GaussianSDE, Reverse, as_time
from .cosine import Cosine
from .ddpm import DDPM
from .edm import EDM
from .linear import Linear
from .subvp import SubVP
from .ve import VE
from .vp import VP

__all__ = [
    "DDPM",
    "EDM",
    "SDE",
    "VE",
    "VP",
    "Cosine",
    "GaussianSDE",
    "Linear",
    "Reverse",
    "SubVP",
    "as_time",
]
