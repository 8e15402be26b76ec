"""Data: whole sets in memory, and the one affine map between them and the model.

A `Dataset` holds items of any shape; a `Scaler` takes them to the model's range and back, and
knows the log-determinant that a likelihood needs. `load` reads a source by name or path.
"""

from scoresde.data.dataset import DataError, Dataset
from scoresde.data.scaler import Scaler
from scoresde.data.sources import DataConfig, load, load_splits
from scoresde.data.toys import toy

__all__ = ["DataConfig", "DataError", "Dataset", "Scaler", "load", "load_splits", "toy"]
