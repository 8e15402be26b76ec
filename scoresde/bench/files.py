"""A comparison as files: CSV, JSON, PNG, SVG and a page, each whole or not at all."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from .row import MEASURES, Row
from .text import Floors

NAMES = ("bench.csv", "bench.json", "bench.png", "bench.svg", "bench.html")
_NESTED = ("intervals", "runs")


def write(folder: Path, rows: Sequence[Row], floors: Floors, content: Mapping[str, Any]) -> None:
    """Writes all files into a folder, over those of an earlier run.

    Args:
        folder: made if need be.
        rows: of one problem or several.
        floors: for each law, the floor of each measure.
        content: what else the JSON and the page say; its ``title``, and ``unit`` of the sliced
            distance, also go onto the plots.
    """
    from .page import page
    from .plot import plot

    folder.mkdir(parents=True, exist_ok=True)
    whole = record(rows, floors, content)
    # All are written before any takes its place.
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=folder) as name:
        draft = Path(name)
        write_csv(draft / "bench.csv", rows, floors)
        (draft / "bench.json").write_text(dumps(whole, indent=2) + "\n", encoding="utf-8")
        pictures = [draft / "bench.png", draft / "bench.svg"]
        plot(pictures, rows, floors, str(content["title"]), str(content["unit"]))
        (draft / "bench.html").write_text(page(whole), encoding="utf-8")
        for file in NAMES:
            os.replace(draft / file, folder / file)


def write_csv(file: Path, rows: Sequence[Row], floors: Floors) -> None:
    """A line a row: its fields, then the ends of its intervals, then the floors of its law."""
    names = [f.name for f in fields(Row) if f.name not in _NESTED]
    spans = [*(m.key for m in MEASURES), "vs_best"]
    keys = list(dict.fromkeys(key for floor in floors.values() for key in floor))
    with open(file, "w", newline="", encoding="utf-8") as handle:
        sheet = csv.writer(handle)
        ends = [f"{key}_{end}" for key in spans for end in ("low", "high")]
        sheet.writerow([*names, *ends, *(f"{key}_floor" for key in keys)])
        for row in rows:
            values = [getattr(row, name) for name in names]
            values += [end for key in spans for end in row.intervals.get(key, (None, None))]
            values += [floors.get(row.law, {}).get(key) for key in keys]
            sheet.writerow(["" if v is None else v for v in values])


def record(rows: Sequence[Row], floors: Floors, content: Mapping[str, Any]) -> dict[str, Any]:
    """Everything as plain values for JSON: the content, the measures, the floors and the rows."""
    return {
        **content,
        "measures": [asdict(m) for m in MEASURES],
        "floors": {law: dict(floor) for law, floor in floors.items()},
        "rows": [asdict(row) for row in rows],
    }


def dumps(content: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: what is not finite becomes null."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def commit() -> str | None:
    """The commit of the package if it runs out of a git checkout, ``+`` where files differ."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # a folder, or a file in a worktree
        return None
    try:
        name = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "scoresde")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{name}+" if changed else name


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments],
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    return done.stdout.strip()
