"""Which items a step trains on, under its old address."""

from ..data.batches import Batches

__all__ = ["Batches"]
