"""Processes that work together, as ``torchrun`` and ``accelerate launch`` start them.

A launcher sets ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``; without them a process is a world of
one, and nothing here imports ``torch.distributed``. What is not a gradient travels through a group
of its own on the CPU, whose timeout is long, because a process may wait for a slow one. An error
never waits: the process that fails leaves, and the launcher ends the others.

Nothing at the top imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .config import ConfigError
from .devices import pick_device

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long a process waits for the others with its results."""
STORE_PATIENCE = timedelta(seconds=5)
"""How long a process that fails looks for the launcher's store."""


class Place(NamedTuple):
    """The place of a process among those that were launched together."""

    rank: int
    size: int
    local_rank: int


def launched(environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place that a launcher gave to this process; None without one.

    Raises:
        ConfigError: for values that are no place.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = [environment.get(name) for name in names]
    if given[0] is None or given[1] is None:
        return None
    said = ", ".join(f"{n}={v}" for n, v in zip(names, given, strict=True) if v is not None)
    try:
        rank, size = int(given[0]), int(given[1])
        local_rank = rank if given[2] is None else int(given[2])
    except ValueError as error:
        raise ConfigError(f"a launcher's variables must be whole numbers, got {said}") from error
    if not (0 <= rank < size and local_rank >= 0):
        raise ConfigError(f"a launcher's rank lies in 0 .. WORLD_SIZE - 1, got {said}")
    return Place(rank, size, local_rank)


def leads() -> bool:
    """Whether this process speaks for all: rank 0, and any that no launcher started."""
    place = launched()
    return place is None or place.rank == 0


@dataclass(frozen=True, eq=False)
class World:
    """The processes of a run, seen from one of them.

    Args:
        rank: of this process, ``0 .. size - 1``.
        size: number of processes.
        local_rank: number of this process on its machine, which is that of its GPU.
        group: the processes as torch.distributed knows them, on the CPU; None for one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    group: Any = field(default=None, repr=False)

    @property
    def main(self) -> bool:
        """Whether this process writes the files and speaks: rank 0."""
        return self.rank == 0

    def device(self, name: str = "auto") -> torch.device:
        """The device of this process; ``auto`` and ``cuda`` mean the GPU of its local rank.

        Raises:
            ConfigError: if it is no device, or is not there.
        """
        return pick_device(name, self.local_rank if self.size > 1 else None)

    def share(self, count: int) -> range:
        """The indices out of ``0 .. count - 1`` that are this process's: contiguous, by rank."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def barrier(self) -> None:
        """Waits until all are here."""
        self.highest((0.0,))

    def gather(self, obj: T) -> list[T] | None:
        """What each process holds, by rank, on rank 0; None on the others."""
        if self.size == 1:
            return [obj]
        import torch.distributed as dist

        found: list[Any] | None = [None] * self.size if self.main else None
        with _waiting():
            dist.gather_object(obj, found, dst=0, group=self.group)
        return found

    def broadcast(self, obj: Any) -> Any:
        """What rank 0 holds, on all; what the others hold is not looked at."""
        if self.size == 1:
            return obj
        import torch.distributed as dist

        box = [obj if self.main else None]
        with _waiting():
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def send(self, obj: Any, rank: int) -> None:
        """Hands something to another process, which must :meth:`receive` it."""
        import torch.distributed as dist

        with _waiting():
            dist.send_object_list([obj], dst=rank, group=self.group)

    def receive(self, rank: int) -> Any:
        """What another process sends, in the order in which it does."""
        import torch.distributed as dist

        box: list[Any] = [None]
        with _waiting():
            dist.recv_object_list(box, src=rank, group=self.group)
        return box[0]

    def highest(self, values: Sequence[float]) -> list[float]:
        """The element-wise maximum over the processes, the same number of values from each."""
        if self.size == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        found = torch.tensor(list(values), dtype=torch.float64)
        with _waiting():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return [float(value) for value in found]


@contextmanager
def joined(device_name: str = "auto") -> Iterator[World]:
    """The world of this process; under a launcher, with ``torch.distributed`` until the end.

    All processes leave together. One that fails leaves at once: the others then lose it, and end.

    Args:
        device_name: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``: where CUDA is used, CUDA
            tensors travel by NCCL and all others by gloo.

    Raises:
        ConfigError: for a launcher's variables or a device that make no sense.
        RuntimeError: if another process ends before its time.
    """
    place = launched()
    if place is None or place.size == 1:
        yield World()
        return
    try:
        world = _join(place, device_name)
        yield world
        world.barrier()
    except BaseException:
        first_to_fail()
        _leave(failed=True)
        raise
    _leave(failed=False)


def _join(place: Place, device_name: str) -> World:
    """Meets the other processes."""
    import torch
    import torch.distributed as dist

    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"{place.size} processes need {' and '.join(missing)} to meet: start them with "
            "torchrun or accelerate launch"
        )
    device = World(*place).device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, **_fresh(place))
    return World(*place, dist.new_group(backend="gloo", timeout=PATIENCE))


def _fresh(place: Place) -> dict[str, Any]:
    """Where the processes of torchrun on one machine meet: at each restart anew.

    Its store outlives a restart, and with it the addresses of the processes before, which would
    be called in vain. Of many machines the restarts are not counted alike.
    """
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not count or not shared or os.environ.get("LOCAL_WORLD_SIZE") != str(place.size):
        return {}
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
    fresh = dist.PrefixStore(f"scoresde/restart/{count}", store)
    return {"store": fresh, "rank": place.rank, "world_size": place.size}


def _leave(failed: bool) -> None:
    """Takes the process groups down; after an error, without waiting for what is under way."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    with suppress(Exception):
        if failed and "nccl" in str(dist.get_backend_config()):
            # To destroy NCCL's group is to finish its collectives, which others may never enter.
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()


@contextmanager
def _waiting() -> Iterator[None]:
    """Says in plain words that another process has gone."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "another process of this run ended, or could not be reached, before its time"
        ) from error


@cache
def first_to_fail() -> bool:
    """Whether this process is the first that fails, and so the one that says why.

    The processes of a launcher share its store, where the first leaves a mark. Without such a
    store every process speaks for itself.
    """
    try:
        place = launched()
    except ConfigError:  # which is what there is to say
        return True
    if place is None or place.size == 1:
        return True
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    try:
        import torch.distributed as dist

        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
            is_master=False, wait_for_workers=False, timeout=STORE_PATIENCE,
        )  # fmt: skip
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return bool(store.add(f"scoresde/failed/{attempt}", 1) == 1)
    except (RuntimeError, KeyError, ValueError):
        return True
