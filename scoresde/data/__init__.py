"""Data: what training needs of it, and the one affine map between it and the model.

A `Source` hands out the items of every step. A `Dataset` holds items of any shape in memory; a
`Scaler` takes them to the model's range and back, and knows the log-determinant that a likelihood
needs. `load` reads a source by name or path.
"""

from scoresde.data.dataset import DataError, Dataset
from scoresde.data.scaler import Scaler
from scoresde.data.settings import DataConfig
from scoresde.data.source import Batch, Loader, Share, Source, UnreadableError
from scoresde.data.sources import choose_workers, load, load_heldout, load_splits, open_splits
from scoresde.data.toys import toy

__all__ = [
    "Batch",
    "DataConfig",
    "DataError",
    "Dataset",
    "Loader",
    "Scaler",
    "Share",
    "Source",
    "UnreadableError",
    "choose_workers",
    "load",
    "load_heldout",
    "load_splits",
    "open_splits",
    "toy",
]
