"""The operators by name: every class of ``__all__`` is built from its kebab-case name."""

from .linear import Linear
from .mask import Mask

__all__ = ["Linear", "Mask"]
