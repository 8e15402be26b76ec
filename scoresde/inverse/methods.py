"""The methods by name: every class of ``__all__`` is built from its kebab-case name."""

from .ddrm import DDRM
from .diffpir import DiffPIR
from .dps import DPS
from .mmps import MMPS
from .pgdm import PGDM
from .repaint import RePaint
from .replacement import Replacement
from .tmpd import TMPD
from .trained import Trained

__all__ = ["DDRM", "DPS", "MMPS", "PGDM", "TMPD", "DiffPIR", "RePaint", "Replacement", "Trained"]
