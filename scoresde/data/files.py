"""Open a file or a folder: which reader suits it, and which splits it has.

Opening lists the splits and reads nothing more: `{split: reader}`, where `reader(terms)` gives
the `Items`, or the `Dataset` where it is always held. A source without splits has the one named
"train".
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from scoresde.data.arrays import is_pair, open_arrays
from scoresde.data.dataset import DataError
from scoresde.data.idx import open_idx
from scoresde.data.items import Reader
from scoresde.data.latents import open_latents
from scoresde.data.pictures import PICTURES, open_pictures
from scoresde.data.tables import open_tables, read_tables

ACCEPTED = (
    ".npy, .npz, .safetensors, .parquet, .tar, IDX images, .zip of pictures, "
    "or a folder of pictures, parquet, .tar, IDX files or latents"
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
        if is_pair(path):
            return open_arrays(path)
        if found := open_idx(path) or open_pictures(path) or open_latents(path):
            return found
        raise DataError(
            f"{path.name}: holds no pictures ({', '.join(PICTURES)}), no parquet, no .tar, "
            "no IDX files and no latents (.npy, .npz, .safetensors)"
        )
    suffix = path.suffix.lower()
    if suffix in (".npy", ".npz"):
        return open_arrays(path)
    if suffix == ".parquet":
        return {"train": partial(read_tables, path.name, [path])}
    if suffix == ".safetensors":
        return open_latents(path)
    if suffix == ".zip":
        return open_pictures(path)
    if found := open_idx(path):
        return found
    raise DataError(f"{path.name}: cannot read this kind of file; accepted are {ACCEPTED}")
