"""Open a file or a folder: which reader suits it, and which splits it has.

Opening lists the splits and reads nothing more: `{split: reader}`, where `reader(size, limit)`
gives the `Dataset`. A source without splits has the one named "train".
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from scoresde.data.arrays import open_arrays
from scoresde.data.dataset import DataError, Reader
from scoresde.data.idx import open_idx
from scoresde.data.pictures import open_pictures
from scoresde.data.tables import open_tables, read_tables

ACCEPTED = (
    ".npy, .npz, .parquet, IDX images, .zip of pictures, "
    "or a folder of pictures, parquet or IDX files"
)


def open_path(path: Path) -> dict[str, Reader]:
    """The splits of a file or folder and what reads each.

    Raises:
        DataError: a kind of file that is not read, or an empty or damaged container.
    """
    if path.is_dir():
        tables = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
        if tables:
            return open_tables(path, tables)
        return open_idx(path) or open_pictures(path)
    suffix = path.suffix.lower()
    if suffix in (".npy", ".npz"):
        return open_arrays(path)
    if suffix == ".parquet":
        return {"train": partial(read_tables, path.name, [path])}
    if suffix == ".zip":
        return open_pictures(path)
    if found := open_idx(path):
        return found
    raise DataError(f"{path.name}: cannot read this kind of file; accepted are {ACCEPTED}")
