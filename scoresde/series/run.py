r"""A series of items, evaluated over processes and machines, that goes on where a kill stopped it.

Block ``b`` is the items ``[b size, (b + 1) size)``, whatever the batch, the processes and the
machines: convolutions in float32 give a row the same bits in any batch of whole blocks of 16, so
a series has one result, byte for byte. A batch is a run of blocks, the unit of work; a part
``(i, n)`` is the ``i``-th of ``n`` contiguous shares of the blocks, in a file of its own.

Beside ``FILE`` lies its journal, ``FILE.partial``: a first line, then records

    length, crc32 of the body, crc32 of these two, body

The first body is the identity of the series (what it evaluates, how, on what) in JSON; each later
one is a batch (start, stop, seconds, rows), on the disk before the next is written. A record that
the file ends in was torn by a kill and is cut off; a sum that is wrong ends what is trusted, with
a warning. A complete series becomes ``FILE`` and ``FILE.json``, its identity and the digest of
``FILE``, each moved into place whole; then the journal goes. While it is open it is locked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..world import World
from .finished import check_format, read_identity, read_rows, read_table, sidecar, write
from .journal import BATCH, Journal
from .plan import BLOCK, Plan, SeriesError, Table
from .workers import Evaluate, Queue, Work, alone, serve, shared, spread


def run_series(
    make: Callable[[], Evaluate],
    count: int,
    file: Path,
    *,
    columns: Mapping[str, type],
    fingerprint: Mapping[str, Any],
    block: int = BLOCK,
    batch: int = 64,
    processes: int = 1,
    threads: int | None = None,
    part: tuple[int, int] | None = None,
    progress: Callable[[int, dict[str, Tensor]], object] | None = None,
    fresh: bool = False,
    world: World | None = None,
) -> Table:
    """Evaluates items ``0 .. count - 1`` into ``file``, from where an earlier run stopped.

    Args:
        make: gives ``evaluate(start, stop)``, whose mapping has for each column one value an item
            of ``[start, stop)``. ``start`` is a multiple of ``block``, and so is ``stop`` unless
            it is ``count``. With ``processes > 1`` it is pickled, and called once a worker.
        count: items, >= 1.
        file: ``.csv`` (every digit of a float) or ``.parquet``; with ``part``, see
            :func:`part_file`. A finished one of the same series is read, not evaluated.
        columns: name to ``float``, ``int`` or ``bool``.
        fingerprint: plain values on which the results depend (digests of model and data,
            settings, seed, version); an earlier run with others is refused.
        block: items of a block, >= 1.
        batch: items evaluated at once at most, a multiple of ``block``; towards the end of the
            work it is shared out in smaller batches.
        processes: 1 evaluates in this process; more in as many workers, started afresh.
        threads: of torch, a process; by default this process's own, shared out to the workers.
        part: evaluates the ``i``-th share of ``n`` alone, ``(i, n)``; :func:`merge` joins them.
        progress: called as ``progress(done, columns)`` after each batch, and at first if an
            earlier run has left some, with the items done and their values.
        fresh: removes what an earlier run has left, first.
        world: processes that all call this with the same arguments: rank 0 keeps the journal and
            hands out batches, all evaluate, and all get the table. It may be another world
            than that of the run which was stopped.

    Raises:
        SeriesError: an argument out of range, another series in the file, a file that is not to
            be written or that another process writes, or results that do not fit the columns.
        RuntimeError: a worker died; what was finished is kept.
    """
    if batch < block or batch % block or processes < 1 or (threads is not None and threads < 1):
        raise SeriesError(
            f"a series needs a batch that is a multiple of {block}, processes >= 1 and "
            f"threads >= 1, got batch={batch}, processes={processes}, threads={threads}"
        )
    world = world or World()
    if processes > 1 and world.size > 1:
        raise SeriesError(
            f"the {world.size} processes of a launcher share a series: leave out "
            f"processes={processes}"
        )
    kinds = {name: getattr(kind, "__name__", str(kind)) for name, kind in columns.items()}
    plan = Plan(count, kinds, dict(fingerprint), block, part or (0, 1))
    file = part_file(Path(file), part)
    check_format(file)
    if not world.main:
        serve(make, plan, threads, world)
        given: Table = world.broadcast(None)
        return given

    def work(known: np.ndarray) -> Work:
        queue = Queue(plan, known, batch // block, max(processes, world.size))
        if world.size > 1:
            return shared(make, queue, plan, threads, world)
        if processes > 1:
            return spread(make, queue, plan, processes, threads)
        return alone(make, queue, plan, threads)

    table = _kept(file, plan, work, progress, fresh)
    for rank in range(1, world.size):
        world.send(None, rank)
    world.broadcast(table)
    return table


def _kept(
    file: Path,
    plan: Plan,
    work: Callable[[np.ndarray], Work],
    progress: Callable[[int, dict[str, Tensor]], object] | None,
    fresh: bool,
) -> Table:
    """The table of a file: read, or what is on the disk and the work on what is not known."""
    partial = file.with_name(f"{file.name}.partial")
    if file.exists() and not fresh and not partial.exists():
        return read_table(file, plan)
    rows = np.zeros(plan.stop - plan.first, plan.dtype)
    known = np.zeros(len(rows), bool)
    with Journal(partial) as journal:
        if fresh:
            journal.clear()
            for old in (file, sidecar(file)):
                old.unlink(missing_ok=True)
        elif file.exists():  # finished by another process, or killed before the journal went
            table = read_table(file, plan)
            journal.remove()
            return table
        seconds = 0.0

        def place(start: int, stop: int, took: float, body: bytes) -> None:
            nonlocal seconds
            rows[start - plan.first : stop - plan.first] = np.frombuffer(body, plan.dtype)
            known[start - plan.first : stop - plan.first] = True
            seconds += took

        for record in journal.resume(plan):
            place(*record)
        before = int(known.sum())
        if progress is not None and before:
            progress(before, plan.tensors(rows[known]))
        with closing(work(known)) as batches:
            for start, stop, took, body in batches:
                journal.append(BATCH.pack(start, stop, took) + body)
                place(start, stop, took, body)
                if progress is not None:
                    progress(int(known.sum()), plan.tensors(rows[known]))
        write(file, plan, rows, seconds)
        journal.remove()
    return plan.table(rows, seconds, len(rows) - before)


def part_file(file: Path, part: tuple[int, int] | None) -> Path:
    """Where a part of a series lies: ``bits.csv`` has ``bits.part-0-of-4.csv`` and so on."""
    if part is None:
        return file
    return file.with_name(f"{file.stem}.part-{part[0]}-of-{part[1]}{file.suffix}")


def merge(files: Sequence[Path], file: Path | None = None, *, fresh: bool = False) -> Table:
    """Joins the finished parts of a series into what one run would have written.

    Args:
        files: all parts, in any order.
        file: where the whole goes, ``.csv`` or ``.parquet``; None writes nothing.
        fresh: whether it may take the place of another series.

    Raises:
        SeriesError: parts of different series, or a part that is missing, twice or not finished.
    """
    files = [Path(each) for each in files]
    if not files:
        raise SeriesError("there are no parts to merge")
    found: dict[int, tuple[np.ndarray, float]] = {}
    first: Plan | None = None
    for each in files:
        identity, about = read_identity(each)
        i, n = identity["part"]
        plan = Plan(
            identity["items"], dict(identity["columns"]), identity["fingerprint"],
            identity["block"], (i, n),
        )  # fmt: skip
        first = first or plan
        replace(first, part=(i, n)).agree(identity, str(each))
        if n != first.part[1]:
            raise SeriesError(f"{each} is one of {n} parts, {files[0]} one of {first.part[1]}")
        if i in found:
            raise SeriesError(f"part {i} of {n} is there twice, the second time as {each}")
        found[i] = read_rows(each, plan, about["sha256"]), float(about["seconds"])
    assert first is not None
    missing = sorted(set(range(first.part[1])) - set(found))
    if missing:
        names = ", ".join(map(str, missing))
        raise SeriesError(f"of {first.part[1]} parts, these are missing: {names}")
    whole = replace(first, part=(0, 1))
    rows = np.concatenate([found[i][0] for i in sorted(found)])
    seconds = sum(took for _, took in found.values())
    if file is not None:
        file = Path(file)
        check_format(file)
        if file.exists() and not fresh:
            return read_table(file, whole)
        write(file, whole, rows, seconds)
    return whole.table(rows, seconds)
