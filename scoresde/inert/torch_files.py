"""Files of `torch.save`, the archive and the older stream, read without running them.

The archive (since torch 1.6) holds a pickle `data.pkl`, which names each storage by a key, and
the storages as records. The stream before it is four pickles - a magic number, a version, facts
about the machine, the object - then the keys in a list and each storage as its length and bytes.
The same stream is what `torch.storage._load_from_bytes` reads inside other pickles.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch

from ..files import CheckpointError
from .bytes_of_file import Source, Window, opened
from .stand_ins import Storage, numpy_and_builtins, tensors
from .torch_archive import records
from .unpickle import bounded, unpickle

MAGIC = 0x1950A86A20F9469CFC6C  # the first object of a stream
VERSION = 1001


def read_torch(path: str | Path) -> Any:
    """The content of a file of `torch.save`: plain dicts, lists, tuples, numbers and tensors.

    Tensors are on the CPU, without gradients; those of an archive are mapped from the file, so
    that only what is used is read: copy what must outlive a change of the file. Parameters
    become tensors, `OrderedDict` a dict, NumPy's scalars numbers and its arrays tensors.

    Args:
        path: a file `.pth`, `.pt` or `.bin`.

    Raises:
        CheckpointError: for a missing, foreign, damaged or hostile file, in one line. A global
            outside the inert ones is named; it is never looked up, imported or called.
    """
    with opened(path) as window:
        if Window(window.source).read(2) == b"PK":
            return bounded(_read_archive(window.source))
        return bounded(read_stream(window))


def _read_archive(source: Source) -> Any:
    held = records(source)
    if "data.pkl" not in held:
        raise CheckpointError("it is an archive without data.pkl: not of torch.save")
    if "byteorder" in held:
        order = Window(source, held["byteorder"].start).read(held["byteorder"].size)
        if order != b"little":
            raise CheckpointError("it was written on a machine of the other byte order")
    made: dict[str, Storage] = {}

    def persistent(key: Any) -> Storage:
        dtype, name, nbytes = _storage_id(key)
        record = held.get(f"data/{name}")
        if record is None or record.size != nbytes:
            size = "no" if record is None else record.size
            raise CheckpointError(
                f"it declares {nbytes} bytes for the storage {name}, of which it holds {size}"
            )
        if name not in made:
            made[name] = Storage(source.mapped(record.start, nbytes), dtype)
        return Storage(made[name].memory, dtype)

    data = held["data.pkl"]
    return unpickle(Window(source, data.start, data.start + data.size), _table(source), persistent)


def read_stream(window: Window) -> Any:
    """The object of a stream, with its storages filled; the window is left behind them.

    Raises:
        CheckpointError: as :func:`read_torch`.
    """
    source = window.source
    table = _table(source)
    if unpickle(window, table) != MAGIC:
        raise CheckpointError("it is a plain pickle, not a file of torch.save")
    if unpickle(window, table) != VERSION:
        raise CheckpointError("it is of an unknown version of torch.save")
    facts = unpickle(window, table)
    if type(facts) is not dict or facts.get("little_endian") is not True:
        raise CheckpointError("it was written on a machine of the other byte order")
    made: dict[str, Storage] = {}

    def persistent(key: Any) -> Storage:
        dtype, name, nbytes = _storage_id(key)
        if name not in made:
            if nbytes > len(window):
                raise CheckpointError(
                    f"it declares {nbytes} bytes for a storage where {len(window)} are left"
                )
            made[name] = Storage(source.empty(nbytes), dtype)
        if len(made[name].memory) != nbytes:
            raise CheckpointError("it is damaged: one storage of two sizes")
        return Storage(made[name].memory, dtype)

    content = unpickle(window, table, persistent)
    keys = unpickle(window, table)
    if type(keys) is not list or len(keys) != len(made) or set(map(str, keys)) != set(made):
        raise CheckpointError("it is damaged: its storages are not those that its tensors need")
    for key in keys:
        storage = made[str(key)]
        (elements,) = struct.unpack("<q", window.read(8))
        if elements * storage.dtype.itemsize != len(storage.memory):
            raise CheckpointError("it is damaged: a storage of another size than declared")
        window.fill(storage.memory)
    return content


def _storage_id(key: Any) -> tuple[torch.dtype, str, int]:
    """Type, name and bytes of the storage behind a persistent id."""
    if type(key) is not tuple or len(key) not in (5, 6) or key[0] != "storage":
        raise CheckpointError("it refers to something else than a storage outside of its pickle")
    _, dtype, name, _, elements, *view = key
    fits = isinstance(dtype, torch.dtype) and type(name) is str and type(elements) is int
    if not fits or elements < 0 or view not in ([], [None]):
        raise CheckpointError("it is damaged: the description of a storage is broken")
    return dtype, name, elements * dtype.itemsize


def _table(source: Source) -> dict[tuple[str, str], Any]:
    return tensors() | numpy_and_builtins(source)
