"""Checkpoints of shared-out weights: torch.distributed.checkpoint with safetensors for storage.

A shard of FSDP2 is some rows of a tensor, and rows are one run of bytes in a safetensors file. So
each process writes its rows straight into their place in the one file, and reads those it needs:
nothing is gathered, nothing is pickled, and the file is that of a run of one process. PyTorch's
part is to plan who writes and who reads what. All processes need one file system.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ..files import CheckpointError

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
NAMED = {name: dtype for dtype, name in DTYPES.items()}
Parts = Mapping[str, Mapping[str, Tensor]]


def save(parts: Parts, folder: Path, group: Any = None) -> None:
    """Writes ``folder/PART.safetensors``, each process its shards; all processes must call.

    Args:
        parts: tensors by the names of their files; those that are not shared out are the same in
            all processes, and rank 0 writes them.
        folder: an empty one that all processes see.
        group: the processes, on the CPU.

    Raises:
        CheckpointError: in all processes, if one cannot write.
    """
    with _in_one_line():
        dcp.save(_flat(parts), storage_writer=Writer(folder), process_group=group)


def load(parts: Parts, folder: Path, group: Any = None) -> None:
    """Reads ``folder/PART.safetensors`` into tensors, each process its shards; all must call.

    Args:
        parts: tensors that are filled in place, by the names of their files.
        folder: of files that :func:`save`, or a run of one process, has written.
        group: the processes, on the CPU.

    Raises:
        CheckpointError: in all processes, if one cannot read.
    """
    with _in_one_line():
        dcp.load(dict(_flat(parts)), storage_reader=Reader(folder, parts), process_group=group)


def _flat(parts: Parts) -> dict[str, Tensor]:
    return {f"{part}/{key}": t for part, tensors in parts.items() for key, t in tensors.items()}


@contextmanager
def _in_one_line() -> Iterator[None]:
    """What one process could not do is an error of all, in the words of the first."""
    try:
        yield
    except CheckpointException as error:
        rank, (first, _) = min(error.failures.items(), key=lambda item: item[0])
        if isinstance(first, CheckpointError):
            raise CheckpointError(str(first)) from error
        text = " ".join(str(first).split()) or type(first).__name__
        raise CheckpointError(f"the checkpoint of process {rank} failed: {text}") from error


def stored(file: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the tensors of a file, by its header alone.

    Raises:
        CheckpointError: if it is missing, truncated or no safetensors file.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            views = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            return {k: (tuple(v.get_shape()), NAMED[v.get_dtype()]) for k, v in views.items()}
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{file} is truncated or damaged: {error}") from error
    except KeyError as error:
        raise CheckpointError(f"{file} holds tensors of the unknown type {error}") from error


Place = tuple[int, tuple[int, ...]]
"""Where the bytes of a tensor begin in its file, and its shape."""


class Writer(dcp.StorageWriter):
    """Safetensors files that many processes write at once.

    Args:
        folder: where they are made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A writer serves for one checkpoint."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Folders of the file system are accepted."""
        return True

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing is needed."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """What a process writes is up to the planner."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Rank 0 makes the files, all but the numbers, and tells where those go."""
        found: dict[str, dict[str, tuple[str, tuple[int, ...], int]]] = {}
        for item in (item for plan in plans for item in plan.items):
            part, _, key = item.index.fqn.partition("/")
            if item.tensor_data is None:
                raise CheckpointError(f"{part} holds {key}, which is no tensor")
            dtype, shape = item.tensor_data.properties.dtype, tuple(item.tensor_data.size)
            found.setdefault(part, {})[key] = (DTYPES[dtype], shape, dtype.itemsize)
        places: dict[str, Place] = {}
        for part, tensors in found.items():
            # Wide types first, so that every tensor is aligned.
            order = sorted(tensors, key=lambda key: (-tensors[key][2], key))
            header, end = {}, 0
            for key in order:
                name, shape, width = tensors[key]
                begin, end = end, end + width * math.prod(shape)
                header[key] = {"dtype": name, "shape": shape, "data_offsets": [begin, end]}
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            for key in order:
                start = header[key]["data_offsets"][0]  # type: ignore[index]
                places[f"{part}/{key}"] = (8 + len(text) + start, tensors[key][1])  # type: ignore[operator]
            self._make(self._file(part), len(text).to_bytes(8, "little") + text, end)
        return [
            replace(plan, storage_data={i.index.fqn: places[i.index.fqn] for i in plan.items})
            for plan in plans
        ]

    def _file(self, part: str) -> Path:
        return self.folder / f"{part}.safetensors"

    def _make(self, file: Path, header: bytes, size: int) -> None:
        try:
            with open(file, "xb") as handle:
                handle.write(header)
                handle.truncate(len(header) + size)
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise CheckpointError(f"cannot write {file}: {error.strerror or error}") from error

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes the process's rows, one shard in memory at a time, and waits for the disk."""
        written, handles = [], {}
        with ExitStack() as stack:
            for item in plan.items:
                part = item.index.fqn.partition("/")[0]
                file = self._file(part)
                try:
                    if part not in handles:
                        handles[part] = stack.enter_context(open(file, "r+b"))
                    data = planner.resolve_data(item)
                    assert isinstance(data, Tensor)
                    content = data.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                    handles[part].seek(_start(item, plan.storage_data[item.index.fqn], data))
                    handles[part].write(content.numpy().data)
                except FileNotFoundError as error:
                    raise CheckpointError(
                        f"cannot write {file}: a sharded run needs one file system that all "
                        "its machines see"
                    ) from error
                except OSError as error:
                    raise CheckpointError(f"cannot write {file}: {error.strerror}") from error
                written.append(WriteResult(item.index, content.numel(), None))
            try:
                for handle in handles.values():
                    handle.flush()
                    os.fsync(handle.fileno())
            except OSError as error:
                raise CheckpointError(f"cannot write {file}: {error.strerror}") from error
        return _done(written)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """The headers say all that there is to say."""


