"""Processes that read for another: started quietly, and started again when one is killed."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from pickle import UnpicklingError
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch.utils.data import DataLoader

from scoresde.data.source import DataError

RESTARTS = 3
PATIENCE = 5.0  # seconds

T = TypeVar("T")


class Failed(NamedTuple):
    """The one line of a DataError, from a worker."""

    message: str


class Workers(Generic[T]):
    """What the workers of a `DataLoader` read, in order, whatever happens to one of them.

    Args:
        name: of what is read, for messages.
        reading: makes the data set and, if it is indexed, its sampler, for the next item wanted.
        count: number of processes.
        context: how they are started ("fork", "spawn", "forkserver"); None for the default.
    """

    def __init__(
        self,
        name: str,
        reading: Callable[[], tuple[Any, Any]],
        count: int,
        context: str | None = None,
    ) -> None:
        self._name, self._reading, self._count, self._context = name, reading, count, context
        self._restarts = 0
        self._running: Iterator[T | Failed] | None = None

    def next(self, wanted: str, notes: list[str]) -> T:
        """The next item; of a restart at the item `wanted` it is said so in `notes`.

        Raises:
            DataError: one that a worker met, or workers are killed again and again.
        """
        while True:
            if self._running is None:
                self._running = self._start()
            try:
                item = next(self._running)
            except (RuntimeError, EOFError, OSError, UnpicklingError) as error:
                if not self._died():
                    raise
                self.close()
                self._restarts += 1
                lost = "a process that reads the data was killed"
                if self._restarts > RESTARTS:
                    raise DataError(
                        f"{self._name}: {lost}, {self._restarts} times; is there too little "
                        "memory, or room in /dev/shm? Try fewer training.workers"
                    ) from error
                notes.append(f"{lost}; started again at {wanted}")
                continue
            if isinstance(item, Failed):
                raise DataError(item.message)
            return item

    def _start(self) -> Iterator[T | Failed]:
        with _quiet_start():
            data, sampler = self._reading()
            return iter(
                DataLoader(
                    data,
                    batch_size=None,
                    sampler=sampler,
                    num_workers=self._count,
                    collate_fn=_as_it_is,
                    worker_init_fn=_keep_quiet,
                    multiprocessing_context=self._context,
                    generator=torch.Generator(),  # else it draws from the global one
                )
            )

    def _died(self) -> bool:
        """Whether a worker has ended: what it left unfinished shows a little before."""
        ends = [worker.sentinel for worker in getattr(self._running, "_workers", ())]
        return bool(wait(ends, timeout=PATIENCE))

    def close(self) -> None:
        """Ends the workers; a next item would start them again."""
        running, self._running = self._running, None
        if running is not None and hasattr(running, "_shutdown_workers"):
            running._shutdown_workers()


def _as_it_is(read: Any) -> Any:
    return read


def _keep_quiet(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the one that trains ends the others.

    It may leave in the middle of taking what a worker hands over, of which the worker's thread
    for that would print a traceback.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _unless_left


def _unless_left(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Prints an error that nobody has caught, but not that the other side has gone."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


@contextmanager
def _quiet_start() -> Iterator[None]:
    """Workers inherit that Ctrl-C is ignored; torch's own handler of dead ones is taken back.

    That handler raises wherever the training happens to be; the loader finds out by itself.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    held = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGCHLD)}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # comes after the start
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        for which, handler in held.items():
            signal.signal(which, handler if handler is not None else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
