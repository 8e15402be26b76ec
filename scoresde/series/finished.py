"""The file of a finished series, and beside it what says how it was made."""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..files import sync
from .plan import ANEW, FORMAT, Plan, SeriesError, Table

_READ: dict[str, Callable[[str], Any]] = {"float": float, "int": int, "bool": "True".__eq__}


def write(file: Path, plan: Plan, rows: np.ndarray, seconds: float) -> None:
    """Writes what says how it was made, then the file: where that is, the series is finished."""
    content = _encoded(file, plan, rows)
    about = {**plan.identity, "seconds": seconds, "sha256": hashlib.sha256(content).hexdigest()}
    _put(sidecar(file), (json.dumps(about, indent=2) + "\n").encode())
    _put(file, content)


def read_table(file: Path, plan: Plan) -> Table:
    """The table of a finished file, if it is of this plan."""
    identity, about = read_identity(file)
    plan.agree(identity, str(file))
    return plan.table(read_rows(file, plan, about["sha256"]), float(about["seconds"]))


def read_identity(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The identity of a finished file, and everything that is known of it."""
    if not file.exists():
        begun = file.with_name(f"{file.name}.partial").exists()
        raise SeriesError(f"{file} is not {'finished' if begun else 'there'}")
    try:
        about = json.loads(sidecar(file).read_text(encoding="utf-8"))
        extra = ("seconds", "sha256")
        if about["format"] != FORMAT or not all(key in about for key in extra):
            raise KeyError("format")
        return {k: v for k, v in about.items() if k not in extra}, about
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SeriesError(
            f"{file} is there already, and no {sidecar(file).name} says how it was made. {ANEW}"
        ) from error


def read_rows(file: Path, plan: Plan, digest: str) -> np.ndarray:
    """The rows of a finished file."""
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise SeriesError(f"{file} was changed since it was written. {ANEW}")
    if file.suffix == ".parquet":
        table = importlib.import_module("pyarrow.parquet").read_table(io.BytesIO(content))
        rows = np.zeros(len(table), plan.dtype)
        for name in plan.columns:
            rows[name] = table[name].to_numpy()
        return rows
    lines = csv.reader(io.StringIO(content.decode()))
    next(lines)
    read = [_READ[kind] for kind in plan.columns.values()]
    values = [tuple(r(v) for r, v in zip(read, line[1:], strict=True)) for line in lines]
    return np.array(values, plan.dtype)


def _encoded(file: Path, plan: Plan, rows: np.ndarray) -> bytes:
    """A file's bytes: the same for the same rows."""
    if file.suffix == ".parquet":
        arrow, parquet = (importlib.import_module(f"pyarrow{m}") for m in ("", ".parquet"))
        columns = {name: np.ascontiguousarray(rows[name]) for name in plan.columns}
        table = arrow.table({"item": np.arange(plan.first, plan.stop), **columns})
        sink = io.BytesIO()
        parquet.write_table(table, sink)
        return sink.getvalue()
    text = io.StringIO()
    sheet = csv.writer(text, lineterminator="\n")
    sheet.writerow(["item", *plan.columns])
    sheet.writerows((i, *row) for i, row in enumerate(rows.tolist(), plan.first))
    return text.getvalue().encode()


def check_format(file: Path) -> None:
    """Refuses, before any work, a file that could not be written."""
    if file.suffix not in (".csv", ".parquet"):
        raise SeriesError(f"cannot write {file}: a series goes to .csv or .parquet")
    if file.suffix == ".parquet":
        try:
            importlib.import_module("pyarrow.parquet")
        except ImportError as error:
            raise SeriesError(
                f"writing {file} needs pyarrow: pip install 'scoresde[parquet]', or name a .csv"
            ) from error


def sidecar(file: Path) -> Path:
    """Where what is known of a file lies."""
    return file.with_name(f"{file.name}.json")


def _put(file: Path, content: bytes) -> None:
    """Writes a file beside its place, and moves it there once it is on the disk."""
    draft = file.with_name(f".{file.name}.draft")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(draft, "wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(draft, file)
        finally:
            draft.unlink(missing_ok=True)
        sync(file.parent)


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Says which file could not be written."""
    try:
        yield
    except OSError as error:
        raise SeriesError(f"cannot write {file}: {error.strerror or error}") from error