class Reader(dcp.StorageReader):
    """Safetensors files of which each process reads what it needs.

    Args:
        folder: where they are.
        parts: their names, without the suffix.
    """

    def __init__(self, folder: Path, parts: Mapping[str, Any]) -> None:
        self.folder = folder
        self.parts = list(parts)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A reader serves for one checkpoint."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Folders of the file system are accepted."""
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The headers of the files: every tensor is one piece."""
        return Metadata(
            {
                f"{part}/{key}": TensorStorageMetadata(
                    TensorProperties(dtype),
                    torch.Size(shape),
                    [ChunkStorageMetadata(torch.Size([0] * len(shape)), torch.Size(shape))],
                )
                for part in self.parts
                for key, (shape, dtype) in stored(self._file(part)).items()
            }
        )

    def _file(self, part: str) -> Path:
        return self.folder / f"{part}.safetensors"

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing is needed."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """What a process reads is up to the planner."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """What all read is up to the planner."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads the process's rows, one shard in memory at a time."""
        with ExitStack() as stack:
            opened: dict[str, Any] = {}
            for item in plan.items:
                part, _, key = item.storage_index.fqn.partition("/")
                if part not in opened:
                    file = safe_open(self._file(part), framework="pt")
                    opened[part] = stack.enter_context(file)
                if len(item.lengths):
                    box = zip(item.storage_offsets, item.lengths, strict=True)
                    found = opened[part].get_slice(key)[tuple(slice(o, o + n) for o, n in box)]
                else:
                    found = opened[part].get_tensor(key)
                target = planner.resolve_tensor(item).detach()
                target.copy_(found)
                planner.commit_tensor(item, target)
        return _done(None)


def _start(item: WriteItem, place: Place, data: Tensor) -> int:
    """Where the bytes of a shard, which is some rows of its tensor, begin in the file."""
    begin, shape = place
    chunk = item.tensor_data.chunk  # type: ignore[union-attr]
    if tuple(chunk.sizes[1:]) != shape[1:]:
        raise CheckpointError(f"{item.index.fqn} is not shared out by its rows")
    row = math.prod(shape[1:]) * data.element_size()
    return begin + (chunk.offsets[0] * row if shape else 0)


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
