"""Sources by name: embedded sets, toys, files, folders and the hub, and their held-out parts."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from scoresde.data.dataset import SPLITS, DataError, Dataset, Reader
from scoresde.data.files import ACCEPTED, open_path
from scoresde.data.scaler import MODES
from scoresde.data.tables import open_hub
from scoresde.data.toys import TOYS, toy


@dataclass(frozen=True)
class DataConfig:
    """Which data, and how it is prepared.

    Args:
        source: "digits", "mnist-sample", a toy's name, a path, or "hf:owner/name".
        heldout: share of the items held out where the source has no test split, in (0, 1).
        size: pictures are centre-cropped and resized to `size x size`.
        scaler: mode of `Scaler.fit`.
        limit: at most so many items are read (of each split).
        samples: items drawn of a toy.
        seed: of the split and of the toys.

    Raises:
        DataError: a value outside its range.
    """

    source: str = "digits"
    heldout: float = 0.1
    size: int | None = None
    scaler: str = "auto"
    limit: int | None = None
    samples: int = 20000
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.source:
            raise DataError("data.source is empty; name a set, a toy, a path or hf:owner/name")
        if not 0 < self.heldout < 1:
            raise DataError(f"data.heldout is {self.heldout}; it must lie between 0 and 1")
        if self.scaler not in MODES:
            raise DataError(
                f"data.scaler is {self.scaler!r}; it must be one of {', '.join(MODES)}"
            )
        for key in ("size", "limit", "samples"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise DataError(f"data.{key} is {value}; it must be at least 1")


def load(
    source: str,
    split: str = "train",
    *,
    size: int | None = None,
    limit: int | None = None,
    samples: int = 20000,
    seed: int = 0,
) -> Dataset:
    """One split of a source; a source without splits is all "train".

    The first `limit` items are read, of a folder of pictures as many spread over it.
    "mnist-sample" is only for evaluation: its "train" and "test" are the same held-out images.

    Raises:
        DataError: an unknown source or split, or data that cannot be read.
    """
    splits = _open(source, samples, seed)
    if split not in splits:
        raise DataError(f"{source}: has no split {split!r}; it has {', '.join(splits)}")
    return _read(splits[split], source, size, limit)


def load_splits(config: DataConfig) -> tuple[Dataset, Dataset]:
    """Training and held-out data: the source's own test or validation split, else a seeded one.

    Raises:
        DataError: as `load`, or splits of different shapes, levels or classes.
    """
    splits = _open(config.source, config.samples, config.seed)
    read = partial(_read, source=config.source, size=config.size, limit=config.limit)
    held = next((s for s in SPLITS[1:] if s in splits), None)
    if "train" in splits and held is not None:
        return _agree(read(splits["train"]), read(splits[held]))
    only = "train" if "train" in splits else held or next(iter(splits))
    return read(splits[only]).split(config.heldout, config.seed)


def _open(source: str, samples: int, seed: int) -> dict[str, Reader]:
    if source in EMBEDDED:
        return EMBEDDED[source]
    if source in TOYS:
        return {"train": lambda size, limit: toy(source, min(samples, limit or samples), seed)}
    if source.startswith("hf:"):
        return open_hub(source[3:])
    if Path(source).exists():
        return open_path(Path(source))
    names = [*EMBEDDED, *TOYS]
    near = difflib.get_close_matches(source, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DataError(
        f"no data at {source!r}{hint} (accepted: {', '.join(names)}, hf:owner/name, "
        f"or the path of {ACCEPTED})"
    )


def _read(reader: Reader, source: str, size: int | None, limit: int | None) -> Dataset:
    for key, value in (("size", size), ("limit", limit)):
        if value is not None and value < 1:
            raise DataError(f"{source}: {key} is {value}; it must be at least 1")
    data = reader(size, limit)
    if size is not None and data.shape[1:] != (size, size):
        raise DataError(
            f"{source}: size={size} resizes picture files; items of shape "
            f"{data.shape} are taken as they are, leave it out"
        )
    return data


def _agree(train: Dataset, held: Dataset) -> tuple[Dataset, Dataset]:
    """Both splits, if they can serve one model, with the same classes."""
    if (train.shape, train.levels) != (held.shape, held.levels):
        raise DataError(
            f"{train.name}: training items have shape {train.shape} and levels "
            f"{train.levels}, held-out items {held.shape} and {held.levels}"
        )
    ours, theirs = train.class_names, held.class_names
    if ours is None or theirs is None or ours == theirs:
        return train, held
    names = max(ours, theirs, key=len)
    if names[: len(ours)] != ours or names[: len(theirs)] != theirs:
        raise DataError(f"{train.name}: the classes of the training and held-out items differ")
    return replace(train, class_names=names), replace(held, class_names=names)


def _embedded(file: str, name: str, levels: int, size: int | None, limit: int | None) -> Dataset:
    path = resources.files("scoresde.data").joinpath("embedded", file)
    with path.open("rb") as stream, np.load(stream) as arrays:
        x, y = arrays["x"][:limit, None], arrays["y"][:limit]
    digits = tuple(str(digit) for digit in range(10))
    return Dataset(torch.from_numpy(x), torch.from_numpy(y), levels, name, digits)


_DIGITS = partial(_embedded, "digits.npz", "digits", 17)
_SAMPLE = partial(_embedded, "mnist_test_256.npz", "mnist-sample", 256)
EMBEDDED: dict[str, dict[str, Reader]] = {
    "digits": {"train": _DIGITS},
    "mnist-sample": {"train": _SAMPLE, "test": _SAMPLE},
}
