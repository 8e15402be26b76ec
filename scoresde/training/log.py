"""The logs of a run: one JSON object a line, one file a kind.

A row counts once its line end is written. What a kill or a full disk has left of a row is no row,
and is cut off before the next one: a log never keeps a run from going on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..files import CheckpointError, finite, write_text

EVENTS = "events"
"""The log of what happened to a run, which no resumption takes back."""


class Log:
    """``logs/NAME.jsonl`` in the folder of a run, written by one process.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / "logs"

    def append(self, name: str, **row: Any) -> None:
        """Adds a row to a log, whole or not at all; numbers that are not finite become null.

        Raises:
            CheckpointError: if it cannot be written, as on a full disk; earlier rows stay.
        """
        file = self.folder / f"{name}.jsonl"
        content = _line(row)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(file, "a+b", buffering=0) as handle:
                _write(handle, content, _cut(handle))
        except OSError as error:
            raise CheckpointError(f"cannot write {file}: {error.strerror or error}") from error

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a log, none if there is no such log; lines that are no rows are left out.

        Raises:
            CheckpointError: if the file cannot be read.
        """
        file = self.folder / f"{name}.jsonl"
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
        lines = content.split(b"\n")[:-1]  # after the last line end: nothing, or half a row
        with suppress(ValueError):  # all at once takes less time than one by one
            found = json.loads(b"[" + b",".join(lines) + b"]")
            if len(found) == len(lines) and all(isinstance(row, dict) for row in found):
                return found  # type: ignore[no-any-return]
        return list(_readable(lines))

    def rewind(self, step: int) -> None:
        """Drops what was logged after ``step``, which a resumed run will log again.

        Events stay, and one more says how much training is done again.

        Raises:
            CheckpointError: if a log cannot be written; it is then as before.
        """
        for file in sorted(self.folder.glob("*.jsonl")):
            if file.stem == EVENTS:
                continue
            rows = self.rows(file.stem)
            kept = [row for row in rows if row.get("step", 0) <= step]
            write_text(file, b"".join(map(_line, kept)).decode())
            if file.stem == "train" and len(kept) < len(rows):
                self.append(EVENTS, time=time.time(), **_redone(step, rows, kept))


def _redone(
    step: int, rows: Sequence[Mapping[str, Any]], kept: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """An event that says what the dropped rows had cost."""
    last, before = rows[-1], kept[-1] if kept else {}
    spent = {
        key: max(0, (last.get(key) or 0) - (before.get(key) or 0)) for key in ("seconds", "items")
    }
    text = f"went back from step {last.get('step')} to {step}"
    return {"step": step, "kind": "rewind", "text": text, "world": last.get("world", 1), **spent}


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(finite(row), allow_nan=False) + "\n").encode()


def _cut(handle: BinaryIO) -> int:
    """Cuts off half a row at the end of a file; returns where the next row starts."""
    end = handle.seek(0, 2)
    if not end:
        return 0
    handle.seek(end - 1)
    if handle.read(1) != b"\n":
        handle.seek(0)
        end = handle.read().rfind(b"\n") + 1
        handle.truncate(end)
    return end


def _write(handle: BinaryIO, content: bytes, start: int) -> None:
    """Writes all of the content or, where the disk takes only a part of it, nothing."""
    try:
        while content:
            content = content[handle.write(content) or 0 :]
    except OSError:
        with suppress(OSError):
            handle.truncate(start)
        raise


def _readable(lines: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    """The lines that are rows."""
    for line in lines:
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                yield row
