"""Sources by name: embedded sets, toys, files, folders and the hub, and their held-out parts.

A set that is small when it is decoded is held in memory; a larger one is read when it is needed.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from scoresde.data.dataset import SPLITS, DataError, Dataset, split_indices, spread
from scoresde.data.files import ACCEPTED, open_path
from scoresde.data.items import MIB, ColourError, Items, Reader, Terms
from scoresde.data.lazy import LazySource
from scoresde.data.settings import DataConfig
from scoresde.data.source import Source
from scoresde.data.tables import open_hub
from scoresde.data.toys import TOYS, toy

HELD = 2048  # held-out items that are kept of a set that is read when needed
MANY = 8  # workers of one process
AT_LEAST = 64  # of them, whatever their size


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
    read = _read(splits[split], source, Terms(size, limit))
    return _whole(read if isinstance(read, Dataset) else _all_of(read, 0))[0]


def load_splits(config: DataConfig) -> tuple[Dataset, Dataset]:
    """Training and held-out data: the source's own test or validation split, else a seeded one.

    Both are whole and in memory. An item that cannot be read is replaced by the next of those to
    train on, and left out of those held out.

    Raises:
        DataError: as `load`, or splits of different shapes, levels or classes.
    """
    if _is_stream(config):
        raise DataError(f"{config.source}: a stream is trained on as it comes, and not held whole")
    train, held, _ = _parts(config, None)
    train, held = _whole(train, held)
    return train, held


def load_heldout(config: DataConfig) -> Dataset:
    """The held-out data of `load_splits`, without those to train on.

    Raises:
        DataError: as `load_splits`.
    """
    if _is_stream(config):
        return _stream(config)[1]
    memory = config.memory * MIB
    train, held, _ = _parts(config, memory)
    if isinstance(held, LazySource) and held.items.nbytes > memory:
        return held.load(stand_ins=False)
    return _whole(train, held)[1]  # the items to train on may be the only ones with colours


def open_splits(config: DataConfig) -> tuple[Source, Dataset]:
    """Data to train on, held or read when needed, and held-out data in memory.

    The items held out are those of `load_splits`; of a set that is read when needed, at most
    `HELD` of them, and no more than fit `config.memory`.

    Raises:
        DataError: as `load_splits`; items that cannot be read are not looked for here.
    """
    if _is_stream(config):
        return _stream(config)
    memory = config.memory * MIB
    train, held, seeded = _parts(config, memory)
    if isinstance(train, Dataset) or train.items.nbytes <= memory:
        data, held = _whole(train, held)
        return replace(data, notes=data.notes + held.notes), held
    if isinstance(held, Dataset):
        return train, held
    item = max(1, held.items.nbytes // len(held.items))
    count = min(len(held), HELD, max(AT_LEAST, memory // item))
    # A seeded part is in random order; another may lie class by class.
    some = torch.arange(count) if seeded else spread(len(held), count)
    kept = held.subset(some).load(stand_ins=False)
    return replace(train, notes=kept.notes), kept


def _is_stream(config: DataConfig) -> bool:
    """Whether the items are read as they come: asked for, or there is no other way."""
    path = Path(config.source)
    if config.stream or path.suffix.lower() == ".tar":
        return True
    folders = [f for f in (path, *(path / split for split in SPLITS)) if f.is_dir()]
    inside = {p for folder in folders for p in folder.iterdir()} - set(folders)
    beside = {p.suffix.lower() for p in inside}
    return ".tar" in beside and beside <= {".tar", ".json", ".txt", ".md", ".idx"}


def _stream(config: DataConfig) -> tuple[Source, Dataset]:
    from scoresde.data.stream_splits import open_stream

    return open_stream(
        config.source,
        size=config.size,
        classes=config.classes,
        buffer=config.buffer,
        unreadable=config.unreadable,
        limit=config.limit,
        memory=config.memory * MIB,
    )


def choose_workers(source: Source, world: int = 1) -> int:
    """How many processes should read for each of the `world` that train on this machine."""
    if isinstance(source, Dataset):
        return 0
    affinity = getattr(os, "sched_getaffinity", None)  # what a container grants, on Linux
    processors = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(MANY, processors // world))


Part = Dataset | LazySource


def _parts(config: DataConfig, memory: int | None) -> tuple[Part, Part, bool]:
    """What is trained on, what is held out, and whether the seed chose between them."""
    splits = _open(config.source, config.samples, config.seed)
    terms = Terms(config.size, config.limit, memory)

    def read(split: str) -> Part:
        found = _read(splits[split], config.source, terms)
        return found if isinstance(found, Dataset) else _all_of(found, config.unreadable, memory)

    held = next((s for s in SPLITS[1:] if s in splits), None)
    if "train" in splits and held is not None:
        return *_agree(read("train"), read(held)), False
    every = read("train" if "train" in splits else held or next(iter(splits)))
    if len(every) < 2:
        raise DataError(f"{every.name}: one item cannot be split in two")
    train, rest = split_indices(len(every), config.heldout, config.seed)
    return every.subset(train), every.subset(rest), True


def _all_of(items: Items, unreadable: int, memory: int | None = None) -> LazySource:
    return LazySource(items, torch.arange(len(items)), unreadable, memory or 512 * MIB)


def _whole(*parts: Part) -> list[Dataset]:
    """Parts in memory, of which the first may have stand-ins; with colours if any item has."""

    def load(colour: bool) -> list[Dataset]:
        return [
            part
            if isinstance(part, Dataset)
            else (part.in_colour() if colour else part).load(stand_ins=k == 0)
            for k, part in enumerate(parts)
        ]

    try:
        return load(colour=False)
    except ColourError:  # there was none among those looked at
        return load(colour=True)


def _open(source: str, samples: int, seed: int) -> dict[str, Reader]:
    if source in EMBEDDED:
        return EMBEDDED[source]
    if source in TOYS:
        return {"train": lambda terms: toy(source, min(samples, terms.limit or samples), seed)}
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


def _read(reader: Reader, source: str, terms: Terms) -> Dataset | Items:
    size = terms.size
    for key, value in (("size", size), ("limit", terms.limit)):
        if value is not None and value < 1:
            raise DataError(f"{source}: {key} is {value}; it must be at least 1")
    data = reader(terms)
    if size is not None and data.shape[1:] != (size, size):
        raise DataError(
            f"{source}: size={size} resizes picture files; items of shape "
            f"{data.shape} are taken as they are, leave it out"
        )
    return data


def _agree(train: Part, held: Part) -> tuple[Part, Part]:
    """Both splits, if they can serve one model, with the same classes."""
    if (
        isinstance(train, LazySource)
        and isinstance(held, LazySource)
        and train.shape != held.shape
    ):
        train, held = train.in_colour(), held.in_colour()
    if (train.shape, train.levels) != (held.shape, held.levels):
        raise DataError(
            f"{train.name}: training items have shape {train.shape} and levels "
            f"{train.levels}, held-out items {held.shape} and {held.levels}"
        )
    if train.vectors != held.vectors:
        raise DataError(
            f"{train.name}: the vectors of the training items have {train.vectors or 'no'} "
            f"entries, those of the held-out items {held.vectors or 'none'}"
        )
    ours, theirs = train.class_names, held.class_names
    if ours is None or theirs is None or ours == theirs:
        return train, held
    names = max(ours, theirs, key=len)
    if names[: len(ours)] != ours or names[: len(theirs)] != theirs:
        raise DataError(f"{train.name}: the classes of the training and held-out items differ")
    return replace(train, class_names=names), replace(held, class_names=names)


def _embedded(file: str, name: str, levels: int, terms: Terms) -> Dataset:
    limit = terms.limit
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
