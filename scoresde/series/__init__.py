"""Series of items: evaluated over processes and machines, kept on disk, resumed after a kill."""

from .plan import BLOCK, SeriesError, Table
from .run import merge, part_file, run_series

__all__ = ["BLOCK", "SeriesError", "Table", "merge", "part_file", "run_series"]
