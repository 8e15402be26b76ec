"""Who evaluates a series: this process, workers of its own, or the processes of a launcher.

Batches are handed out one by one, so that a slow one keeps nobody else waiting.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue as queues
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..world import World
from .journal import Batch
from .plan import TENSOR, Plan, SeriesError

Evaluate: TypeAlias = Callable[[int, int], Mapping[str, Any]]
Work: TypeAlias = Generator[Batch, None, None]


@dataclass
class Queue:
    """Hands out batches of what is not known: at most ``size`` blocks, fewer near the end."""

    plan: Plan
    known: np.ndarray
    size: int
    processes: int
    todo: list[int] = field(init=False)

    def __post_init__(self) -> None:
        plan = self.plan
        starts = [b * plan.block for b in plan.blocks]
        self.todo = [s // plan.block for s in starts if not self.known[s - plan.first]][::-1]

    def take(self) -> tuple[int, int] | None:
        """The next items ``(start, stop)``, or None."""
        if not self.todo:
            return None
        most = min(self.size, -(-len(self.todo) // self.processes))
        first = last = self.todo.pop()
        while self.todo and self.todo[-1] == last + 1 <= first + most - 1:
            last = self.todo.pop()
        size = self.plan.block
        return first * size, min((last + 1) * size, self.plan.count)


def _evaluated(evaluate: Evaluate, start: int, stop: int, plan: Plan) -> tuple[float, bytes]:
    """Seconds of a batch, and its rows."""
    began = time.perf_counter()
    found = evaluate(start, stop)
    rows = np.zeros(stop - start, plan.dtype)
    if set(found) != set(plan.columns):
        raise SeriesError(f"columns are {', '.join(plan.columns)}; got {', '.join(found)}")
    for name, kind in plan.columns.items():
        # Not torch.as_tensor, which makes float32 of a list.
        given = found[name]
        values = given if isinstance(given, Tensor) else torch.from_numpy(np.asarray(given))
        fits = {"float": not values.is_complex(), "int": not values.is_floating_point()}
        bits = values.dtype == torch.bool
        if values.shape != rows.shape or bits != (kind == "bool") or not fits.get(kind, True):
            raise SeriesError(
                f"column {name!r} of items {start} to {stop - 1} must be {kind} of shape "
                f"{rows.shape}, got {values.dtype} of shape {tuple(values.shape)}"
            )
        rows[name] = values.detach().cpu().to(TENSOR[kind]).numpy()
    return time.perf_counter() - began, rows.tobytes()


def alone(
    make: Callable[[], Evaluate], queue: Queue | _Ours, plan: Plan, threads: int | None
) -> Work:
    """The work, done in this process."""
    before = torch.get_num_threads()
    evaluate = None
    try:
        torch.set_num_threads(threads or before)
        while (span := queue.take()) is not None:
            evaluate = make() if evaluate is None else evaluate
            yield (*span, *_evaluated(evaluate, *span, plan))
    finally:
        torch.set_num_threads(before)


def spread(
    make: Callable[[], Evaluate], queue: Queue, plan: Plan, processes: int, threads: int | None
) -> Work:
    """The work, done by workers: each has a pipe, whose end tells of its death."""
    context = multiprocessing.get_context("spawn")
    threads = threads or max(1, torch.get_num_threads() // processes)
    crew: dict[Any, Any] = {}
    spans: dict[Any, tuple[int, int]] = {}

    def give(pipe: Any) -> None:
        span = queue.take()
        if span is not None:
            spans[pipe] = span
            with suppress(OSError):  # a dead one: its pipe says so when it is read
                pipe.send(span)

    try:
        for _ in range(min(processes, len(queue.todo))):
            ours, theirs = context.Pipe()
            with theirs:
                worker = context.Process(
                    target=_work, args=(theirs, make, plan, threads), daemon=True
                )
                try:
                    worker.start()
                except (pickle.PicklingError, AttributeError, TypeError) as error:
                    raise SeriesError(
                        f"workers need a make that can be pickled, such as a function of a "
                        f"module or a dataclass: {error}"
                    ) from error
            crew[ours] = worker
            give(ours)
        while spans:
            failed: list[tuple[Exception, str | None]] = []
            ready: list[Any] = connection.wait(list(spans))
            for pipe in ready:
                span = spans.pop(pipe)
                try:
                    reply = pipe.recv()
                except (EOFError, OSError):
                    reply = _death(crew[pipe], *span), None
                if isinstance(reply[0], Exception):
                    failed.append(reply)
                    continue
                yield (*span, *reply)
                give(pipe)  # once the last is kept: a kill costs a worker one batch
            for trouble, trace in failed:  # once what others had finished is kept
                raise trouble from (None if trace is None else _Remote(trace))
    finally:
        for worker in crew.values():
            worker.terminate()
        for pipe, worker in crew.items():
            worker.join()
            pipe.close()


def shared(
    make: Callable[[], Evaluate], queue: Queue, plan: Plan, threads: int | None, world: World
) -> Work:
    """The work of rank 0, which does its part and hands the rest to the others; see `serve`.

    A thread attends to each of the others, and so none waits while this process evaluates.
    """
    done: queues.Queue[Batch | Exception] = queues.Queue()
    lock, left = threading.Lock(), len(queue.todo)

    def take() -> tuple[int, int] | None:
        with lock:
            return queue.take()

    def attend(rank: int) -> None:
        try:
            while (span := take()) is not None:
                world.send(span, rank)
                done.put((*span, *world.receive(rank)))
        except Exception as error:
            done.put(error)

    for rank in range(1, world.size):
        threading.Thread(target=attend, args=(rank,), daemon=True).start()
    own = alone(make, _Ours(take), plan, threads)
    while left:
        mine = next(own, None)
        if mine is not None:
            done.put(mine)
        while left and (mine is None or not done.empty()):
            batch = done.get()
            if isinstance(batch, Exception):
                raise batch
            yield batch
            left -= -(-(batch[1] - batch[0]) // plan.block)


@dataclass(frozen=True)
class _Ours:
    """A queue that several threads take from."""

    take: Callable[[], tuple[int, int] | None]


def serve(make: Callable[[], Evaluate], plan: Plan, threads: int | None, world: World) -> None:
    """The work of the other ranks: what rank 0 hands out, until it says that there is no more."""
    before = torch.get_num_threads()
    evaluate = None
    try:
        torch.set_num_threads(threads or before)
        while (span := world.receive(0)) is not None:
            start, stop = span
            evaluate = make() if evaluate is None else evaluate
            world.send(_evaluated(evaluate, start, stop, plan), 0)
    finally:
        torch.set_num_threads(before)


def _work(pipe: Any, make: Callable[[], Evaluate], plan: Plan, threads: int) -> None:
    """A worker: spans come in, results or an error go out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C, and ends this one
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(threads)
    evaluate = None
    while True:
        try:
            start, stop = pipe.recv()
        except EOFError:
            return
        try:
            evaluate = make() if evaluate is None else evaluate
            reply: tuple[Any, Any] = _evaluated(evaluate, start, stop, plan)
        except Exception as error:
            reply = _portable(error), traceback.format_exc()
        with suppress(OSError):  # a parent that is gone
            pipe.send(reply)


def _follow_parent() -> None:
    """Ends this process with its parent, in the middle of a batch: nobody waits for it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _death(worker: Any, start: int, stop: int) -> RuntimeError:
    """The error for a worker that left without an answer."""
    worker.join(5)
    code = worker.exitcode
    why = f"exit code {code}" if code is None or code >= 0 else f"signal {-code}"
    hint = ": out of memory?" if code == -9 else ""
    return RuntimeError(
        f"a worker died on items {start} to {stop - 1} ({why}{hint}); what was finished is kept, "
        "run it again to go on"
    )


class _Remote(Exception):  # noqa: N818 (where an error came from, never raised by itself)
    """The traceback of a worker."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _portable(error: Exception) -> Exception:
    """The error, or its words where it cannot be pickled."""
    try:
        return pickle.loads(pickle.dumps(error))  # type: ignore[no-any-return]
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
